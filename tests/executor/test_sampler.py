"""The sampler against a slow one in float64 that sorts everything, and its invariants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm.errors import ExecutorFault
from edgellm.executor.base import NO_TOKEN
from edgellm.executor.philox import uniform
from edgellm.executor.sampler import Sampled, Sampler
from edgellm.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
NO_HISTORY = np.array([], np.int32)


def reference(
    logits: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    allowed: NDArray[np.bool_] | None = None,
    slack: float = 0.0,
) -> NDArray[np.float64]:
    """Probability of every token. `slack` moves the borders of top_p and min_p a little, relatively."""
    row = logits.astype(np.float64)
    if allowed is not None:
        row[~allowed] = -np.inf
    for id_, bias in params.logit_bias.items():
        row[id_] += bias
    if len(generated) < params.min_tokens:
        suppressed = row.copy()
        suppressed[list(params.suppressed)] = -np.inf
        if np.isfinite(suppressed).any():
            row = suppressed
    for id_ in {*prompt, *generated}:
        if params.repetition_penalty != 1.0:
            if row[id_] > 0:
                row[id_] /= params.repetition_penalty
            else:
                row[id_] *= params.repetition_penalty
    for id_ in set(generated):
        row[id_] -= params.presence_penalty + params.frequency_penalty * list(generated).count(id_)
    order = np.argsort(-row, kind="stable")
    probability = np.zeros(len(row))
    if params.greedy:
        probability[order[0]] = 1.0
        return probability
    with np.errstate(over="ignore"):
        weights = np.exp((row[order] - row[order[0]]) / params.temperature)
    if params.top_k:
        weights[params.top_k :] = 0.0
    weights /= weights.sum()
    if params.top_p < 1.0:
        before = np.concatenate([[0.0], weights.cumsum()[:-1]])
        weights[before >= params.top_p * (1 + slack)] = 0.0
    weights[weights < params.min_p * weights[0] * (1 - slack)] = 0.0
    probability[order] = weights / weights.sum()
    return probability


def agrees(token: int, probability: NDArray[np.float64], u: float, tolerance: float = 1e-5) -> bool:
    """Whether u falls into the token's part of the unit interval, the tokens being laid out by id."""
    share, end = float(probability[token]), float(probability[: token + 1].sum())
    return share > 0 and end - share - tolerance <= u <= end + tolerance


def bits(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """A mask's row, bit by bit."""
    words = np.zeros(-(-len(allowed) // 32), np.uint32)
    for id_ in np.flatnonzero(allowed):
        words[id_ // 32] |= np.uint32(1 << (int(id_) % 32))
    return words


def sample_one(
    sampler: Sampler, slot: int, logits: NDArray[np.float32], mask: NDArray[np.uint32] | None = None
) -> int:
    return int(sampler.sample([slot], logits[None], None if mask is None else mask[None]).token[0])


@st.composite
def all_params(draw: st.DrawFn, vocab: int) -> SamplingParams:
    ids = st.integers(0, vocab - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-30, 0.1, 0.7, 1.0, 1.5, 10.0])),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 2 * vocab))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(1e-6, 1.0))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
        repetition_penalty=draw(st.sampled_from([1.0, 1.25, 2.0, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, -0.5])),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3)),
        seed=draw(st.integers(0, 2**64 - 1)),
        logprobs=draw(st.booleans()),
        top_logprobs=draw(st.integers(0, 5)),
        min_tokens=draw(st.integers(0, 3)),
        suppressed=tuple(draw(st.lists(ids, max_size=3))),
    )


# Quarters are exact in float32, and ties are many.
quarters = st.integers(-40, 40).map(lambda n: n / 4)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_agrees_with_the_reference(data: st.DataObject) -> None:
    vocab = data.draw(st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 65, 200])))
    params = data.draw(all_params(vocab))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    history = rng.integers(0, vocab, data.draw(st.integers(0, 5))).astype(np.int32)
    sampler = Sampler(2, vocab)
    sampler.bind(1, params, history)
    generated: list[int] = []
    for index in range(4):
        logits = (rng.integers(-40, 40, vocab) / 4).astype(np.float32)
        before = logits.copy()
        allowed = None
        if data.draw(st.booleans()):
            allowed = rng.random(vocab) < 0.5
            allowed[rng.integers(vocab)] = True
        token = sample_one(sampler, 1, logits, None if allowed is None else bits(allowed))
        np.testing.assert_array_equal(logits, before)
        assert sampler.last_token(1) == token
        u = uniform(params.seed, index)
        assert any(
            agrees(token, reference(logits, params, history.tolist(), generated, allowed, slack), u)
            for slack in (0.0, 1e-5, -1e-5)
        )
        generated.append(token)


@pytest.mark.parametrize("vocab", [49152, 151_936 + 7])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.02, temperature=1.3),
        SamplingParams(top_k=40, top_p=0.95, min_p=0.02),
        SamplingParams(top_k=5000),
        SamplingParams(min_p=0.1),
        SamplingParams(top_p=0.5, min_p=0.3),
    ],
    ids=repr,
)
def test_agrees_with_the_reference_on_a_whole_vocabulary(
    vocab: int, spread: float, params: SamplingParams
) -> None:
    logits = (np.random.default_rng(vocab).standard_normal(vocab) * spread).astype(np.float32)
    probabilities = [reference(logits, params, [], [], None, slack) for slack in (0.0, 1e-5, -1e-5)]
    sampler = Sampler(1, vocab)
    for seed in range(8):
        sampler.bind(0, dataclasses.replace(params, seed=seed), NO_HISTORY)
        token = sample_one(sampler, 0, logits)
        assert any(agrees(token, each, uniform(seed, 0), 1e-4) for each in probabilities)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=2.0, top_k=5, seed=3),
        SamplingParams(top_p=0.8, seed=4),
        SamplingParams(min_p=0.2, seed=5),
        SamplingParams(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05, seed=6),
    ],
    ids=repr,
)
def test_draws_are_distributed_as_asked(params: SamplingParams) -> None:
    """Pearson's chi-square; the bounds are exceeded once in ten thousand, and the seeds are fixed."""
    draws = 5000
    bound = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9}
    logits = np.array([0.0, 1.0, -0.5, 1.0, 0.3, -1.0, 0.7, -0.2], np.float32)
    probability = reference(logits, params, [], [])
    sampler = Sampler(1, len(logits))
    sampler.bind(0, params, NO_HISTORY)
    counts = np.bincount([sample_one(sampler, 0, logits) for _ in range(draws)], minlength=len(logits))
    possible = probability > 0
    assert counts[~possible].sum() == 0
    expected = probability[possible] * draws
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi_square < bound[int(possible.sum()) - 1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_batch_and_its_order_do_not_matter(data: st.DataObject) -> None:
    vocab, slots = 70, 5
    params = [data.draw(st.one_of(st.just(GREEDY), all_params(vocab))) for _ in range(slots)]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    histories = [rng.integers(0, vocab, 3).astype(np.int32) for _ in range(slots)]
    steps = [(rng.integers(-40, 40, (slots, vocab)) / 4).astype(np.float32) for _ in range(3)]
    together, alone = Sampler(slots, vocab), Sampler(slots, vocab)
    for slot in range(slots):
        together.bind(slot, params[slot], histories[slot])
    batches: list[tuple[list[int], Sampled]] = []
    for logits in steps:
        order = data.draw(st.permutations(range(slots)))
        batches.append((order, together.sample(order, logits[order])))
    for slot in reversed(range(slots)):
        alone.bind(slot, params[slot], histories[slot])
        for logits, (order, batch) in zip(steps, batches, strict=True):
            single = alone.sample([slot], logits[slot : slot + 1])
            row = order.index(slot)
            count = single.top_ids.shape[1]
            np.testing.assert_array_equal(single.token[0], batch.token[row])
            np.testing.assert_array_equal(single.logprob[0], batch.logprob[row])
            np.testing.assert_array_equal(single.top_ids[0], batch.top_ids[row, :count])
            np.testing.assert_array_equal(single.top_logprobs[0], batch.top_logprobs[row, :count])
            assert (batch.top_ids[row, count:] == -1).all()
            assert np.isnan(batch.top_logprobs[row, count:]).all()


@settings(deadline=None)
@given(st.lists(quarters, min_size=1, max_size=100), st.integers(0, 20), st.floats(0, 2))
def test_logprobs_are_the_models_own(values: list[float], top: int, temperature: float) -> None:
    logits = np.array(values, np.float32)
    params = SamplingParams(
        temperature=temperature, top_k=3, logit_bias={0: 50.0}, logprobs=True, top_logprobs=top, seed=5
    )
    sampler = Sampler(1, len(logits))
    sampler.bind(0, params, NO_HISTORY)
    sampled = sampler.sample([0], logits[None])
    exact = logits.astype(np.float64)
    exact = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    best = np.argsort(-exact, kind="stable")[:top]
    np.testing.assert_allclose(sampled.logprob[0], exact[sampled.token[0]], atol=1e-5)
    np.testing.assert_array_equal(sampled.top_ids[0], best)
    np.testing.assert_allclose(sampled.top_logprobs[0], exact[best], atol=1e-5)
    assert sampled.logprob.dtype == sampled.top_logprobs.dtype == np.float32
    assert sampled.token.dtype == sampled.top_ids.dtype == np.int32


def test_plain_rows_report_nothing() -> None:
    sampled = Sampler(3, 10).sample([2, 0], np.eye(10, dtype=np.float32)[:2])
    assert sampled.token.tolist() == [0, 1]
    assert np.isnan(sampled.logprob).all()
    assert sampled.top_ids.shape == sampled.top_logprobs.shape == (2, 0)


def test_equal_logits_go_to_the_lower_id() -> None:
    logits = np.array([0, 3, 1, 3, 3, 1], np.float32)
    sampler = Sampler(1, 6)
    assert sample_one(sampler, 0, logits) == 1
    seen = set()
    for seed in range(60):
        sampler.bind(0, SamplingParams(top_k=2, seed=seed), NO_HISTORY)
        seen.add(sample_one(sampler, 0, logits))
    assert seen == {1, 3}


@pytest.mark.parametrize("top_k", [0, 4])
def test_the_nucleus_ends_where_top_p_is_reached_exactly(top_k: int) -> None:
    sampler = Sampler(1, 5)
    seen = set()
    for seed in range(40):
        sampler.bind(0, SamplingParams(top_p=0.5, top_k=top_k, seed=seed), NO_HISTORY)
        seen.add(sample_one(sampler, 0, np.array([0, 0, 0, 0, -np.inf], np.float32)))
    assert seen == {0, 1}


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (1 - 2**-53, 98)])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(min_p=0.5), SamplingParams(top_p=0.999)])
def test_the_ends_of_the_unit_interval_choose_no_impossible_token(
    u: float, expected: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.executor.sampler.uniform", lambda seed, index: u)
    logits = np.zeros(100, np.float32)
    logits[[0, 99]] = -np.inf
    sampler = Sampler(1, 100)
    sampler.bind(0, params, NO_HISTORY)
    assert sample_one(sampler, 0, logits) == expected


def test_a_seed_repeats_and_another_differs() -> None:
    def answer(seed: int) -> list[int]:
        sampler = Sampler(1, 1000)
        sampler.bind(0, SamplingParams(seed=seed), NO_HISTORY)
        return [sample_one(sampler, 0, np.zeros(1000, np.float32)) for _ in range(8)]

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)
    assert answer(3) != answer(3 + 2**32)  # all 64 bits count
    assert len(set(answer(3))) > 4


def test_a_new_request_finds_nothing_of_the_one_before() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    penalized = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    sampler = Sampler(2, 3)
    sampler.bind(0, penalized, NO_HISTORY)
    assert [sample_one(sampler, 0, logits) for _ in range(3)] == [0, 1, 0]
    sampler.bind(0, penalized, NO_HISTORY)
    assert [sample_one(sampler, 0, logits) for _ in range(3)] == [0, 1, 0]


def test_the_prompt_counts_for_repetition_only() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    sampler = Sampler(1, 3)
    prompt = np.array([0, 0, 0], np.int32)
    sampler.bind(0, SamplingParams(temperature=0.0, frequency_penalty=1.0, presence_penalty=1.0), prompt)
    assert sample_one(sampler, 0, logits) == 0
    sampler.bind(0, SamplingParams(temperature=0.0, repetition_penalty=1.5), prompt)
    assert sample_one(sampler, 0, logits) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(temperature=0.0, logprobs=True)])
def test_logits_that_are_no_numbers_are_a_fault_and_change_nothing(
    bad: float, params: SamplingParams
) -> None:
    good = np.linspace(-1, 1, 3 * 80, dtype=np.float32).reshape(3, 80)
    broken = good.copy()
    broken[1] = bad if bad == -np.inf else broken[1]
    broken[1, 7] = bad
    sampler, untouched = Sampler(8, 80), Sampler(8, 80)
    for each in (sampler, untouched):
        for slot in (2, 5, 7):
            each.bind(slot, dataclasses.replace(params, seed=slot), NO_HISTORY)
    with pytest.raises(ExecutorFault, match=r"slot 5 "):
        sampler.sample([2, 5, 7], broken)
    assert sampler.last_token(2) == -1
    np.testing.assert_array_equal(
        sampler.sample([2, 5, 7], good).token, untouched.sample([2, 5, 7], good).token
    )


def test_a_token_at_minus_infinity_is_never_chosen() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[[3, 64]] = 0.0
    sampler = Sampler(1, 100)
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=50, logprobs=True)):
        seen = set()
        for seed in range(40):
            sampler.bind(0, dataclasses.replace(params, seed=seed, top_logprobs=5), NO_HISTORY)
            sampled = sampler.sample([0], logits[None])
            seen.add(int(sampled.token[0]))
        assert seen == {3, 64}
    assert sampled.top_ids[0].tolist() == [3, 64, -1, -1, -1]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=4, logprobs=True, top_logprobs=2)])
def test_a_mask_that_allows_nothing_gives_no_token_and_leaves_other_rows_alone(
    params: SamplingParams,
) -> None:
    logits = np.random.default_rng(3).standard_normal((2, 40)).astype(np.float32)
    mask = np.full((2, 2), 0xFFFFFFFF, np.uint32)
    mask[1] = [0, 0xFFFFFF00]  # only ids that do not exist
    sampler, untouched = Sampler(4, 40), Sampler(4, 40)
    for each in (sampler, untouched):
        for slot in (0, 3):
            each.bind(slot, params, NO_HISTORY)
    sampled, alone = sampler.sample([0, 3], logits, mask), untouched.sample([0], logits[:1])
    assert sampled.token.tolist() == [int(alone.token[0]), NO_TOKEN]
    assert np.isnan(sampled.logprob[1])
    assert (sampled.top_ids[1:] == -1).all()
    # The slot is where it was: the same index of the same seed comes next.
    assert sampler.last_token(3) == -1
    assert sampler.sample([3], logits[1:]).token == untouched.sample([3], logits[1:]).token


def test_min_tokens_holds_back_the_end_unless_the_mask_allows_nothing_else() -> None:
    logits = np.array([0.0, 5.0, 1.0, 4.0], np.float32)
    sampler = Sampler(1, 4)
    sampler.bind(0, SamplingParams(temperature=0.0, min_tokens=2, suppressed=(1, 3)), NO_HISTORY)
    assert [sample_one(sampler, 0, logits) for _ in range(3)] == [2, 2, 1]
    sampler.bind(0, SamplingParams(temperature=0.0, min_tokens=2, suppressed=(1, 3)), NO_HISTORY)
    assert sample_one(sampler, 0, logits, np.array([0b1000], np.uint32)) == 3


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-6, 1e30])
@pytest.mark.parametrize("bias", [-1e308, 0.0, 1e308])
def test_extreme_values_stay_numbers(temperature: float, bias: float) -> None:
    logits = np.array([1.0, -30.0, 2.0], np.float32)
    params = SamplingParams(
        temperature=temperature, logit_bias={1: bias}, repetition_penalty=100.0, top_p=0.99, seed=1
    )
    sampler = Sampler(1, 3)
    sampler.bind(0, params, np.array([1], np.int32))
    chosen = sample_one(sampler, 0, logits)
    if temperature < 1:
        assert chosen == (1 if bias > 0 else 2)

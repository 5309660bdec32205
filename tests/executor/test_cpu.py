"""Invariants of the CPU executor: how tokens are cut into steps, and where slots lie, changes no result."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
from engines import MAX_SEQ_LEN, row, run, tiny_executor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference_decoder import reference_logits
from tiny_llama import TINY

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.errors import ExecutorFault
from edgellm.executor import cpu
from edgellm.executor.base import FEEDBACK, NO_TOKEN, Row, Step, Want
from edgellm.executor.cpu import CpuExecutor
from edgellm.sampling import SamplingParams

TIED = TINY["3/1 heads of 64, tied"]
SLOTS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(TIED.write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "Q4_1", "Q8_0"))


@pytest.fixture(scope="module", params=["fp32", "int8"])
def executor(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CpuExecutor]:
    compute: Literal["int8", "fp32"] = request.param
    built = tiny_executor(checkpoint, tmp_path_factory.mktemp(compute), compute=compute, slots=SLOTS)
    yield built
    built.close()


def _same(got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal up to what another order of additions changes."""
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)


def _prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, TIED.vocab, length)]


@pytest.mark.parametrize("sizes", [[1, 19], [7, 13], [19, 1], [5, 5, 5, 5], [1] * 20])
def test_a_prompt_in_chunks_is_the_prompt_at_once(executor: CpuExecutor, sizes: list[int]) -> None:
    prompt = _prompt(1, 20)
    expected = run(executor, row(0, 0, prompt))
    past = 0
    for size in sizes[:-1]:
        executor.collect(executor.submit(Step([row(1, past, prompt[past : past + size], Want.NONE)])))
        past += size
    _same(run(executor, row(1, past, prompt[past:])), expected)


def test_chunks_of_one_run_are_the_prompt_at_once(
    executor: CpuExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = _prompt(2, 30)
    expected = run(executor, row(0, 0, prompt))
    monkeypatch.setattr(executor, "_chunk", 8)
    _same(run(executor, row(0, 0, prompt)), expected)


def test_a_ragged_batch_is_its_rows_one_by_one(executor: CpuExecutor) -> None:
    prompts = [_prompt(slot, 3 + 9 * slot) for slot in range(SLOTS)]
    for slot, prompt in enumerate(prompts):
        run(executor, row(slot, 0, prompt))
    alone = [run(executor, row(slot, len(p), [slot])) for slot, p in enumerate(prompts)]
    together = run(executor, *(row(slot, len(p), [slot]) for slot, p in enumerate(prompts)))
    _same(together, np.concatenate(alone))


def test_results_come_in_the_order_of_the_rows(executor: CpuExecutor) -> None:
    """Prefill and decode mixed, some rows wanting nothing: each result belongs to its row."""
    prompts = {slot: _prompt(10 + slot, 6) for slot in range(SLOTS)}
    for slot in (0, 2):
        run(executor, row(slot, 0, prompts[slot][:5]))
    mixed = run(
        executor,
        row(3, 0, prompts[3]),
        row(2, 5, prompts[2][5:]),
        row(1, 0, prompts[1], Want.NONE),
        row(0, 5, prompts[0][5:]),
    )
    for slot, got in zip((3, 2, 0), mixed, strict=True):
        _same(got[None], run(executor, row(slot, 0, prompts[slot])))
    # The row that wanted nothing was computed all the same.
    _same(run(executor, row(1, 6, [7])), run(executor, row(1, 0, [*prompts[1], 7])))


def test_only_rows_that_want_logits_get_them(executor: CpuExecutor) -> None:
    result = executor.collect(
        executor.submit(
            Step([row(0, 0, [1, 2]), row(1, 0, [1, 2], Want.TOKEN), row(2, 0, [1, 2], Want.NONE)])
        )
    )
    assert result.logits is not None and result.logits.shape == (2, TIED.vocab)
    assert result.logits[0].any() and not result.logits[1].any()
    assert result.token[0] == result.token[1] == result.logits[0].argmax()
    assert executor.collect(executor.submit(Step([row(0, 2, [3], Want.TOKEN)]))).logits is None


def test_a_shorter_past_forgets_what_lies_behind_it(executor: CpuExecutor) -> None:
    prompt = _prompt(3, 12)
    run(executor, row(0, 0, [*prompt, *_prompt(4, 10)]))
    reused = run(executor, row(0, 9, prompt[9:]))
    _same(reused, run(executor, row(1, 0, prompt)))


def test_a_copied_prefix_is_the_prefix(executor: CpuExecutor) -> None:
    prompt = _prompt(5, 10)
    run(executor, row(0, 0, prompt))
    executor.copy_prefix(0, 3, 8)
    copied = run(executor, row(3, 8, prompt[8:]))
    _same(copied, run(executor, row(1, 0, prompt)))


def test_feedback_is_the_token_that_was_sampled(executor: CpuExecutor) -> None:
    prompt, greedy = _prompt(6, 5), SamplingParams(temperature=0)
    executor.bind(0, greedy, np.array(prompt, np.int32))
    executor.bind(1, greedy, np.array(prompt, np.int32))
    first = executor.collect(
        executor.submit(Step([row(0, 0, prompt, Want.TOKEN), row(1, 0, prompt, Want.TOKEN)]))
    )
    fed_back = Row(0, len(prompt), FEEDBACK, Want.LOGITS)
    explicit = row(1, len(prompt), [int(first.token[1])])
    logits = run(executor, fed_back, explicit)
    _same(logits[:1], logits[1:])


def test_a_mask_reaches_its_row(executor: CpuExecutor) -> None:
    """Rows are computed in another order than they are given, so masks must follow them."""
    words = -(-TIED.vocab // 32)
    mask = np.zeros((2, words), np.uint32)
    mask[0, 1] = 1 << 3
    mask[1, 2] = 1 << 5
    rows = [row(2, 0, [1, 2, 3], Want.TOKEN), row(1, 0, [1], Want.TOKEN)]
    assert executor.collect(executor.submit(Step(rows, mask))).token.tolist() == [35, 69]


def test_a_mask_that_allows_nothing_costs_only_its_row(executor: CpuExecutor) -> None:
    mask = np.zeros((2, -(-TIED.vocab // 32)), np.uint32)
    mask[1, 2] = 1 << 5
    rows = [row(2, 0, [1, 2, 3], Want.TOKEN), row(1, 0, [1], Want.TOKEN)]
    assert executor.collect(executor.submit(Step(rows, mask))).token.tolist() == [NO_TOKEN, 69]


class _Model:
    """What each slot was fed, and what a slot's next logits are: from a decoder without any cache."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._logits = functools.cache(lambda tokens: reference_logits(checkpoint, tokens)[-1])
        self.fed: list[list[int]] = [[] for _ in range(SLOTS)]

    def logits(self, slot: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self._logits(tuple(self.fed[slot]))
        return found


Token = st.integers(0, TIED.vocab - 1)
RowPlan = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 3), st.lists(Token, min_size=1, max_size=6))
Operation = st.one_of(
    st.lists(RowPlan, min_size=1, max_size=SLOTS, unique_by=lambda plan: plan[0]),
    st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1), st.integers(0, 20)),
)


@pytest.mark.parametrize("executor", ["fp32"], indirect=True)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(Operation, min_size=1, max_size=8))
def test_any_sequence_of_steps_and_copies_gives_the_reference_logits(
    executor: CpuExecutor, checkpoint: Checkpoint, operations: list[list[tuple[int, int, list[int]]]]
) -> None:
    """Rows of any length, mixed; prefixes cut short and extended; slots copied: against float64."""
    model = _Model(checkpoint)
    for operation in operations:
        if isinstance(operation, tuple):
            source, target, length = operation
            length = min(length, len(model.fed[source]))
            executor.copy_prefix(source, target, length)
            model.fed[target] = model.fed[source][:length]
            continue
        rows = []
        for slot, dropped, tokens in operation:
            kept = model.fed[slot][: max(0, len(model.fed[slot]) - dropped)]
            taken = tokens[: MAX_SEQ_LEN - len(kept)]
            if not taken:
                kept, taken = [], tokens
            model.fed[slot] = [*kept, *taken]
            rows.append(row(slot, len(kept), taken))
        logits = run(executor, *rows)
        for (slot, _, _), got in zip(operation, logits, strict=True):
            expected = model.logits(slot)
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_memory_stays_after_loading(executor: CpuExecutor) -> None:
    """Steps of every shape, many of them: what they allocate they give back."""
    process = psutil.Process()
    chance = np.random.default_rng(0)

    def work(steps: int) -> None:
        for _ in range(steps):
            count = int(chance.integers(1, SLOTS + 1))
            slots = chance.choice(SLOTS, count, replace=False)
            run(executor, *(row(int(slot), 0, _prompt(0, int(chance.integers(1, 9)))) for slot in slots))

    work(50)
    before = process.memory_info().rss
    work(300)
    assert process.memory_info().rss - before < 2 << 20


def test_load_reports_what_it_took(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tiny_executor(checkpoint, tmp_path, compute="int8", slots=SLOTS).close()
    executor = CpuExecutor(
        tmp_path, checkpoint.spec, max_batch_size=SLOTS, max_seq_len=MAX_SEQ_LEN, max_num_tokens=8, threads=1
    )
    parts: list[str] = []
    report = executor.load(lambda part, done: parts.append(part))
    assert set(report.lines) == {"weights", "kv_cache", "sampling", "activations"}
    assert parts[-1] == "ready"
    assert executor.info.kv_bytes_per_token == 2 * 2 * 1 * 64 * 4
    executor.close()
    executor.close()


@pytest.mark.parametrize(
    ("rows", "bug"),
    [
        ([], "without rows"),
        ([row(0, 0, [1]), row(0, 1, [1])], "twice"),
        ([row(SLOTS, 0, [1])], "slot 4 of 4"),
        ([row(0, 1, [1])], "holds 0 tokens, not 1"),
        ([row(0, 0, list(range(33)))], "33 tokens in a step"),
        ([row(0, 0, [TIED.vocab])], "fed ids"),
        ([row(0, 0, [3, -1])], "fed ids"),
        ([row(0, 0, [])], "cannot take 0"),
    ],
)
def test_a_step_that_breaks_the_contract_is_a_bug(
    checkpoint: Checkpoint, tmp_path: Path, rows: list[Row], bug: str
) -> None:
    executor = tiny_executor(checkpoint, tmp_path, compute="int8", slots=SLOTS)
    with pytest.raises(AssertionError, match=bug):
        executor.submit(Step(rows))
    executor.close()


def test_a_full_slot_takes_no_more(executor: CpuExecutor) -> None:
    run(executor, row(0, 0, _prompt(0, 32)))
    run(executor, row(0, 32, _prompt(0, MAX_SEQ_LEN - 32)))
    with pytest.raises(AssertionError, match="cannot take 1 more"):
        executor.submit(Step([row(0, MAX_SEQ_LEN, [1])]))


@pytest.mark.parametrize("damage", ["missing model", "missing data", "garbage", "truncated"])
def test_a_damaged_engine_is_a_fault_that_says_so(
    checkpoint: Checkpoint, tmp_path: Path, damage: str
) -> None:
    tiny_executor(checkpoint, tmp_path, compute="int8").close()
    model, data = tmp_path / cpu.MODEL_FILE, tmp_path / f"{cpu.MODEL_FILE}.data"
    if damage == "missing model":
        model.unlink()
    elif damage == "missing data":
        data.unlink()
    elif damage == "garbage":
        model.write_bytes(b"\x00garbage" * 100)
    else:
        model.write_bytes(model.read_bytes()[:1000])
    executor = CpuExecutor(
        tmp_path, checkpoint.spec, max_batch_size=1, max_seq_len=MAX_SEQ_LEN, max_num_tokens=8, threads=1
    )
    with pytest.raises(ExecutorFault, match="could not load the model"):
        executor.load(lambda part, done: None)


def test_a_failing_run_is_a_fault(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of a type that the graph does not take, and no check before: ONNX Runtime refuses to run."""
    executor = _half_precision_on_a_float_engine(checkpoint, tmp_path)
    monkeypatch.setattr(executor, "_require_kv_dtype", lambda session: None)
    with pytest.raises(ExecutorFault, match="could not run a step"):
        executor.load(lambda part, done: None)


def test_a_cache_of_another_kind_than_built_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    executor = _half_precision_on_a_float_engine(checkpoint, tmp_path)
    with pytest.raises(
        ExecutorFault, match=r"built for KV caches of tensor\(float\), not of tensor\(float16\)"
    ):
        executor.load(lambda part, done: None)


@pytest.mark.parametrize("longest", [2, 3, 8, 128])
def test_pieces_cover_a_prompt_and_leave_no_token_alone(longest: int) -> None:
    for count in range(1, 3 * longest + 3):
        pieces = list(cpu._pieces(count, longest))
        assert [token for start, end in pieces for token in range(start, end)] == list(range(count))
        sizes = [end - start for start, end in pieces]
        assert max(sizes) <= longest
        assert count == 1 or longest == 2 or min(sizes) >= 2


def _half_precision_on_a_float_engine(checkpoint: Checkpoint, directory: Path) -> CpuExecutor:
    tiny_executor(checkpoint, directory, compute="int8").close()
    return CpuExecutor(
        directory,
        checkpoint.spec,
        max_batch_size=1,
        max_seq_len=MAX_SEQ_LEN,
        max_num_tokens=8,
        threads=1,
        kv_cache="fp16",
    )

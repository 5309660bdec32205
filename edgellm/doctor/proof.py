"""Whether an executor computes the model: its logits beside another executor's, case by case.

What only a board can show, in one table. The reference is what the CPU executor says of the same texts, best
of an engine built with `--compute fp32`. KL is KL(reference ‖ tested) of a position in nats.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgellm import __version__
from edgellm.doctor.reference import LogProbs, Reference, Tokens, log_softmax
from edgellm.executor.base import FEEDBACK, Executor, ExecutorInfo, Row, Step, Want
from edgellm.sampling import SamplingParams

MAX_MEAN_KL: Final = 0.005
"""Of the positions of a case: what rounding activations to 16 bits costs stays well below."""
MAX_MEAN_KL_CPU: Final = 0.05
"""The CPU executor rounds them to 8: SmolLM2 has 0.003 over a long text, and up to 0.037 at single places,
which some cases are."""
CLOSE: Final = 0.5
"""Nats between the reference's two best tokens, up to which rounding may swap them."""

Logits = NDArray[np.float32]
Rows = Sequence[tuple[int, int, Sequence[int]]]
"""(slot, past, tokens) of each row of a step."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way of computing the same thing.

    Attributes:
        name: what was done.
        positions: compared.
        mean_kl, max_kl: over them.
        agreeing: positions with the same most likely token.
        flipped: positions where it differs although the reference is sure.
        most: that the mean may be.
    """

    name: str
    positions: int
    mean_kl: float
    max_kl: float
    agreeing: int
    flipped: int
    most: float = MAX_MEAN_KL

    @property
    def passed(self) -> bool:
        """Whether the executor computes the model in this case; NaN never does."""
        return self.mean_kl <= self.most and self.flipped == 0


def prove(tested: Executor, reference: Reference) -> Iterator[Case]:
    """Compare a loaded executor with a reference of 8 tokens or more; the caller closes it.

    Of the texts as many and as much is used as it has slots for; a slot holds the text of its number.
    """
    most = MAX_MEAN_KL_CPU if tested.info.name == "cpu" else MAX_MEAN_KL
    slots = min(tested.info.max_batch_size, len(reference.texts))
    texts = [text[: tested.info.max_seq_len - 1].tolist() for text in reference.texts[:slots]]
    for slot in range(slots):
        tested.bind(slot, SamplingParams(temperature=0.0), np.empty(0, np.int32))

    def compare(name: str, steps: Sequence[Rows], *, texts_of: Sequence[int] = range(slots)) -> Case:
        got = np.concatenate([_run(tested, rows) for rows in steps])
        expected = [
            reference.at(texts_of[slot], past + len(tokens) - 1)
            for rows in steps
            for slot, past, tokens in rows
        ]
        return replace(_case(name, got, np.stack(expected)), most=most)

    yield compare("token by token", [[(0, n, [token])] for n, token in enumerate(texts[0])])
    whole = tested.info.max_num_tokens
    yield compare("whole prompts", [[(slot, 0, text[:whole])] for slot, text in enumerate(texts)])
    for size in sorted({min(size, whole) for size in (3, 16, 64)}):
        pieces = [(at, texts[-1][at : at + size]) for at in range(0, len(texts[-1]), size)]
        yield compare(f"in chunks of {size}", [[(slots - 1, at, piece)] for at, piece in pieces])
    if slots > 1:
        yield compare("ragged batches", list(_ragged(texts[:slots], whole)))
        yield compare("mixed with a prompt", [_mixed(texts[:slots], whole)])
        # A prefix that one slot computed and another continues.
        shared = min(len(texts[0]) // 2, whole)
        _run(tested, [(0, 0, texts[0][:shared])])
        tested.copy_prefix(0, 1, shared)
        behind = [(1, shared, texts[0][shared : shared + 4])]
        yield compare("behind a copied prefix", [behind], texts_of=[0, 0])
    yield _fed_back(tested, texts[0], whole)


def sample_texts(executor: Executor, *, count: int, length: int, seed: int) -> list[Tokens]:
    """Texts that the model itself writes behind a token drawn at random: int32 [length] each."""
    chance = np.random.default_rng(seed)
    length = min(length, executor.info.max_seq_len - 1)
    texts = []
    for _ in range(count):
        text = [int(chance.integers(executor.info.vocab_size))]
        sampling = SamplingParams(temperature=1.0, seed=int(chance.integers(1 << 62)))
        executor.bind(0, sampling, np.array(text, np.int32))
        while len(text) < length:
            row = Row(0, len(text) - 1, np.array(text[-1:], np.int32), Want.TOKEN)
            text.append(int(executor.collect(executor.submit(Step([row]))).token[0]))
        texts.append(np.array(text, np.int32))
    return texts


def heading(info: ExecutorInfo, model: str, seed: int, *, device: str = "") -> str:
    """What stands above the rows, so that all can be pasted into an issue as it is.

    Args:
        device: what it runs on, where that is no CPU.
    """
    on = f" on {device}" if device else ""
    return "\n".join(
        [
            f"{model}, executor {info.name}{on}, {info.max_batch_size} slots of {info.max_seq_len} tokens, "
            f"seed {seed}, {platform.machine()}, Python {platform.python_version()}, edgellm {__version__}",
            "",
            "| case | positions | mean KL | largest KL | same best token | surely another | |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
    )


def row(case: Case) -> str:
    """A case's line of the table."""
    return (
        f"| {case.name} | {case.positions} | {case.mean_kl:.5f} | {case.max_kl:.5f} | {case.agreeing} | "
        f"{case.flipped} | {'passed' if case.passed else 'FAILED'} |"
    )


def _ragged(texts: Sequence[list[int]], whole: int) -> Iterator[Rows]:
    """Prompts of different lengths, then decode steps of all of them together."""
    steps = 4
    lengths = [max(1, min(len(text) - steps, whole) * (i + 1) // len(texts)) for i, text in enumerate(texts)]
    for slot, text in enumerate(texts):
        yield [(slot, 0, text[: lengths[slot]])]
    for step in range(steps):
        past = [length + step for length in lengths]
        # The order of rows is free: slots need not come sorted.
        yield [(slot, past[slot], [texts[slot][past[slot]]]) for slot in reversed(range(len(texts)))]


def _mixed(texts: Sequence[list[int]], whole: int) -> Rows:
    """A step that decodes some slots (as `_ragged` left them) and takes a prompt into another one."""
    room = whole - (len(texts) - 1)
    decoding = [(slot, 1, [text[1]]) for slot, text in enumerate(texts[:-1])]
    return [*decoding, (len(texts) - 1, 0, texts[-1][: max(1, room)])]


def _fed_back(tested: Executor, text: list[int], whole: int) -> Case:
    """Greedy tokens that the executor feeds to itself, against its own when each is fed by hand."""
    count, room = 8, tested.info.max_seq_len
    start = text[: max(1, min(len(text), whole, room - count))]
    by_hand: list[Logits] = []
    fed: list[Logits] = []
    for logits in (by_hand, fed):
        tested.bind(0, SamplingParams(temperature=0.0), np.array(start, np.int32))
        ticket = tested.submit(Step([Row(0, 0, np.array(start, np.int32), Want.LOGITS)]))
        for step in range(count - 1):
            result = tested.collect(ticket)
            assert result.logits is not None
            logits.append(result.logits)
            next_token = FEEDBACK if logits is fed else result.token.astype(np.int32)
            ticket = tested.submit(Step([Row(0, len(start) + step, next_token, Want.LOGITS)]))
        last = tested.collect(ticket).logits
        assert last is not None
        logits.append(last)
    return _case("fed back on the device", np.concatenate(fed), np.concatenate(by_hand))


def _run(executor: Executor, rows: Rows) -> Logits:
    """Logits [rows, vocab] of a step."""
    step = Step([Row(slot, past, np.array(tokens, np.int32), Want.LOGITS) for slot, past, tokens in rows])
    logits = executor.collect(executor.submit(step)).logits
    assert logits is not None
    own: Logits = logits.copy()
    return own


def _case(name: str, got: Logits, expected: LogProbs | Logits) -> Case:
    """Of rows [n, vocab] each; logs of probabilities are logits like any others."""
    p, q = (log_softmax(logits) for logits in (expected, got))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    agreeing = got.argmax(axis=-1) == expected.argmax(axis=-1)
    best = np.sort(p, axis=-1)[:, -2:]
    sure = best[:, 1] - best[:, 0] > CLOSE
    flipped = int((~agreeing & sure).sum())
    return Case(name, len(got), float(kl.mean()), float(kl.max()), int(agreeing.sum()), flipped)

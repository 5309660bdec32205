"""The executor contract: what the scheduler may ask of whatever runs the model.

Who owns what:
    the scheduler owns slots and lengths, and says in every row how many tokens the slot holds (`past`);
    the executor owns the KV memory, the map from slot to physical row, and the slots' sampling state.

A step is a list of rows. A row feeds `tokens` into `slot` after its first `past` tokens, and wants nothing
(a prefill chunk that is not the last), a sampled token, or the logits. Rows may be of any length, mixed; each
slot appears at most once. `past` may be smaller than what the slot holds: what lies beyond is overwritten.
While steps are open, `bind` and `copy_prefix` never aim at a slot that has a row in one of them, and a prefix
is only copied from what collected steps have written; copies come before binds, and both before the step.
Sampling depends on (logits, SamplingParams, index of the token) alone, never on batch or order.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm.sampling import SamplingParams

Progress = Callable[[str, float], None]
"""Called with the name of what is being done and the fraction done, 0…1."""


class Want(enum.IntEnum):
    """What a row wants back of its last position."""

    NONE = 0
    TOKEN = 1
    LOGITS = 2


class Feedback:
    """Stands for the token that the executor sampled last for the slot; one token long."""

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "FEEDBACK"


FEEDBACK: Final = Feedback()

NO_TOKEN: Final = -1
"""Where a result has no token: what the request allows at this place is nothing at all."""


@dataclass(frozen=True, slots=True)
class Row:
    """One slot's part in a step.

    Attributes:
        slot: 0…max_batch_size − 1.
        past: tokens that the slot keeps in front of these.
        tokens: int32 [n], n ≥ 1, or FEEDBACK.
        want: what to return for the last of them.
    """

    slot: int
    past: int
    tokens: NDArray[np.int32] | Feedback
    want: Want


@dataclass(frozen=True, slots=True)
class Step:
    """Rows to advance together.

    Attributes:
        rows: at least one; each slot at most once; at most max_num_tokens tokens in all.
        mask: uint32 [R, ceil(vocab / 32)] or None, R being the rows that want something, in order: bit
            `id % 32` of word `id // 32` says whether token `id` may be chosen (llguidance's layout).
    """

    rows: Sequence[Row]
    mask: NDArray[np.uint32] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a step gave; R counts the rows that wanted something, in the step's order.

    Attributes:
        token: int32 [R], the sampled token, also where LOGITS was wanted. NO_TOKEN ends its request: the
            slot's sampling state is as it was, and a step that feeds it back, which may be on its way,
            computes what nobody looks at.
        logprob: float32 [R], natural log of the token's probability under the model's own distribution
            (before temperature, penalties and truncation); NaN where the slot's params do not ask for it.
        top_ids, top_logprobs: [R, K] int32 and float32, most likely first, K the largest top_logprobs asked
            for in this step; a row that asked for fewer is filled with −1 and NaN.
        logits: float32 [R, vocab], or None if no row wanted LOGITS (rows that did not want them are zero).
    """

    token: NDArray[np.int32]
    logprob: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """The fixed shape of an executor.

    Attributes:
        name: `cpu`, `cuda` or `tensorrt`.
        max_batch_size: slots, each with KV memory for max_seq_len tokens.
        max_seq_len: tokens a slot holds, prompt and answer together.
        max_num_tokens: tokens one step may feed, all rows together.
        vocab_size: width of a row of logits.
        kv_bytes_per_token: bytes that one token takes in all layers' caches.
        pipeline_depth: steps that may be submitted and not yet collected; with more than 1 a row may feed
            back a token that the host has not seen yet.
        smallest_chunk: a prompt gives the same logits however it is cut, as long as no piece is shorter. Some
            kernels for a single token round differently from those for several.
    """

    name: str
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    vocab_size: int
    kv_bytes_per_token: int
    pipeline_depth: int = 1
    smallest_chunk: int = 1


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that loading took, a line per part: what the memory plan is compared with."""

    lines: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all lines, in bytes."""
        return sum(self.lines.values())


Ticket = int
"""Names a submitted step; tickets are collected in the order they were given."""


class Executor(Protocol):
    """Runs a model. One thread uses it; every failure of the device or library is an `ExecutorFault`."""

    @property
    def info(self) -> ExecutorInfo:
        """The fixed shape; known before `load`."""
        ...

    def load(self, progress: Progress) -> MemoryReport:
        """Allocate everything and warm every shape: nothing is allocated by a step afterwards."""
        ...

    def bind(self, slot: int, sampling: SamplingParams, history: NDArray[np.int32]) -> None:
        """Give the slot to a new request.

        `history` int32 [n] are the prompt's tokens (for the repetition penalty). The index of the next
        sampled token is 0 again. What the slot's KV memory holds is left as it is.
        """
        ...

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the KV of the first `length` tokens from one slot to another."""
        ...

    def submit(self, step: Step) -> Ticket:
        """Start a step; at most `pipeline_depth` may be open."""
        ...

    def collect(self, ticket: Ticket) -> Result:
        """Wait for a step's result."""
        ...

    def close(self) -> None:
        """Give everything back; idempotent."""
        ...


def check_step(step: Step, info: ExecutorInfo, held: Callable[[int], int]) -> None:
    """Assert that a step keeps to the contract, as the scheduler does; no client's word gets here unchecked.

    Args:
        held: slot → tokens that it holds.
    """
    assert step.rows, "a step without rows"
    assert len({row.slot for row in step.rows}) == len(step.rows), "a slot appears twice in a step"
    total = sum(len(row.tokens) for row in step.rows)
    assert total <= info.max_num_tokens, f"{total} tokens in a step; max_num_tokens is {info.max_num_tokens}"
    for row in step.rows:
        assert 0 <= row.slot < info.max_batch_size, f"slot {row.slot} of {info.max_batch_size}"
        there = held(row.slot)
        assert 0 <= row.past <= there, f"slot {row.slot} holds {there} tokens, not {row.past}"
        count = len(row.tokens)
        assert 0 < count <= info.max_seq_len - row.past, f"slot {row.slot} cannot take {count} more tokens"
        if not isinstance(row.tokens, Feedback):
            low, high = int(row.tokens.min()), int(row.tokens.max())
            assert low >= 0 and high < info.vocab_size, f"slot {row.slot} is fed ids {low} … {high}"

"""An executor without a model, which holds its caller to the contract.

A slot's "KV" is the list of token ids that were fed into it, and the next token is a hash of that whole list:
one wrong `past`, prefix, copy or bind, and the text differs from `expected_tokens`, which knows of no slots.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import ExecutorFault
from edgellm.executor.base import (
    NO_TOKEN,
    ExecutorInfo,
    Feedback,
    MemoryReport,
    Progress,
    Result,
    Row,
    Step,
    Ticket,
    Want,
)
from edgellm.sampling import SamplingParams


def next_token(history: Sequence[int], sampling: SamplingParams, index: int, vocab_size: int) -> int:
    """The token after `history`: a hash of it, of the seed, and of the token's index."""
    data = np.array([*history, sampling.seed & 0x7FFFFFFF, index], np.int32).tobytes()
    return zlib.crc32(data) % vocab_size


def expected_tokens(
    prompt: Sequence[int], sampling: SamplingParams, count: int, vocab_size: int
) -> list[int]:
    """The first `count` tokens of an answer that nothing ends, one after the other."""
    history = list(prompt)
    for index in range(count):
        history.append(next_token(history, sampling, index, vocab_size))
    return history[len(prompt) :]


@dataclass
class _FakeSlot:
    """A slot: `kv` as of the steps submitted, `collected` of its tokens as of those collected."""

    kv: list[int] = field(default_factory=list)
    collected: int = 0
    sampling: SamplingParams | None = None
    index: int = 0
    last: int | None = None


@dataclass
class _Open:
    ticket: Ticket
    step: Step
    result: Result


class FakeExecutor:
    """Implements `edgellm.executor.base.Executor`; every breach of the contract is an AssertionError.

    Args:
        fault_at: the ticket whose collection raises ExecutorFault, counted from 1.
        delay_s: how long collecting takes.
        dead_ends: seed → the index of its answer at which nothing may be chosen.
    """

    def __init__(
        self,
        *,
        slots: int = 4,
        max_seq_len: int = 96,
        max_num_tokens: int = 24,
        vocab_size: int = 97,
        pipeline_depth: int = 1,
        smallest_chunk: int = 1,
        fault_at: int | None = None,
        delay_s: float = 0.0,
        dead_ends: Mapping[int, int] | None = None,
    ) -> None:
        self._info = ExecutorInfo(
            "fake", slots, max_seq_len, max_num_tokens, vocab_size, 4, pipeline_depth, smallest_chunk
        )
        self._slots = [_FakeSlot() for _ in range(slots)]
        self._open: deque[_Open] = deque()
        self._tickets = 0
        self._fault_at = fault_at
        self._delay_s = delay_s
        self._dead_ends = dead_ends or {}
        self.closed = False
        self.copies = 0
        self.fed_tokens = 0

    @property
    def info(self) -> ExecutorInfo:
        return self._info

    def load(self, progress: Progress) -> MemoryReport:
        progress("loading", 1.0)
        return MemoryReport({"kv cache": self._info.max_batch_size * self._info.max_seq_len * 4})

    def bind(self, slot: int, sampling: SamplingParams, history: NDArray[np.int32]) -> None:
        assert not self._is_open(slot), f"slot {slot} is bound while a step has a row of it"
        assert history.dtype == np.int32
        state = self._slots[slot]
        state.sampling = sampling
        state.index = 0
        state.last = None

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        assert source != target
        assert length > 0
        assert not self._is_open(target), f"slot {target} is copied into while a step has a row of it"
        assert length <= self._slots[source].collected, "copied more than collected steps have written"
        self._slots[target].kv = self._slots[source].kv[:length]
        self._slots[target].collected = length
        self.copies += 1

    def submit(self, step: Step) -> Ticket:
        info = self._info
        slots = [row.slot for row in step.rows]
        assert not self.closed
        assert len(self._open) < info.pipeline_depth, "more steps are open than the pipeline is deep"
        assert len(step.rows) >= 1
        assert len(set(slots)) == len(slots), "a slot has two rows"
        assert all(0 <= slot < info.max_batch_size for slot in slots)
        fed = sum(len(row.tokens) for row in step.rows)
        assert 1 <= fed <= info.max_num_tokens, f"{fed} tokens in a step"
        self.fed_tokens += fed
        for row in step.rows:
            self._write(row)
        self._tickets += 1
        self._open.append(_Open(self._tickets, step, self._sample(step)))
        return self._tickets

    def collect(self, ticket: Ticket) -> Result:
        opened = self._open.popleft()
        assert opened.ticket == ticket, "tickets are collected in order"
        time.sleep(self._delay_s)
        if ticket == self._fault_at:
            raise ExecutorFault("a fault that was asked for")
        for row in opened.step.rows:
            self._slots[row.slot].collected = row.past + len(row.tokens)
        return opened.result

    def close(self) -> None:
        self.closed = True

    def _is_open(self, slot: int) -> bool:
        return any(row.slot == slot for opened in self._open for row in opened.step.rows)

    def _write(self, row: Row) -> None:
        state = self._slots[row.slot]
        assert state.sampling is not None, "a row of a slot that was never bound"
        assert 0 <= row.past <= len(state.kv), f"past {row.past}, but the slot holds {len(state.kv)}"
        if isinstance(row.tokens, Feedback):
            assert state.last is not None, "FEEDBACK before anything was sampled"
            tokens = [state.last]
        else:
            assert row.tokens.dtype == np.int32
            tokens = row.tokens.tolist()
        assert tokens
        state.kv[row.past :] = tokens
        state.collected = min(state.collected, row.past)
        assert len(state.kv) <= self._info.max_seq_len, "the slot overflows"

    def _sample(self, step: Step) -> Result:
        vocab = self._info.vocab_size
        rows = [row for row in step.rows if row.want is not Want.NONE]
        states = [self._slots[row.slot] for row in rows]
        samplings = [state.sampling for state in states if state.sampling is not None]
        wanted = max((each.top_logprobs for each in samplings if each.logprobs), default=0)
        token = np.zeros(len(rows), np.int32)
        logprob = np.full(len(rows), np.nan, np.float32)
        top_ids = np.full((len(rows), wanted), -1, np.int32)
        top_logprobs = np.full((len(rows), wanted), np.nan, np.float32)
        logits = np.zeros((len(rows), vocab), np.float32)
        for i, (row, state, sampling) in enumerate(zip(rows, states, samplings, strict=True)):
            state.last = next_token(state.kv, sampling, state.index, vocab)
            if self._dead_ends.get(sampling.seed) == state.index:
                token[i] = NO_TOKEN
                continue
            state.index += 1
            token[i] = state.last
            if row.want is Want.LOGITS:
                logits[i, state.last] = 1.0
            if sampling.logprobs:
                logprob[i] = -state.last
                count = sampling.top_logprobs
                top_ids[i, :count] = (state.last + np.arange(count)) % vocab
                top_logprobs[i, :count] = -top_ids[i, :count]
        some = any(row.want is Want.LOGITS for row in rows)
        return Result(token, logprob, top_ids, top_logprobs, logits if some else None)

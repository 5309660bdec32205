"""Continuous batching: which request advances in which step. docs/scheduler.md tells a request's life.

The engine thread calls, between steps: add and stop as requests come and go, expire, schedule → the executor
→ commit. Nothing here waits, and nothing here touches a device or a socket.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import ConfigError, Overloaded, TooLong
from edgellm.executor.base import FEEDBACK, NO_TOKEN, ExecutorInfo, Result, Row, Step, Want
from edgellm.sampling import SamplingParams
from edgellm.scheduler.request import Finish, Priority, Request, Update
from edgellm.scheduler.sequence import Sequence
from edgellm.scheduler.slots import Slots

BUDGET_FLOOR = 16
"""Prompt tokens that a step may always feed, whatever `token_budget` says: a prompt never stands still."""

_RETRY_UNKNOWN_MS = 1000
_RETRY_MIN_MS = 50
_RETRY_MAX_MS = 60_000


def check_length(prompt_tokens: int, max_tokens: int, max_seq_len: int) -> None:
    """Refuse a request that could outgrow its slot.

    Raises:
        TooLong: the message names what would fit.
    """
    if prompt_tokens >= max_seq_len:
        raise TooLong(
            f"the prompt has {prompt_tokens} tokens; a slot holds {max_seq_len}, so at most "
            f"{max_seq_len - 1} leave room for an answer",
            field="prompt",
        )
    if prompt_tokens + max_tokens > max_seq_len:
        raise TooLong(
            f"{max_tokens} tokens do not fit after a prompt of {prompt_tokens}; a slot holds {max_seq_len}, "
            f"so max_tokens can be at most {max_seq_len - prompt_tokens}",
            field="max_tokens",
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What the executor is to do next, in this order: copies, binds, step.

    Attributes:
        number: plans are numbered from 1 and committed in order.
        copies: (source slot, target slot, tokens), for `Executor.copy_prefix`.
        binds: (slot, sampling, history), for `Executor.bind`.
        step: for `Executor.submit`.
        sequences: whose each row of the step is.
    """

    number: int
    copies: list[tuple[int, int, int]]
    binds: list[tuple[int, SamplingParams, NDArray[np.int32]]]
    step: Step
    sequences: list[Sequence]


class Scheduler:
    """Decides; owns the queue, the slots and their lengths.

    Every request that `add` takes gets exactly one Update with `finish`, from commit, expire or fail_all.

    Args:
        info: the executor's shape.
        max_queue: requests that may wait beside those that hold a slot.

    Raises:
        ConfigError: a step cannot hold one token of every slot.
    """

    def __init__(self, info: ExecutorInfo, *, max_queue: int) -> None:
        if info.max_num_tokens < info.max_batch_size:
            raise ConfigError(
                f"max_num_tokens {info.max_num_tokens} is less than max_batch_size {info.max_batch_size}: "
                "a step must hold a token of every slot"
            )
        self._info = info
        self._max_queue = max_queue
        self._slots = Slots(info.max_batch_size, info.max_seq_len, info.smallest_chunk)
        self._batch_cap = info.max_batch_size
        self._live: dict[int, Sequence] = {}
        self._queue: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # holding a slot; by priority, then in order of admission
        self._ended: list[Sequence] = []  # to be reported by the next expire
        self._next_deadline: float | None = None
        self._added = 0
        self._scheduled = 0
        self._committed = 0
        self._mean_service_s: float | None = None
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0

    @property
    def batch_cap(self) -> int:
        """Rows that may advance together, 0…max_batch_size. Rows above it pause in place, and resume."""
        return self._batch_cap

    @batch_cap.setter
    def batch_cap(self, cap: int) -> None:
        self._batch_cap = max(0, min(cap, self._info.max_batch_size))

    @property
    def running(self) -> int:
        """Requests that hold a slot, the paused ones among them."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing to report."""
        return not self._live and not self._ended and self._scheduled == self._committed

    @property
    def next_deadline(self) -> float | None:
        """Clock reading before which no deadline passes; None without deadlines."""
        return self._next_deadline

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests that were admitted to a slot, since the start."""
        return self._prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Those of them that were found in a slot and not computed again."""
        return self._cached_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens that were generated and reported."""
        return self._completion_tokens

    def add(self, request: Request, now: float) -> None:
        """Queue a request.

        Raises:
            TooLong: prompt and max_tokens together outgrow a slot.
            Overloaded: the queue is full.
        """
        assert request.key not in self._live, "keys of live requests are unique"
        assert len(request.prompt) > 0
        assert request.max_tokens > 0
        check_length(len(request.prompt), request.max_tokens, self._info.max_seq_len)
        if len(self._live) >= self._info.max_batch_size + self._max_queue:
            raise Overloaded(
                f"{self.running} requests run and {self.queued} wait, which is all that may",
                retry_after_ms=self._retry_after_ms(now),
            )
        self._added += 1
        sequence = Sequence(request, self._added)
        self._live[request.key] = sequence
        bisect.insort(self._queue, sequence, key=lambda other: other.rank)
        if request.deadline is not None:
            earlier = self._next_deadline
            self._next_deadline = request.deadline if earlier is None else min(earlier, request.deadline)

    def stop(self, key: int, finish: Finish) -> None:
        """End a request now: nothing of it is scheduled or reported any more but its end, by `expire`.

        A key that is not known is ignored: the request may just have ended by itself.
        """
        sequence = self._live.get(key)
        if sequence is not None:
            self._end(sequence, finish, None)
            self._ended.append(sequence)

    def expire(self, now: float) -> list[Update]:
        """Ends that need no step: deadlines that have passed, and stopped requests."""
        if self._next_deadline is not None and now >= self._next_deadline:
            for sequence in [live for live in self._live.values() if live.expired(now)]:
                self._end(sequence, Finish.DEADLINE, now)
                self._ended.append(sequence)
            deadlines = [live.request.deadline for live in self._live.values()]
            self._next_deadline = min((each for each in deadlines if each is not None), default=None)
        if not self._ended:
            return []
        updates = [sequence.update([], now) for sequence in self._ended]
        self._ended.clear()
        return updates

    def schedule(self, now: float, *, token_budget: int | None = None) -> Plan | None:
        """Compose the next step, or None if nothing can advance.

        Rows that decode come first, then prompts in order of priority and admission, as far as the budget
        goes. It may be called again before the last plan's commit, up to the executor's pipeline_depth.

        Args:
            token_budget: tokens that the step should feed at most; None: max_num_tokens. Every row that
                decodes is fed anyway, and BUDGET_FLOOR tokens of a prompt.
        """
        assert self._scheduled - self._committed < self._info.pipeline_depth, "commit first"
        number = self._scheduled + 1
        rows: list[Row] = []
        sequences: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._active():
            slot = sequence.slot
            if slot is None or slot.computed < sequence.prompt_length:
                prefills.append(sequence)
            elif sequence.sampled < sequence.request.max_tokens:
                rows.append(Row(slot.index, slot.computed, FEEDBACK, Want.TOKEN))
                sequences.append(sequence)
                slot.computed += 1
                slot.last_step = number
                sequence.sampled += 1
        plan = Plan(number, [], [], Step(rows), sequences)  # prompts are still to be added
        if prefills:
            budget = self._info.max_num_tokens - len(rows)
            if token_budget is not None:
                budget = min(budget, max(token_budget - len(rows), BUDGET_FLOOR))
            for sequence in prefills:
                if budget == 0:
                    break
                if sequence.slot is None and not self._admit(sequence, plan, now):
                    continue
                budget -= self._feed(sequence, budget, plan, rows)
        if not rows:
            return None
        self._scheduled = number
        return plan

    def commit(self, plan: Plan, result: Result, now: float) -> list[Update]:
        """Take in what a plan's step gave. Rows of requests that ended meanwhile are dropped."""
        assert plan.number == self._committed + 1, "plans are committed in order"
        self._committed = plan.number
        updates: list[Update] = []
        tokens = result.token.tolist()
        wanted = 0
        for row, sequence in zip(plan.step.rows, plan.sequences, strict=True):
            self._slots[row.slot].resident = row.past + len(row.tokens)
            if row.want is Want.NONE:
                continue
            index = wanted
            wanted += 1
            slot = sequence.slot
            if slot is None:
                continue
            request = sequence.request
            id_ = tokens[index]
            if id_ == NO_TOKEN:
                self._end(sequence, Finish.NOTHING_ALLOWED, now)
                updates.append(sequence.update([], now))
                continue
            slot.append(id_)
            if sequence.completed == 0:
                sequence.first_token = now
            sequence.completed += 1
            token = sequence.token(id_, result, index)
            if id_ in request.stop_ids:
                self._end(sequence, Finish.STOP, now)
            elif sequence.completed == request.max_tokens:
                self._end(sequence, Finish.LENGTH, now)
            updates.append(sequence.update([token], now))
            self._completion_tokens += 1
        return updates

    def fail_all(self, finish: Finish, now: float | None = None) -> list[Update]:
        """End every request, queued or running, and report it together with what `stop` has ended."""
        for sequence in list(self._live.values()):
            self._end(sequence, finish, now)
            self._ended.append(sequence)
        updates = [sequence.update([], now) for sequence in self._ended]
        self._ended.clear()
        self._next_deadline = None
        return updates

    def _active(self) -> list[Sequence]:
        """What may have a row in the next step: the first `batch_cap` of those that run and those that could.

        By priority; within one, those that run come first, in order of admission, and then the queue.
        """
        running, cap = self._running, self._batch_cap
        free = len(self._slots.free(self._committed)) if self._queue else 0
        if not free:
            return running if len(running) <= cap else running[:cap]
        return sorted([*running, *self._queue[:free]], key=_priority)[:cap]

    def _admit(self, sequence: Sequence, plan: Plan, now: float) -> bool:
        """Give the request a slot, unless it is worth waiting for a prefix that is being computed."""
        request = sequence.request
        choice = self._slots.choose(request.prompt, self._slots.free(self._committed))
        if choice is None:
            return False
        self._slots.take(choice, request.prompt)
        if choice.source is not None:
            plan.copies.append((choice.source.index, choice.slot.index, choice.reused))
        plan.binds.append((choice.slot.index, request.sampling, request.prompt))
        self._queue.remove(sequence)
        bisect.insort(self._running, sequence, key=_priority)
        sequence.slot = choice.slot
        sequence.admitted = now
        sequence.cached = choice.reused
        self._prompt_tokens += sequence.prompt_length
        self._cached_tokens += choice.reused
        return True

    def _feed(self, sequence: Sequence, budget: int, plan: Plan, rows: list[Row]) -> int:
        """Add a row with the next of the prompt's tokens, at most `budget`; gives their number."""
        slot = sequence.slot
        assert slot is not None
        past = slot.computed
        end = past + self._chunk(sequence.prompt_length - past, budget)
        last = end == sequence.prompt_length
        want = Want.TOKEN if last else Want.NONE
        rows.append(Row(slot.index, past, sequence.request.prompt[past:end], want))
        plan.sequences.append(sequence)
        slot.computed = end
        slot.last_step = plan.number
        sequence.sampled = int(last)
        return end - past

    def _chunk(self, left: int, budget: int) -> int:
        """How many of `left` tokens to feed, at most `budget`; no piece is too short if that can be."""
        smallest = self._info.smallest_chunk
        count = min(left, budget)
        if 0 < left - count < smallest and left >= 2 * smallest and count >= smallest:
            return left - smallest
        return count

    def _end(self, sequence: Sequence, finish: Finish, now: float | None) -> None:
        """Take a request out of everything; reporting it is the caller's."""
        sequence.finish = finish
        del self._live[sequence.request.key]
        slot = sequence.slot
        if slot is None:
            self._queue.remove(sequence)
            return
        self._running.remove(sequence)
        self._slots.release(slot)
        sequence.slot = None
        if now is not None and sequence.admitted is not None:
            service = now - sequence.admitted
            mean = self._mean_service_s
            self._mean_service_s = service if mean is None else 0.8 * mean + 0.2 * service

    def _retry_after_ms(self, now: float) -> int:
        """When a slot should be free: the mean time in one, less what the oldest request has had of it."""
        admitted = [sequence.admitted for sequence in self._running if sequence.admitted is not None]
        if self._mean_service_s is None or not admitted or self._batch_cap == 0:
            return _RETRY_UNKNOWN_MS
        left = self._mean_service_s - (now - min(admitted))
        return min(max(round(1000 * left), _RETRY_MIN_MS), _RETRY_MAX_MS)


def _priority(sequence: Sequence) -> Priority:
    return sequence.request.priority

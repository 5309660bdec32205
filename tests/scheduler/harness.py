"""Runs a scheduler on the fake executor as the engine thread does, and checks everything that it reports."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from fakes import FakeExecutor, expected_tokens

from edgellm.executor.base import Feedback, Ticket, Want
from edgellm.sampling import SamplingParams
from edgellm.scheduler import Finish, Plan, Priority, Request, Scheduler, Update
from edgellm.scheduler.scheduler import BUDGET_FLOOR


@dataclass
class Record:
    """What is known of a request from outside."""

    request: Request
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    slot: int | None = None
    cached: int = 0
    prompt_fed: int = 0
    sampled: int = 0
    admitted_at: int | None = None
    asked: Finish | None = None
    end: Update | None = None

    @property
    def can_decode(self) -> bool:
        return (
            self.slot is not None
            and self.end is None
            and self.asked is None
            and self.prompt_fed == len(self.request.prompt)
            and self.sampled < self.request.max_tokens
        )


class Harness:
    """A scheduler, its executor, a clock, and a record of every request."""

    def __init__(self, executor: FakeExecutor, *, max_queue: int = 8) -> None:
        self.executor = executor
        self.scheduler = Scheduler(executor.info, max_queue=max_queue)
        self.max_queue = max_queue
        self.now = 0.0
        self.records: dict[int, Record] = {}
        self.open: deque[tuple[Plan, Ticket]] = deque()
        self.plans: list[Plan] = []
        self.last_end_at: float | None = None

    @property
    def live(self) -> list[Record]:
        return [record for record in self.records.values() if record.end is None]

    def add(
        self,
        prompt: list[int],
        *,
        max_tokens: int = 8,
        stop_ids: frozenset[int] = frozenset(),
        priority: Priority = Priority.NORMAL,
        deadline: float | None = None,
        seed: int = 0,
        logprobs: int | None = None,
    ) -> int:
        key = len(self.records)
        sampling = SamplingParams(seed=seed, logprobs=logprobs is not None, top_logprobs=logprobs or 0)
        tokens = np.array(prompt, np.int32)
        request = Request(key, tokens, sampling, max_tokens, stop_ids, priority, deadline, self.now)
        self.scheduler.add(request, self.now)
        vocab = self.executor.info.vocab_size
        self.records[key] = Record(request, expected_tokens(prompt, sampling, max_tokens, vocab))
        return key

    def stop(self, key: int, finish: Finish = Finish.CANCELLED) -> None:
        record = self.records[key]
        if record.end is None and record.asked is None:
            record.asked = finish
        self.scheduler.stop(key, finish)

    def expire(self) -> None:
        self.deliver(self.scheduler.expire(self.now))

    def submit(self, *, token_budget: int | None = None) -> Plan | None:
        """Schedule a step and start it; None if the scheduler has nothing to run."""
        plan = self.scheduler.schedule(self.now, token_budget=token_budget)
        if plan is None:
            return None
        for source, target, length in plan.copies:
            self.executor.copy_prefix(source, target, length)
        for slot, sampling, history in plan.binds:
            self.executor.bind(slot, sampling, history)
        self.open.append((plan, self.executor.submit(plan.step)))
        self.plans.append(plan)
        self._check_plan(plan, token_budget)
        return plan

    def collect(self) -> None:
        """Finish the oldest open step."""
        plan, ticket = self.open.popleft()
        self.deliver(self.scheduler.commit(plan, self.executor.collect(ticket), self.now))

    def step(self, *, token_budget: int | None = None) -> Plan | None:
        """One turn of the engine's loop: fill the pipeline, then finish its oldest step."""
        self.expire()
        first = None
        while len(self.open) < self.executor.info.pipeline_depth:
            plan = self.submit(token_budget=token_budget)
            first = first or plan
            if plan is None:
                break
        if self.open:
            self.collect()
        return first

    def run(self) -> None:
        """Turn until everything has ended; fails if nothing moves."""
        self.expire()
        turns = 4 + 2 * sum(
            len(record.request.prompt) + record.request.max_tokens + 4 for record in self.live
        )
        while self.live or self.open:
            assert turns > 0, "the requests do not end"
            turns -= 1
            waiting = bool(self.open)
            assert self.step() is not None or waiting or not self.live, "there is work, but no plan"
        assert self.scheduler.idle

    def deliver(self, updates: list[Update]) -> None:
        for update in updates:
            record = self.records[update.key]
            assert record.end is None, "an update after the end"
            record.tokens += [token.id for token in update.tokens]
            assert record.tokens == record.expected[: len(record.tokens)], "not what one row alone would say"
            assert update.cached_tokens == record.cached
            for token in update.tokens:
                count = record.request.sampling.top_logprobs
                assert (token.logprob is not None) == record.request.sampling.logprobs
                assert len(token.top) == count
            if update.finish is not None:
                self._check_end(record, update)
            else:
                assert update.tokens, "an update that says nothing"

    def _check_end(self, record: Record, update: Update) -> None:
        record.end = update
        request = record.request
        assert update.timings is not None
        assert (update.timings.admitted is None) == (record.slot is None)
        assert (update.timings.first_token is None) == (not record.tokens)
        if record.asked is not None:
            assert update.finish is record.asked
            assert not update.tokens
        elif update.finish is Finish.STOP:
            assert record.tokens[-1] in request.stop_ids
        elif update.finish is Finish.LENGTH:
            assert len(record.tokens) == request.max_tokens
            assert record.tokens[-1] not in request.stop_ids
        elif update.finish is Finish.DEADLINE:
            assert request.deadline is not None
            assert self.now >= request.deadline
        assert not request.stop_ids.intersection(record.tokens[:-1])

    def _check_plan(self, plan: Plan, token_budget: int | None) -> None:
        info, cap = self.executor.info, self.scheduler.batch_cap
        rows = plan.step.rows
        assert len(rows) <= cap, "more rows than the cap allows"
        assert len(plan.sequences) == len(rows)
        decoding = sum(isinstance(row.tokens, Feedback) for row in rows)
        fed = sum(len(row.tokens) for row in rows)
        assert fed <= info.max_num_tokens
        if token_budget is not None:
            assert fed <= max(token_budget, decoding + BUDGET_FLOOR)
        could = [record for record in self.live if record.can_decode]
        bound = {slot for slot, _, _ in plan.binds}
        assert len(bound) == len(plan.binds)
        scheduled = []
        for row, sequence in zip(rows, plan.sequences, strict=True):
            record = self.records[sequence.request.key]
            scheduled.append(record)
            if row.slot in bound:
                assert record.slot is None, "bound twice"
                record.slot = row.slot
                record.cached = record.prompt_fed = row.past
                record.admitted_at = plan.number
                assert row.past < len(record.request.prompt), "the prompt's last token must be computed"
            assert record.slot == row.slot
            assert record.end is None
            assert record.asked is None, "a row for a request that was stopped"
            if not isinstance(row.tokens, Feedback):
                record.prompt_fed += len(row.tokens)
            record.sampled += row.want is not Want.NONE
            assert record.sampled <= record.request.max_tokens
        holders = [record.slot for record in self.live if record.slot is not None and record.asked is None]
        assert len(set(holders)) == len(holders), "two requests share a slot"
        for record in could:
            if record not in scheduled:  # paused: nothing that runs may be less urgent
                assert all(record.request.priority >= other.request.priority for other in scheduled)

    def check_counters(self) -> None:
        scheduler = self.scheduler
        records = list(self.records.values())
        admitted = [record for record in records if record.slot is not None]
        pending = [record for record in self.live if record.asked is None]
        assert scheduler.running == sum(record.slot is not None for record in pending)
        assert scheduler.queued == sum(record.slot is None for record in pending)
        assert scheduler.running <= self.executor.info.max_batch_size
        assert scheduler.running + scheduler.queued <= self.executor.info.max_batch_size + self.max_queue
        assert scheduler.prompt_tokens == sum(len(record.request.prompt) for record in admitted)
        assert scheduler.cached_tokens == sum(record.cached for record in admitted)
        assert scheduler.completion_tokens == sum(len(record.tokens) for record in records)
        assert scheduler.idle == (not self.live and not self.open)

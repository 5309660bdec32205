"""The engine thread: every request gets its oracle's tokens and one end, whatever happens meanwhile."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from fakes import FakeExecutor, expected_tokens

from edgellm.engine import Engine
from edgellm.sampling import SamplingParams
from edgellm.scheduler.request import Finish, Request, Update
from edgellm.scheduler.scheduler import Scheduler

PATIENCE_S = 10.0
"""How long a test waits for what must happen; far longer than it takes."""


class Inbox:
    """Collects what the engine delivers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.tokens: dict[int, list[int]] = collections.defaultdict(list)
        self.finishes: dict[int, list[Finish]] = collections.defaultdict(list)

    def deliver(self, updates: list[Update]) -> None:
        with self._changed:
            for update in updates:
                self.tokens[update.key] += [token.id for token in update.tokens]
                if update.finish is not None:
                    self.finishes[update.key].append(update.finish)
            self._changed.notify_all()

    def wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(done, PATIENCE_S), "it did not happen"

    def wait_ends(self, count: int) -> None:
        self.wait(lambda: len(self.finishes) == count)


@contextmanager
def running(executor: FakeExecutor, max_queue: int = 64) -> Iterator[tuple[Engine, Inbox]]:
    inbox = Inbox()
    engine = Engine(
        executor,
        Scheduler(executor.info, max_queue=max_queue),
        max_step_s=0.2,
        deliver=inbox.deliver,
    )
    engine.start()
    try:
        yield engine, inbox
    finally:
        assert engine.shut_down(PATIENCE_S)


def request(key: int, *, prompt: int = 5, max_tokens: int = 8, **fields: object) -> Request:
    tokens = np.arange(key, key + prompt, dtype=np.int32)
    return Request(key, tokens, SamplingParams(seed=key), max_tokens, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2])
def test_many_requests_each_get_their_own_tokens_and_one_end(depth: int) -> None:
    executor = FakeExecutor(pipeline_depth=depth)
    requests = [request(key, prompt=1 + key % 30, max_tokens=1 + key % 20) for key in range(40)]
    with running(executor) as (engine, inbox):
        for each in requests:
            engine.submit(each)
        inbox.wait_ends(len(requests))
        stats = engine.snapshot()
    for each in requests:
        oracle = expected_tokens(each.prompt.tolist(), each.sampling, each.max_tokens, 97)
        assert inbox.tokens[each.key] == oracle
        assert inbox.finishes[each.key] == [Finish.LENGTH]
    assert stats.completion_tokens == sum(each.max_tokens for each in requests)
    assert stats.prompt_tokens == sum(len(each.prompt) for each in requests)
    assert (stats.running, stats.queued) == (0, 0)


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_ends_a_running_request_and_frees_its_slot(depth: int) -> None:
    executor = FakeExecutor(slots=1, pipeline_depth=depth, delay_s=0.001)
    with running(executor) as (engine, inbox):
        engine.submit(request(1, max_tokens=90))
        engine.submit(request(2, max_tokens=3))
        inbox.wait(lambda: len(inbox.tokens[1]) >= 2)
        engine.stop(1, Finish.CANCELLED)
        engine.stop(99, Finish.CANCELLED)
        inbox.wait_ends(2)
    assert inbox.finishes == {1: [Finish.CANCELLED], 2: [Finish.LENGTH]}


def test_a_deadline_ends_a_request_that_waits_in_the_queue() -> None:
    executor = FakeExecutor(slots=1, max_seq_len=4096, delay_s=0.001)
    with running(executor) as (engine, inbox):
        engine.submit(request(1, max_tokens=4000))
        engine.submit(request(2, deadline=0.0))
        inbox.wait(lambda: 2 in inbox.finishes)
        assert 1 not in inbox.finishes
    assert inbox.finishes == {2: [Finish.DEADLINE], 1: [Finish.SHUTDOWN]}


@pytest.mark.parametrize("depth", [1, 2])
def test_shutting_down_ends_what_runs_and_what_waits(depth: int) -> None:
    executor = FakeExecutor(slots=1, pipeline_depth=depth, delay_s=0.001)
    with running(executor) as (engine, inbox):
        for key in range(3):
            engine.submit(request(key, max_tokens=80))
        inbox.wait(lambda: bool(inbox.tokens[0]))
    assert inbox.finishes == {key: [Finish.SHUTDOWN] for key in range(3)}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_fault_ends_every_request_and_the_thread(depth: int) -> None:
    executor = FakeExecutor(slots=2, pipeline_depth=depth, fault_at=5)
    with running(executor) as (engine, inbox):
        for key in range(4):
            engine.submit(request(key, max_tokens=50))
        inbox.wait_ends(4)
        inbox.wait(lambda: not engine.alive or engine.fault is not None)
        assert "asked for" in str(engine.fault)
    assert inbox.finishes == {key: [Finish.FAULT] for key in range(4)}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("index", [0, 3])
def test_where_nothing_may_be_chosen_that_request_ends_and_no_other(depth: int, index: int) -> None:
    executor = FakeExecutor(slots=2, pipeline_depth=depth, dead_ends={1: index, 4: index})
    requests = [request(key, max_tokens=9) for key in range(6)]
    with running(executor) as (engine, inbox):
        for each in requests:
            engine.submit(each)
        inbox.wait_ends(len(requests))
        stats = engine.snapshot()
    for each in requests:
        dead = each.key in (1, 4)
        oracle = expected_tokens(each.prompt.tolist(), each.sampling, 9, 97)
        assert inbox.tokens[each.key] == (oracle[:index] if dead else oracle)
        assert inbox.finishes[each.key] == [Finish.NOTHING_ALLOWED if dead else Finish.LENGTH]
    assert stats.completion_tokens == 4 * 9 + 2 * index
    assert engine.fault is None


def test_a_request_beyond_the_queue_still_gets_an_end() -> None:
    executor = FakeExecutor(slots=1, delay_s=0.001)
    with running(executor, max_queue=0) as (engine, inbox):
        engine.submit(request(1, max_tokens=80))
        engine.submit(request(2))
        inbox.wait(lambda: 2 in inbox.finishes)
    assert inbox.finishes[2] == [Finish.FAULT]


def test_the_beat_goes_on_without_work() -> None:
    with running(FakeExecutor()) as (engine, _):
        before = engine.beat
        for _ in range(100):
            if engine.beat > before:
                break
            threading.Event().wait(0.05)
        assert engine.beat > before


def test_duty_pauses_between_steps() -> None:
    """At duty 1/3 a step of 5 ms is followed by 10 ms of rest: the same answer takes three times as long."""
    executor = FakeExecutor(delay_s=0.005)
    with running(executor) as (engine, inbox):
        engine.limit(4, 1 / 3)
        started = time.monotonic()
        engine.submit(request(1, max_tokens=20))
        inbox.wait_ends(1)
        took = time.monotonic() - started
    assert took >= 19 * 0.015
    assert inbox.finishes[1] == [Finish.LENGTH]


def test_a_cap_of_zero_holds_everything_and_lets_it_go_on_where_it_was() -> None:
    executor = FakeExecutor(delay_s=0.001)
    each = request(1, max_tokens=60)
    with running(executor) as (engine, inbox):
        engine.submit(each)
        inbox.wait(lambda: len(inbox.tokens[1]) >= 3)
        engine.limit(0, 0.0)
        engine.submit(request(2))
        threading.Event().wait(0.1)
        held = engine.snapshot()
        threading.Event().wait(0.1)
        assert engine.snapshot().steps == held.steps
        fed = executor.fed_tokens
        engine.limit(4, 1.0)
        inbox.wait_ends(2)
        # Nothing is computed again: what is fed from here on is what was left of both.
        assert executor.fed_tokens - fed == (60 - held.completion_tokens) + (5 - 1 + 8)
    assert inbox.tokens[1] == expected_tokens(each.prompt.tolist(), each.sampling, 60, 97)

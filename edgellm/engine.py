"""The engine thread: sole user of the scheduler and the executor. It touches no socket.

Other threads talk to it through `submit` and `stop`, which only append to a queue; it answers through the
`deliver` callback, once per step. While there is work it runs schedule → submit → collect → commit; with a
pipelined executor the next step is scheduled before the last one is collected. Without work it sleeps, and
with a duty below 1 it pauses between steps.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgellm.errors import ExecutorFault, RequestError
from edgellm.executor.base import Executor, Ticket
from edgellm.scheduler.pace import Pace
from edgellm.scheduler.request import Finish, Request, Update
from edgellm.scheduler.scheduler import Plan, Scheduler

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
"""Longest sleep without work: the beat must go on, so that the watchdog sees a live loop."""


GATHER_S = 0.001
"""An idle engine waits so long after a request before it begins. The model's threads take every core: first
`accepted` should have left, and what else comes in the same burst should be here."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How the engine is doing; counters since the start."""

    running: int
    queued: int
    batch_cap: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: Plan
    ticket: Ticket
    started: float


class Engine:
    """Runs requests.

    Args:
        executor: loaded; used by this thread alone until it has ended.
        scheduler: made for the executor's info.
        max_step_s: bound on a step's time, by feeding fewer prompt tokens.
        deliver: takes what a step gave, on the engine thread; must not block.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        max_step_s: float,
        deliver: Callable[[list[Update]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._deliver = deliver
        self._clock = clock
        self._pace = Pace(max_step_s, executor.info.max_num_tokens)
        self._inbox: collections.deque[Request | tuple[int, Finish]] = collections.deque()
        self._wake = threading.Event()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._steps = 0
        self._limits = (executor.info.max_batch_size, 1.0)
        self._rested_from = clock()  # end of the last step
        self._last_step_s = 0.0
        self.beat = 0
        self.fault: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its updates come through `deliver`. From any thread."""
        self._inbox.append(request)
        self._wake.set()

    def stop(self, key: int, finish: Finish) -> None:
        """End a request after the step in flight; an unknown key is ignored. From any thread."""
        self._inbox.append((key, finish))
        self._wake.set()

    def limit(self, batch_cap: int, duty: float) -> None:
        """From the next step on advance at most `batch_cap` rows, and run `duty` of the time; any thread.

        After a step of t seconds the engine pauses for t · (1 / duty − 1); with a cap of 0 nothing runs.
        """
        self._limits = (batch_cap, duty)
        self._wake.set()

    def snapshot(self) -> EngineStats:
        """Counters, read without a lock: each is right, together they may be a step apart."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.running,
            queued=scheduler.queued + len(self._inbox),
            batch_cap=scheduler.batch_cap,
            steps=self._steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            completion_tokens=scheduler.completion_tokens,
        )

    def shut_down(self, timeout: float) -> bool:
        """End what is open with Finish.SHUTDOWN and stop the thread; whether it ended in time."""
        self._leaving.set()
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; false after a fault, which `fault` then holds."""
        return self._thread.is_alive()

    def _run(self) -> None:
        in_flight: collections.deque[_InFlight] = collections.deque()
        try:
            while not self._leaving.is_set():
                self.beat += 1
                self._wake.clear()
                self._read_inbox()
                self._publish(self._scheduler.expire(self._clock()))
                pause = self._pause()
                if pause <= 0:
                    self._fill(in_flight)
                if in_flight:
                    self._finish(in_flight.popleft())
                else:
                    self._sleep(pause)
            for flight in in_flight:
                self._executor.collect(flight.ticket)
            self._end_all(Finish.SHUTDOWN)
        except ExecutorFault as error:
            log.error("the executor failed: %s", error)
            self._fail(error)
        except Exception as error:
            log.exception("the engine loop failed")
            self._fail(error)

    def _read_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, tuple):
                self._scheduler.stop(*item)
                continue
            try:
                self._scheduler.add(item, self._clock())
            except RequestError as error:
                # The I/O thread admits by the same limits, so this is a bug there; the client still hears.
                log.error("request %d was refused late: %s", item.key, error)
                self._publish([Update(key=item.key, finish=Finish.FAULT)])

    def _fill(self, in_flight: collections.deque[_InFlight]) -> None:
        """Keep as many steps in flight as the executor takes."""
        executor = self._executor
        while len(in_flight) < executor.info.pipeline_depth:
            now = self._clock()
            plan = self._scheduler.schedule(now, token_budget=self._pace.budget())
            if plan is None:
                return
            for source, target, length in plan.copies:
                executor.copy_prefix(source, target, length)
            for slot, sampling, history in plan.binds:
                executor.bind(slot, sampling, history)
            in_flight.append(_InFlight(plan, executor.submit(plan.step), now))

    def _finish(self, flight: _InFlight) -> None:
        result = self._executor.collect(flight.ticket)
        now = self._clock()
        self._rested_from, self._last_step_s = now, now - flight.started
        self._pace.observe(sum(len(row.tokens) for row in flight.plan.step.rows), now - flight.started)
        self._steps += 1
        self._publish(self._scheduler.commit(flight.plan, result, now))

    def _pause(self) -> float:
        """Seconds until the duty lets the next step begin; applies the newest limits."""
        self._scheduler.batch_cap, duty = self._limits
        if duty <= 0 or self._scheduler.batch_cap == 0:
            return 0.0  # the cap holds everything
        return self._rested_from + self._last_step_s * (1 / duty - 1) - self._clock()

    def _sleep(self, pause: float) -> None:
        """Sleep for a pause, or until there is work, a deadline, or it is time for the next beat."""
        wait = min(IDLE_WAIT_S, pause) if pause > 0 else IDLE_WAIT_S
        deadline = self._scheduler.next_deadline
        if deadline is not None:
            wait = min(wait, max(0.0, deadline - self._clock()))
        if self._wake.wait(wait) and self._scheduler.idle and self._inbox:
            time.sleep(GATHER_S)

    def _publish(self, updates: list[Update]) -> None:
        if updates:
            self._deliver(updates)

    def _end_all(self, finish: Finish) -> None:
        self._read_inbox()
        self._publish(self._scheduler.fail_all(finish))

    def _fail(self, error: BaseException) -> None:
        self.fault = error
        try:
            self._end_all(Finish.FAULT)
        except Exception:
            log.exception("open requests could not be ended one by one")

"""Random lives of many requests at once; `harness` and `fakes` check every step and every update."""

from __future__ import annotations

import pytest
from fakes import FakeExecutor
from harness import Harness
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edgellm.errors import Overloaded, TooLong
from edgellm.scheduler import Finish, Priority

VOCAB = 13
MAX_SEQ_LEN = 160
SYSTEM = [(7 * i + 3) % VOCAB for i in range(70)]
BASES = {
    "system": SYSTEM,
    "half the system": SYSTEM[:40] + [1] * 60,
    "another": [(5 * i + 1) % VOCAB for i in range(90)],
}

tokens = st.integers(0, VOCAB - 1)
cuts = st.one_of(st.sampled_from([0, 39, 40, 60, 70]), st.integers(0, 90))
few_stop_ids = st.one_of(st.just(frozenset[int]()), st.frozensets(tokens, max_size=2))


class SchedulerMachine(RuleBasedStateMachine):
    pipeline_depth = 1

    @initialize(slots=st.integers(1, 4), chunk=st.integers(4, 100), max_queue=st.integers(0, 5))
    def start(self, slots: int, chunk: int, max_queue: int) -> None:
        self.harness = Harness(
            FakeExecutor(
                slots=slots,
                max_seq_len=MAX_SEQ_LEN,
                max_num_tokens=chunk,
                vocab_size=VOCAB,
                pipeline_depth=self.pipeline_depth,
            ),
            max_queue=max_queue,
        )

    @rule(
        base=st.sampled_from(sorted(BASES)),
        cut=cuts,
        tail=st.lists(tokens, min_size=1, max_size=20),
        max_tokens=st.integers(1, 30),
        stop_ids=few_stop_ids,
        priority=st.sampled_from(Priority),
        patience=st.one_of(st.none(), st.floats(0.1, 30)),
        seed=st.integers(0, 3),
        logprobs=st.one_of(st.none(), st.integers(0, 3)),
    )
    def add(
        self,
        base: str,
        cut: int,
        tail: list[int],
        max_tokens: int,
        stop_ids: frozenset[int],
        priority: Priority,
        patience: float | None,
        seed: int,
        logprobs: int | None,
    ) -> None:
        self._add(
            BASES[base][:cut] + tail,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            priority=priority,
            deadline=None if patience is None else self.harness.now + patience,
            seed=seed,
            logprobs=logprobs,
        )

    @precondition(lambda self: self.harness.records)
    @rule(data=st.data(), tail=st.lists(tokens, min_size=1, max_size=10))
    def go_on(self, data: st.DataObject, tail: list[int]) -> None:
        """The next turn of a conversation, or of one that is still being answered."""
        record = self.harness.records[data.draw(st.sampled_from(sorted(self.harness.records)))]
        prompt = [*record.request.prompt.tolist(), *record.tokens, *tail]
        if len(prompt) + 8 <= MAX_SEQ_LEN:
            self._add(prompt)

    def _add(self, prompt: list[int], **wishes: object) -> None:
        harness = self.harness
        scheduler = harness.scheduler
        full = (
            scheduler.running + scheduler.queued >= harness.executor.info.max_batch_size + harness.max_queue
        )
        try:
            harness.add(prompt, **wishes)  # type: ignore[arg-type]
        except Overloaded as refusal:
            assert full
            assert refusal.retry_after_ms is not None
            assert refusal.retry_after_ms > 0
        else:
            assert not full

    @rule(prompt_length=st.integers(1, 2 * MAX_SEQ_LEN), excess=st.integers(1, 100))
    def add_too_long(self, prompt_length: int, excess: int) -> None:
        with pytest.raises(TooLong):
            self.harness.add([1] * prompt_length, max_tokens=max(1, MAX_SEQ_LEN - prompt_length + excess))

    @precondition(lambda self: self.harness.records)
    @rule(data=st.data(), finish=st.sampled_from([Finish.CANCELLED, Finish.STOP]))
    def stop(self, data: st.DataObject, finish: Finish) -> None:
        """Also of requests that have ended: nothing may happen then."""
        self.harness.stop(data.draw(st.sampled_from(sorted(self.harness.records))), finish)

    @rule(cap=st.integers(0, 4))
    def set_cap(self, cap: int) -> None:
        self.harness.scheduler.batch_cap = cap

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.harness.now += seconds
        self.harness.expire()
        for record in self.harness.live:
            assert record.request.deadline is None or record.request.deadline > self.harness.now

    @precondition(lambda self: len(self.harness.open) < self.pipeline_depth)
    @rule(token_budget=st.one_of(st.none(), st.integers(1, 40)))
    def submit(self, token_budget: int | None) -> None:
        harness = self.harness
        plan = harness.submit(token_budget=token_budget)
        if not harness.open and harness.scheduler.batch_cap:
            assert plan is not None or not [each for each in harness.live if each.asked is None], "stuck"

    @precondition(lambda self: self.harness.open)
    @rule()
    def collect(self) -> None:
        self.harness.collect()

    @rule(turns=st.integers(1, 20))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self.harness.step()

    @rule()
    def everything_ends_at_once(self) -> None:
        """As at a shutdown, after which the steps in flight are still collected."""
        for record in self.harness.live:
            record.asked = record.asked or Finish.SHUTDOWN
        self.harness.deliver(self.harness.scheduler.fail_all(Finish.SHUTDOWN, self.harness.now))
        assert not self.harness.live

    @invariant()
    def counters_agree(self) -> None:
        if hasattr(self, "harness"):  # not before `start`
            self.harness.check_counters()

    def teardown(self) -> None:
        harness = self.harness
        harness.scheduler.batch_cap = max(1, harness.scheduler.batch_cap)
        harness.run()
        harness.check_counters()


class PipelinedMachine(SchedulerMachine):
    pipeline_depth = 2


class DeepMachine(SchedulerMachine):
    pipeline_depth = 3


@pytest.mark.parametrize("machine", [SchedulerMachine, PipelinedMachine, DeepMachine])
def test_random_lives(machine: type[SchedulerMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )

"""Order, chunks, caps and ends, one by one; test_scheduler_machine.py mixes them."""

from __future__ import annotations

import pytest
from fakes import FakeExecutor
from harness import Harness

from edgellm.errors import ConfigError, ExecutorFault, Overloaded, TooLong
from edgellm.executor.base import FEEDBACK, ExecutorInfo, Want
from edgellm.scheduler import Finish, Plan, Priority, Scheduler, check_length
from edgellm.scheduler.scheduler import BUDGET_FLOOR

LONG_PROMPT = [(i * i) % 97 for i in range(60)]


def make(*, slots: int = 2, chunk: int = 64, depth: int = 1, max_queue: int = 8) -> Harness:
    return Harness(FakeExecutor(slots=slots, max_num_tokens=chunk, pipeline_depth=depth), max_queue=max_queue)


def keys(plan: Plan | None) -> list[int]:
    assert plan is not None
    return [sequence.request.key for sequence in plan.sequences]


def admission_order(harness: Harness) -> list[int]:
    """Run everything; the keys in the order in which they got a slot."""
    harness.run()
    seen: list[int] = []
    for plan in harness.plans:
        seen += [key for key in keys(plan) if key not in seen]
    return seen


def finish(harness: Harness, key: int) -> Finish | None:
    end = harness.records[key].end
    return None if end is None else end.finish


@pytest.mark.parametrize("length", [2, 3, 4, 5, 15, 16, 17, 18, 31, 32, 33, 34, 49, 50])
def test_no_piece_of_a_prompt_is_shorter_than_the_executor_computes_alike(length: int) -> None:
    harness = Harness(FakeExecutor(slots=1, max_num_tokens=16, smallest_chunk=2))
    for _ in range(2):  # the second time all that may be reused is
        harness.add(LONG_PROMPT[:length])
        harness.run()
    pieces = [
        len(row.tokens) for plan in harness.plans for row in plan.step.rows if row.tokens is not FEEDBACK
    ]
    assert min(pieces) >= 2
    assert sum(pieces) == length + 2


class TestOrder:
    def test_priority_then_deadline_then_arrival(self) -> None:
        harness = make(slots=1)
        late = harness.add([1, 2], deadline=200.0)
        patient = harness.add([1, 3])
        early = harness.add([1, 4], deadline=100.0)
        patient_too = harness.add([1, 5])
        background = harness.add([1, 6], priority=Priority.BACKGROUND, deadline=50.0)
        critical = harness.add([1, 7], priority=Priority.CRITICAL)
        high = harness.add([1, 8], priority=Priority.HIGH, deadline=300.0)
        assert admission_order(harness) == [critical, high, early, late, patient, patient_too, background]

    def test_decoding_rows_come_before_prompts(self) -> None:
        harness = make(chunk=16)
        first = harness.add([1, 2, 3])
        harness.step()
        second = harness.add(LONG_PROMPT)
        plan = harness.step()
        assert plan is not None
        assert keys(plan) == [first, second]
        assert plan.step.rows[0].tokens is FEEDBACK
        assert len(plan.step.rows[1].tokens) == 15

    def test_an_urgent_prompt_overtakes_one_that_is_half_fed(self) -> None:
        harness = make(chunk=16)
        harness.add(LONG_PROMPT, priority=Priority.BACKGROUND)
        harness.step()
        urgent = harness.add([5] * 20, priority=Priority.CRITICAL)
        assert keys(harness.step()) == [urgent]

    def test_prompts_share_a_step_while_the_budget_lasts(self) -> None:
        harness = make(slots=4, chunk=16)
        for i in range(4):
            harness.add([i] * 6, max_tokens=1)
        plan = harness.step()
        assert plan is not None
        assert [(len(row.tokens), row.want) for row in plan.step.rows] == [
            (6, Want.TOKEN),
            (6, Want.TOKEN),
            (4, Want.NONE),
        ]
        assert harness.scheduler.queued == 1  # nothing is admitted before it can be fed


class TestChunks:
    def test_only_the_last_chunk_samples(self) -> None:
        harness = make(chunk=25)
        harness.add(LONG_PROMPT, max_tokens=1)
        harness.run()
        rows = [row for plan in harness.plans for row in plan.step.rows]
        assert [(row.past, len(row.tokens), row.want) for row in rows] == [
            (0, 25, Want.NONE),
            (25, 25, Want.NONE),
            (50, 10, Want.TOKEN),
        ]

    def test_a_budget_bounds_prompts_but_never_stops_them(self) -> None:
        harness = make(slots=3, chunk=64)
        harness.add([1, 2], max_tokens=30)
        harness.add([3, 4], max_tokens=30)
        harness.step()
        harness.add(LONG_PROMPT)
        for budget, fed in [(30, 28), (1, BUDGET_FLOOR)]:
            plan = harness.step(token_budget=budget)
            assert plan is not None
            assert [len(row.tokens) for row in plan.step.rows] == [1, 1, fed]

    def test_a_prompt_that_was_seen_costs_one_token(self) -> None:
        harness = make(slots=1)
        harness.add(LONG_PROMPT, max_tokens=3)
        harness.run()
        again = harness.add(LONG_PROMPT, max_tokens=3)
        harness.run()
        end = harness.records[again].end
        assert end is not None
        assert end.cached_tokens == len(LONG_PROMPT) - 1

    def test_the_next_turn_finds_the_answer_in_the_slot(self) -> None:
        """All but the last token of an answer was fed; the last one never was."""
        harness = make(slots=1)
        first = harness.add([1, 2, 3], max_tokens=5)
        harness.run()
        turn = harness.add([1, 2, 3, *harness.records[first].tokens, 9, 9])
        harness.run()
        assert harness.records[turn].cached == 3 + 4

    @pytest.mark.parametrize("depth", [1, 2])
    def test_a_burst_with_one_system_prompt_computes_it_once(self, depth: int) -> None:
        harness = make(slots=4, chunk=96, depth=depth)
        for i in range(4):
            harness.add([*LONG_PROMPT, i, i], max_tokens=2)
        harness.run()
        assert harness.executor.copies == 3
        assert [harness.records[key].cached for key in range(4)] == [0, 60, 60, 60]
        assert harness.executor.fed_tokens == 62 + 3 * 2 + 4


class TestCap:
    def test_the_least_urgent_and_youngest_pause_first_and_resume_where_they_were(self) -> None:
        harness = make(slots=4)
        background = harness.add([1], priority=Priority.BACKGROUND, max_tokens=20)
        old = harness.add([2], max_tokens=20)
        young = harness.add([3], max_tokens=20)
        high = harness.add([4], priority=Priority.HIGH, max_tokens=20)
        harness.step()
        for cap, expected in [
            (4, [high, old, young, background]),
            (3, [high, old, young]),
            (2, [high, old]),
            (1, [high]),
        ]:
            harness.scheduler.batch_cap = cap
            assert keys(harness.step()) == expected
        harness.scheduler.batch_cap = 0
        assert harness.step() is None
        assert harness.scheduler.running == 4
        fed = harness.executor.fed_tokens
        harness.scheduler.batch_cap = 4
        harness.run()
        sampled = sum(len(record.tokens) for record in harness.records.values())
        assert sampled == 80
        assert harness.executor.fed_tokens - fed == 80 - 4 - 4 - 3 - 2 - 1  # nothing is computed twice

    def test_admission_keeps_to_the_cap(self) -> None:
        harness = make(slots=4)
        harness.scheduler.batch_cap = 2
        for i in range(3):
            harness.add([i], max_tokens=4)
        harness.step()
        assert (harness.scheduler.running, harness.scheduler.queued) == (2, 1)

    def test_an_urgent_request_takes_the_place_under_the_cap(self) -> None:
        harness = make(slots=2)
        harness.scheduler.batch_cap = 1
        normal = harness.add([1], max_tokens=5)
        harness.step()
        equal = harness.add([2], max_tokens=5)
        assert keys(harness.step()) == [normal]
        critical = harness.add([3], priority=Priority.CRITICAL, max_tokens=2)
        assert [keys(harness.step()) for _ in range(3)] == [[critical], [critical], [normal]]
        harness.run()
        assert finish(harness, equal) is Finish.LENGTH

    def test_a_cap_out_of_range_is_brought_into_it(self) -> None:
        scheduler = make(slots=3).scheduler
        scheduler.batch_cap = 9
        assert scheduler.batch_cap == 3
        scheduler.batch_cap = -1
        assert scheduler.batch_cap == 0


class TestEnds:
    def test_cancelled_in_the_queue_in_the_prompt_and_while_decoding(self) -> None:
        harness = make(slots=2, chunk=16)
        decoding = harness.add([1, 2])
        harness.step()
        feeding = harness.add(LONG_PROMPT)
        harness.step()
        queued = harness.add([3, 4])
        for key in (decoding, feeding, queued):
            harness.stop(key)
        assert harness.scheduler.queued == harness.scheduler.running == 0
        assert not harness.scheduler.idle
        harness.expire()
        assert [finish(harness, key) for key in (decoding, feeding, queued)] == [Finish.CANCELLED] * 3
        assert harness.scheduler.idle

    def test_the_slot_of_a_vanished_client_is_free_for_the_next_step(self) -> None:
        harness = make(slots=1)
        gone = harness.add([1, 2], max_tokens=50)
        harness.step()
        waiting = harness.add([3, 4])
        harness.stop(gone)
        assert keys(harness.step()) == [waiting]

    def test_with_two_steps_in_flight_a_slot_waits_for_its_last_row(self) -> None:
        harness = make(slots=1, depth=2)
        gone = harness.add([1, 2], max_tokens=50)
        harness.submit()
        harness.submit()
        waiting = harness.add([3, 4])
        harness.stop(gone)
        harness.collect()
        assert harness.submit() is None
        harness.collect()
        assert keys(harness.submit()) == [waiting]
        harness.run()
        assert harness.records[gone].tokens == []

    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("max_tokens", [1, 2, 5])
    def test_no_token_is_sampled_beyond_max_tokens(self, depth: int, max_tokens: int) -> None:
        harness = make(depth=depth)
        harness.add([1, 2, 3], max_tokens=max_tokens)
        harness.run()
        wants = [row.want for plan in harness.plans for row in plan.step.rows]
        assert wants == [Want.TOKEN] * max_tokens

    def test_a_stop_id_ends_and_is_reported(self) -> None:
        harness = make(depth=2)
        free = harness.add([1, 2, 3], max_tokens=9)
        harness.run()
        answer = harness.records[free].tokens
        stopped = harness.add([1, 2, 3], max_tokens=9, stop_ids=frozenset({answer[3]}))
        harness.run()
        assert finish(harness, stopped) is Finish.STOP
        assert harness.records[stopped].tokens == answer[: answer.index(answer[3]) + 1]

    def test_deadlines_running_and_queued(self) -> None:
        harness = make(slots=1)
        running = harness.add([1], max_tokens=50, deadline=2.0)
        queued = harness.add([2], deadline=1.0, priority=Priority.BACKGROUND)
        assert harness.scheduler.next_deadline == 1.0
        harness.step()
        harness.now = 1.0
        harness.step()
        assert finish(harness, queued) is Finish.DEADLINE
        assert harness.scheduler.next_deadline == 2.0
        harness.now = 2.5
        harness.expire()
        assert finish(harness, running) is Finish.DEADLINE
        assert harness.scheduler.next_deadline is None
        assert harness.scheduler.idle

    def test_a_fault_ends_everything_once(self) -> None:
        harness = Harness(FakeExecutor(slots=2, fault_at=3))
        for i in range(4):
            harness.add([i, i], max_tokens=20)
        harness.stop(3)
        with pytest.raises(ExecutorFault):
            harness.run()
        for record in harness.live:
            record.asked = record.asked or Finish.FAULT
        harness.deliver(harness.scheduler.fail_all(Finish.FAULT, harness.now))
        ends = [finish(harness, key) for key in range(4)]
        assert ends == [Finish.FAULT, Finish.FAULT, Finish.FAULT, Finish.CANCELLED]
        assert harness.scheduler.fail_all(Finish.FAULT) == []

    def test_timings_and_logprobs(self) -> None:
        harness = make(slots=1, chunk=30)
        harness.now = 10.0
        key = harness.add(LONG_PROMPT, max_tokens=2, logprobs=2)
        harness.now = 11.0
        harness.expire()
        harness.submit()
        harness.now = 12.0
        harness.collect()
        harness.now = 13.0
        harness.submit()
        harness.collect()
        harness.now = 14.0
        harness.run()
        end = harness.records[key].end
        assert end is not None
        assert end.timings is not None
        assert (end.timings.arrival, end.timings.admitted) == (10.0, 11.0)
        assert (end.timings.first_token, end.timings.finished) == (13.0, 14.0)
        (token,) = end.tokens
        assert token.logprob == -token.id
        assert token.top == ((token.id, -token.id), ((token.id + 1) % 97, -((token.id + 1) % 97)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "max_tokens", "field", "fits"),
        [
            (96, 1, "prompt", "95"),
            (500, 9, "prompt", "95"),
            (90, 7, "max_tokens", "6"),
            (1, 96, "max_tokens", "95"),
        ],
    )
    def test_too_long_names_what_would_fit(self, prompt: int, max_tokens: int, field: str, fits: str) -> None:
        with pytest.raises(TooLong, match=rf"at most {fits}\b") as error:
            make().add([1] * prompt, max_tokens=max_tokens)
        assert error.value.field == field

    def test_what_just_fits_is_taken(self) -> None:
        check_length(95, 1, 96)
        harness = make()
        key = harness.add([1] * 90, max_tokens=6)
        harness.run()
        assert finish(harness, key) is Finish.LENGTH

    def test_the_queue_is_bounded_beside_the_slots(self) -> None:
        harness = make(slots=2, max_queue=1)
        for _ in range(3):
            harness.add([1], max_tokens=4)
        with pytest.raises(Overloaded) as error:
            harness.add([1])
        assert error.value.retry_after_ms == 1000
        harness.run()
        assert len(harness.records) == 3

    def test_retry_after_follows_the_time_that_requests_take(self) -> None:
        harness = make(slots=1, max_queue=0)
        harness.add([1], max_tokens=1)
        harness.expire()
        harness.submit()
        harness.now = 8.0
        harness.collect()
        harness.add([2], max_tokens=10)
        harness.step()
        harness.now = 10.0
        with pytest.raises(Overloaded) as error:
            harness.add([3])
        assert error.value.retry_after_ms == 6000

    def test_a_step_must_hold_a_token_of_every_slot(self) -> None:
        with pytest.raises(ConfigError, match="max_num_tokens 3"):
            Scheduler(ExecutorInfo("fake", 4, 96, 3, 97, 4), max_queue=1)

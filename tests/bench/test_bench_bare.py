"""The bare benchmark on an executor whose every step takes a known time, and which checks the contract."""

from __future__ import annotations

import pytest
from fakes import FakeExecutor
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench.bare import WARM_UP_TOKENS, BareBench, row_of
from edgellm.bench.workloads import Workload
from edgellm.executor.base import Result, Row, Step, Ticket, Want

STEP_S = 0.5
TOKEN_S = 0.0625
"""Sums of these are exact in binary."""


class TimedExecutor(FakeExecutor):
    """Takes STEP_S a step and TOKEN_S a token, on a clock of its own, and keeps what it was asked for."""

    def __init__(self, *, slots: int = 8, pipeline_depth: int = 1) -> None:
        super().__init__(slots=slots, pipeline_depth=pipeline_depth)
        self.now = 0.0
        self.steps: list[list[Row]] = []
        self.in_flight = self.most_in_flight = 0

    def submit(self, step: Step) -> Ticket:
        self.steps.append(list(step.rows))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return super().submit(step)

    def collect(self, ticket: Ticket) -> Result:
        opened = self._open[0]
        self.now += STEP_S + TOKEN_S * sum(len(row.tokens) for row in opened.step.rows)
        self.in_flight -= 1
        return super().collect(ticket)


def measure(executor: TimedExecutor, workload: Workload, repetitions: int) -> list[float]:
    return BareBench(executor, clock=lambda: executor.now).run(workload, repetitions)


@given(
    st.sampled_from(["pp", "tg"]),
    st.integers(1, 48),
    st.integers(0, 48),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_seconds_are_those_of_the_steps(
    kind: str, tokens: int, depth: int, batch: int, pipeline: int
) -> None:
    executor = TimedExecutor(pipeline_depth=pipeline)
    workload = Workload("pp" if kind == "pp" else "tg", tokens, depth, batch)
    steps = -(-tokens * batch // executor.info.max_num_tokens) if kind == "pp" else tokens
    expected = steps * STEP_S + workload.total_tokens * TOKEN_S
    assert measure(executor, workload, 3) == [expected] * 3
    row = row_of(workload, [expected] * 3, executor.info.max_num_tokens)
    assert row["tokens_per_s_mean"] == pytest.approx(workload.total_tokens / expected)
    assert row["tokens_per_s_sd"] == pytest.approx(0)
    assert row["step_ms_median"] == pytest.approx(1000 * expected / steps)
    assert row["repetitions"] == 3


def test_decode_advances_all_rows_from_the_depth_one_token_a_step() -> None:
    executor = TimedExecutor()
    measure(executor, Workload("tg", 5, depth=30, batch=3), 1)
    for index, rows in enumerate(executor.steps[-5:]):
        assert [row.slot for row in rows] == [0, 1, 2]
        assert all(row.past == 30 + index and len(row.tokens) == 1 for row in rows)
        assert all(row.want is Want.TOKEN for row in rows)
    assert executor.copies == 2, "the depth is computed once and copied to the other slots"


def test_prefill_fills_steps_and_wants_a_token_of_the_last_position_only() -> None:
    executor = TimedExecutor()
    measure(executor, Workload("pp", 50, depth=10), 1)
    last = [rows[0] for rows in executor.steps[-3:]]
    assert [(row.past, len(row.tokens)) for row in last] == [(10, 24), (34, 24), (58, 2)]
    assert [row.want for row in last] == [Want.NONE, Want.NONE, Want.TOKEN]


def test_several_prompts_fill_steps_together() -> None:
    executor = TimedExecutor()
    measure(executor, Workload("pp", 20, batch=3), 1)
    fed = [[(row.slot, row.past, len(row.tokens)) for row in rows] for rows in executor.steps[-3:]]
    assert fed == [[(0, 0, 20), (1, 0, 4)], [(1, 4, 16), (2, 0, 8)], [(2, 8, 12)]]
    wants = [row.want for rows in executor.steps[-3:] for row in rows]
    assert wants == [Want.TOKEN, Want.NONE, Want.TOKEN, Want.NONE, Want.TOKEN]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_steps_are_in_flight_as_the_executor_takes(depth: int) -> None:
    executor = TimedExecutor(pipeline_depth=depth)
    measure(executor, Workload("tg", 8), 1)
    assert executor.most_in_flight == depth
    assert executor.in_flight == 0


def test_the_warm_up_is_not_measured() -> None:
    executor = TimedExecutor()
    seconds = measure(executor, Workload("tg", 40), 2)
    assert len(executor.steps) == WARM_UP_TOKENS + 2 * 40
    assert len(seconds) == 2

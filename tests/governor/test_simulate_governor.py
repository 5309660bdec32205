"""The goals in a closed loop, in short; tools/simulate_governor.py has the long form and the picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import simulate_governor as simulation

from edgellm.governor.causes import State
from edgellm.governor.config import GovernorConfig

BY_NAME = {scenario.name: scenario for scenario in simulation.SCENARIOS}
LINE = 89.0


def test_the_plant_settles_where_its_resistances_say() -> None:
    plant = simulation.FANLESS
    junction = sink = 25.0
    for _ in range(20_000):
        junction, sink = plant.advance(junction, sink, 10.0, 25.0, plant.sink_ambient)
    # Tj = Ta + (P + leak·(Tj − 25))·(Rjs + Rsa), solved for Tj at Ta = 25.
    total = plant.junction_sink + plant.sink_ambient
    assert junction == pytest.approx(25.0 + 10.0 * total / (1.0 - plant.leak * total), abs=0.01)


def test_the_rival_is_as_fast_as_its_line_allows() -> None:
    scenario = BY_NAME["fanless, 60 °C"]
    rival, idle = simulation.best_constant(scenario, 8, 3600, LINE)
    assert rival is not None
    watts = scenario.plant.power(rival[0]) * rival[1]
    assert simulation.open_loop(scenario, 3600, watts).max() == pytest.approx(LINE, abs=1e-6)
    assert idle.max() < LINE


@pytest.mark.parametrize(
    "name",
    [
        "fan, 70 °C",
        "fanless, 60 °C",
        "power grows with batch, 50 °C",
        "neighbour 15 W, 5 of 15 min",
        "bursts, 40 of 120 s",
    ],
)
def test_goals_hold(name: str) -> None:
    outcome, _ = simulation.assess(BY_NAME[name], GovernorConfig(), seconds=4500, seed=1)
    assert outcome.idle_allows
    assert outcome.seconds_above == 0
    assert outcome.share is not None
    assert outcome.share >= 0.85
    assert outcome.transitions_per_hour <= 12
    assert outcome.above_target <= 4.0  # 99 % of the time below the SHED line
    assert outcome.worst < State.CRITICAL


def test_a_box_that_idles_above_the_target_is_held_below_the_trip_at_the_floor() -> None:
    outcome, trace = simulation.assess(BY_NAME["fanless, 70 °C"], GovernorConfig(), seconds=7200)
    assert outcome.rival is None  # no constant keeps the target: idling alone is above it
    assert outcome.idle_allows
    assert outcome.seconds_above == 0
    assert set(trace.state[3600:]) <= {State.SHED, State.CRITICAL}
    assert trace.cap[3600:].max() <= 1


def test_without_the_governor_the_same_box_passes_its_trip() -> None:
    outcome, _ = simulation.assess(BY_NAME["fanless, 60 °C"], GovernorConfig(enabled=False), seconds=3600)
    assert outcome.seconds_above > 1000
    assert not simulation.meets_goals(outcome)


def test_memory_pressure_lowers_the_cap_and_leaves_the_duty() -> None:
    scenario = simulation.Scenario(
        "memory",
        simulation.FAN,
        simulation.always(40.0),
        available=simulation.between(100.0, 400.0, 400.0, 4096.0),
    )
    _, trace = simulation.assess(scenario, GovernorConfig(), seconds=600)
    assert trace.cap[99] == 8
    assert trace.cap[200] == 1
    assert trace.cap[599] == 8
    assert set(trace.duty) == {1.0}

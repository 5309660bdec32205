"""The governor at work: decisions reach the actuators, and changes are told once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edgellm.governor.causes import Limit, Settings, State
from edgellm.governor.config import GovernorConfig, LimitsConfig
from edgellm.governor.governor import Governor, Transition
from edgellm.governor.policy import Decision, PolicyState, step
from edgellm.governor.sensors import Memory, Readings, Zone

SETTINGS = Settings(slots=4)


@dataclass
class Bench:
    """A governor with a clock and readings of the test's own."""

    now: float = 0.0
    celsius: float = 40.0
    applied: list[Decision] = field(default_factory=list)
    told: list[Transition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.governor = Governor(
            SETTINGS, self.latest, apply=self.applied.append, tell=self.told.append, clock=lambda: self.now
        )

    def latest(self) -> Readings:
        zone = Zone(name="tj-thermal", celsius=self.celsius, passive=99.0)
        return Readings(at=self.now, zones=(zone,), memory=Memory(available=8 << 30))

    def run(self, seconds: int) -> Decision:
        for _ in range(seconds):
            self.now += 1.0
            decision = self.governor.tick()
        return decision


def test_the_first_decision_is_applied_and_not_told() -> None:
    bench = Bench()
    decision = bench.governor.tick()
    assert (decision.state, decision.batch_cap, decision.duty) == (State.NORMAL, 4, 1.0)
    assert bench.applied == [decision]
    assert bench.told == []


def test_what_does_not_change_is_neither_applied_nor_told_again() -> None:
    bench = Bench()
    bench.run(20)
    assert len(bench.applied) == 1
    assert bench.told == []


def test_heat_is_told_once_with_its_state_and_counted() -> None:
    bench = Bench()
    bench.run(3)
    bench.celsius = 100.0
    bench.run(3)
    (transition,) = bench.told
    assert (transition.before.state, transition.after.state) == (State.NORMAL, State.CRITICAL)
    assert bench.applied[-1].batch_cap == 0
    assert bench.governor.transitions == {State.NORMAL: 1, State.CRITICAL: 1}


def test_a_suspension_acts_at_once_and_is_told_also_behind_another_cause() -> None:
    bench = Bench()
    bench.run(3)
    bench.celsius = 89.0
    bench.run(3)
    assert bench.governor.tick().state is State.THROTTLED
    told = len(bench.told)
    held = bench.governor.limit(Limit(by="uid 7", batch=0, duty=0.0))
    assert (held.batch_cap, bench.applied[-1].batch_cap) == (0, 0)
    assert len(bench.told) == told + 1
    bench.governor.release("uid 7")
    assert bench.applied[-1].batch_cap > 0
    assert len(bench.told) == told + 2


def test_a_limit_ends_by_itself() -> None:
    bench = Bench()
    bench.run(1)
    bench.governor.limit(Limit(by="uid 7", batch=2, until=bench.now + 5.0))
    assert bench.applied[-1].batch_cap == 2
    bench.run(6)
    assert bench.applied[-1].batch_cap == 4


def test_other_settings_act_at_once() -> None:
    bench = Bench()
    bench.run(1)
    bench.governor.reconfigure(replace(SETTINGS, limits=LimitsConfig(batch=1, duty=0.5)))
    assert (bench.applied[-1].batch_cap, bench.applied[-1].duty) == (1, 0.5)


def test_a_hotter_board_does_no_more_while_a_sensor_is_missing() -> None:
    """SHED runs at the floor, unless what is unknown allows less."""
    config = GovernorConfig(duty_floor=0.5, duty_unknown=0.25)
    settings = Settings(slots=1, governor=config, required=("tj",))
    duties = []
    for celsius in (33.0, 93.0):
        zone = Zone(name="gpu-thermal", celsius=celsius, passive=99.0)
        readings = Readings(at=1.0, zones=(zone,), memory=Memory(available=8 << 30))
        duties.append(step(settings, PolicyState(), readings, 1.0)[1].duty)
    assert duties == [0.25, 0.25]

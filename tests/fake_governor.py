"""A governor that decides what a test says, and notes what it is asked."""

from __future__ import annotations

from collections import Counter

from edgellm.governor.causes import Limit, State
from edgellm.governor.governor import Transition
from edgellm.governor.policy import Decision
from edgellm.governor.sensors import Readings

NORMAL = Decision(State.NORMAL, 4, 1.0, "none", "nothing to back off from")
THROTTLED = Decision(State.THROTTLED, 3, 0.5, "heat", "tj-thermal 88.0 °C, 11.0 °C below its trip")
SHED = Decision(State.SHED, 1, 0.05, "heat", "tj-thermal 95.0 °C, 4.0 °C below its trip")
CRITICAL = Decision(State.CRITICAL, 0, 0.0, "heat", "tj-thermal 99.5 °C, 0.5 °C above its trip")
SUSPENDED = Decision(State.THROTTLED, 0, 0.0, "suspend", "suspended by uid 0")

HEATING_UP = Transition(NORMAL, THROTTLED, at=0.0)


class FakeGovernor:
    """Answers `limit` with SUSPENDED and `release` with NORMAL."""

    def __init__(self, decision: Decision | None = NORMAL, readings: Readings | None = None) -> None:
        self.decision = decision
        self.readings = readings
        self.transitions: Counter[State] = Counter({State.NORMAL: 1, State.SHED: 2})
        self.dwell_s = 30.0
        self.limits: list[Limit] = []
        self.released: list[str | None] = []

    def limit(self, limit: Limit) -> Decision:
        self.limits.append(limit)
        return SUSPENDED

    def release(self, by: str | None) -> Decision:
        self.released.append(by)
        return NORMAL

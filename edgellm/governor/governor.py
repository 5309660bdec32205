"""The governor at work: sensors in, policy, actuators out; every change of state is told.

`tick` runs on the main thread, about once a second. `limit` and `release` may come from any thread and act at
once: whoever asks for bandwidth must not wait for the next tick.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edgellm.governor.causes import Limit, Settings, State
from edgellm.governor.policy import Decision, PolicyState, step, with_limit, without_limit
from edgellm.governor.sensors import Readings


@dataclass(frozen=True, slots=True)
class Transition:
    """A change that others hear of: of the state, of the reason for it, or of whether anything runs at all.

    Attributes:
        before, after: the decisions.
        at: clock seconds.
    """

    before: Decision
    after: Decision
    at: float


class Governor:
    """Decides how much may run.

    Args:
        settings: configuration, board and slots.
        latest: gives the newest sweep, however old, or None; never blocks.
        apply: takes every decision that differs from the one before: the actuators. Must not block.
        tell: takes every transition. Must not block.
        clock: seconds; the one that `Readings.at` is read from.

    Attributes:
        transitions: state → how often it was entered.
    """

    def __init__(
        self,
        settings: Settings,
        latest: Callable[[], Readings | None],
        *,
        apply: Callable[[Decision], None],
        tell: Callable[[Transition], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._latest = latest
        self._apply = apply
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._state = PolicyState(since=clock())
        self._decision: Decision | None = None
        self.transitions: Counter[State] = Counter()

    @property
    def decision(self) -> Decision | None:
        """The last decision; None before the first tick."""
        return self._decision

    @property
    def dwell_s(self) -> float:
        """How long a state is kept, at least, after its cause is gone."""
        return self._settings.governor.dwell_s

    @property
    def readings(self) -> Readings | None:
        """The newest sweep."""
        return self._latest()

    def tick(self) -> Decision:
        """Decide by the newest readings."""
        with self._lock:
            return self._decide()

    def reconfigure(self, settings: Settings) -> Decision:
        """Take other settings, and decide by them at once."""
        with self._lock:
            self._settings = settings
            return self._decide()

    def limit(self, limit: Limit) -> Decision:
        """Put a ceiling on what may run, in place of an earlier one by the same component."""
        with self._lock:
            self._state = with_limit(self._state, limit)
            return self._decide()

    def release(self, by: str | None) -> Decision:
        """Take a component's ceiling back; None: everybody's."""
        with self._lock:
            self._state = without_limit(self._state, by)
            return self._decide()

    def _decide(self) -> Decision:
        now = self._clock()
        before = self._decision
        self._state, after = step(self._settings, self._state, self._latest(), now)
        self._decision = after
        if before is None or (before.batch_cap, before.duty, before.state) != (
            after.batch_cap,
            after.duty,
            after.state,
        ):
            self._apply(after)
        if before is None:
            self.transitions[after.state] += 1
        elif _told(before) != _told(after):
            if before.state is not after.state:
                self.transitions[after.state] += 1
            self._tell(Transition(before, after, now))
        return after


def _told(decision: Decision) -> tuple[State, str, bool]:
    """What a transition is a change of. A suspension may hide behind another cause of the same state."""
    return decision.state, decision.reason, decision.batch_cap == 0

"""The governor's policy: a pure function from readings to how much may run.

    (settings, state, readings, now) → (state', Decision)

Two actuators. The *batch cap* bounds how many rows run at once: it protects memory and latency. The *duty* is
the share of time in which steps run: decoding is bound by memory bandwidth, so power hardly falls with the
batch, and pauses are what cools. NORMAL runs at the configured ceilings. THROTTLED holds the hottest zone at
a target with a proportional-integral controller on the duty, and answers other causes step by step. SHED runs
one row at the floor, CRITICAL nothing. States get worse at once, and better after a dwell.

Safety, as tests/governor/test_policy_properties.py has it: from the same state a hotter zone never gives a
higher cap or duty; nothing exceeds a ceiling; unknown is never better than known and cool.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edgellm.governor.causes import Cause, Limit, Settings, State, Watch, watch
from edgellm.governor.sensors import Readings
from edgellm.scheduler.request import Priority

BACKED_OFF = frozenset({"throttle_alert", "over_current", "gpu_clock", "power"})
"""Causes that lower the duty step by step: they say that the board draws too much, not by how much."""

CAPPED = frozenset({"memory", "memory_pressure", "swap"})
"""Causes that lower the batch cap step by step."""

BLIND = frozenset({"sensor_unknown", "sensors_stale"})
"""Causes under which the controller has nothing to go by."""

DUTY_STEP_DOWN = 0.8
DUTY_STEP_UP = 0.05
SHED_DUTY = 0.5
"""The controller's duty is multiplied by this when SHED is entered: it was too high."""

LONGEST_DWELL = 20
"""A state that is entered again within so many dwells after a better one has its own dwell doubled, up to so
many: whatever swings, with the default of 30 s there are at most 12 transitions an hour in the end."""

NO_CAUSE = Cause("none", State.NORMAL, "nothing to back off from")
NO_ZONES = Cause("none", State.NORMAL, "no thermal zone governs on this host: heat is not watched")
DISABLED = Cause("none", State.NORMAL, "the governor is switched off: only limits act")


@dataclass(frozen=True, slots=True)
class Decision:
    """What may run until the next decision.

    Attributes:
        state: see State.
        batch_cap: rows that may run at once; 0: all pause where they are.
        duty: share of time in which steps run, 0…1; after a step of t seconds the engine pauses
            t·(1 / duty − 1). Cap and duty are 0 together.
        reason: name of the one cause that the state is owed to, or `none`.
        detail: a sentence for a person.
        causes: everything that is wrong right now.
    """

    state: State
    batch_cap: int
    duty: float
    reason: str
    detail: str
    causes: tuple[Cause, ...] = ()

    def admits(self, priority: Priority) -> bool:
        """Whether a new request of this priority is taken; if not it is answered `overloaded`."""
        if self.state is State.CRITICAL:
            return False
        return self.state is not State.SHED or priority <= Priority.HIGH


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What the policy remembers. Begins empty; nothing of it depends on the configuration.

    Attributes:
        state, since: the state, and when it was entered.
        calm_since: since when nothing asks for the state any more.
        dwells: how many dwells of calm it takes to leave the state.
        improved_at: when a state was last left for a better one.
        blame: the cause that the state is owed to.
        watch: what the causes remember.
        heat_duty: the controller's output, before ceilings.
        stress_duty, cap: as stepped down by other causes; cap None: not lowered.
        stepped_at: when a step was last taken.
        applied: the duty that was last decided.
        limits: ceilings that others asked for.
    """

    state: State = State.NORMAL
    since: float = 0.0
    calm_since: float | None = None
    dwells: int = 1
    improved_at: float = float("-inf")
    blame: Cause = NO_CAUSE
    watch: Watch = field(default_factory=Watch)
    heat_duty: float = 1.0
    stress_duty: float = 1.0
    cap: int | None = None
    stepped_at: float = float("-inf")
    applied: float = 1.0
    limits: tuple[Limit, ...] = ()


def with_limit(state: PolicyState, limit: Limit) -> PolicyState:
    """Add a ceiling, in place of one that the same component asked for before."""
    return replace(state, limits=(*without_limit(state, limit.by).limits, limit))


def without_limit(state: PolicyState, by: str | None) -> PolicyState:
    """Take back the ceiling that a component asked for; None: all of them."""
    return replace(state, limits=tuple(limit for limit in state.limits if by is not None and limit.by != by))


def step(
    settings: Settings, state: PolicyState, readings: Readings | None, now: float
) -> tuple[PolicyState, Decision]:
    """Decide. Call it once per sweep, and when a limit changes; more often changes nothing.

    Args:
        settings: may differ from call to call: that is how a reload takes effect.
        state: what the last call returned, or PolicyState() at first.
        readings: the latest sweep, however old; None before the first.
        now: seconds of the clock that `Readings.at` was read from.
    """
    state = replace(state, limits=tuple(e for e in state.limits if e.until is None or now < e.until))
    if settings.governor.enabled:
        memory, causes = watch(settings, state.watch, readings, now)
    else:
        memory, causes = Watch(), []
    causes.extend(_limit_causes(state.limits))
    state = replace(state, watch=memory)
    state = _steps(settings, state, causes, now)
    after = _transition(settings, state, causes, now)
    after = _control_heat(settings, state, after, blind=any(cause.name in BLIND for cause in causes))
    cap, duty = _actuate(settings, after, causes)
    after = replace(after, applied=duty)
    return after, _decision(settings, after, causes, cap, duty)


def _limit_causes(limits: tuple[Limit, ...]) -> list[Cause]:
    causes = []
    for limit in sorted(limits, key=lambda limit: not limit.suspends):
        if limit.suspends:
            causes.append(Cause("suspend", State.THROTTLED, f"suspended by {limit.by}"))
        else:
            ceilings = [f"batch {limit.batch}"] if limit.batch is not None else []
            ceilings += [f"duty {limit.duty:.2f}"] if limit.duty is not None else []
            causes.append(Cause("limit", State.THROTTLED, f"limited by {limit.by}: {', '.join(ceilings)}"))
    return causes


def _transition(settings: Settings, state: PolicyState, causes: list[Cause], now: float) -> PolicyState:
    worst = max(causes, key=lambda cause: cause.state, default=NO_CAUSE)  # the first of equals
    if worst.state >= state.state:
        blame = worst if worst.state > State.NORMAL else NO_CAUSE
        after = replace(state, calm_since=None, blame=blame)
        return _worsened(settings, after, worst.state, now) if worst.state > state.state else after
    calm_since = now if state.calm_since is None else state.calm_since
    calm = now - calm_since >= state.dwells * settings.governor.dwell_s
    if not calm or (state.state is State.THROTTLED and not _recovered(settings, state)):
        return replace(state, calm_since=calm_since)
    if state.state is State.THROTTLED:
        better, blame = State.NORMAL, NO_CAUSE
    else:
        # One dwell in THROTTLED at least: NORMAL is never entered from a worse state.
        better, blame = (
            max(worst.state, State.THROTTLED),
            worst if worst.state > State.NORMAL else state.blame,
        )
    return replace(state, state=better, since=now, calm_since=None, improved_at=now, blame=blame)


def _worsened(settings: Settings, state: PolicyState, worse: State, now: float) -> PolicyState:
    relapsed = now - state.improved_at < LONGEST_DWELL * settings.governor.dwell_s
    dwells = min(2 * state.dwells, LONGEST_DWELL) if relapsed else 1
    return replace(state, state=worse, since=now, dwells=dwells)


def _recovered(settings: Settings, state: PolicyState) -> bool:
    """Whether THROTTLED has given back, step by step, all that it took: NORMAL then changes nothing."""
    duty = settings.limits.duty
    capped = state.cap is not None and state.cap < settings.batch
    return state.heat_duty >= duty and state.stress_duty >= duty and not capped


def _control_heat(settings: Settings, before: PolicyState, after: PolicyState, *, blind: bool) -> PolicyState:
    """The duty that heat leaves: all of it, the floor, or what the controller finds in between."""
    top = settings.limits.duty
    floor = min(settings.governor.duty_floor, top)
    duty = min(after.heat_duty, top)
    if after.state is State.NORMAL:
        duty = top
    elif after.state is State.CRITICAL:
        duty = floor
    elif after.state is State.SHED:
        if before.state is not State.SHED:
            duty = max(floor, SHED_DUTY * duty)
    elif not blind:
        duty = min(max(_controlled(settings, after, duty, floor), floor), top)
    return replace(after, heat_duty=duty)


def _controlled(settings: Settings, state: PolicyState, duty: float, floor: float) -> float:
    """The duty that keeps the hottest zone at its target: a PI controller in velocity form.

    Δduty = −gain·(Δm + (m + target)·Δt / reset), with m the filtered margin; clamped to the rate limits.
    """
    config, seen = settings.governor, state.watch
    hottest = seen.hottest
    rise = config.duty_rise_per_s * seen.elapsed
    if hottest is None or seen.smooth is None:
        return duty + rise
    error = seen.smooth + config.target_below_c
    change = -config.duty_gain * (seen.change + error * seen.elapsed / config.duty_reset_s)
    # Where something else holds the duty lower, what the controller asks for is not what heats: it must
    # neither wind up nor begin a descent from a height that was never applied.
    if state.applied < duty and change > 0:
        change = 0.0
    if state.applied < duty and change < 0 and error > 0:
        duty = max(state.applied, floor)
    if hottest.margin < -config.normal_below_c:
        change = max(change, rise)
    return duty + min(max(change, -config.duty_fall_per_s * seen.elapsed), rise)


def _steps(settings: Settings, state: PolicyState, causes: list[Cause], now: float) -> PolicyState:
    """Steps of cap and stress duty: one down as long as a cause lasts, one up when none does."""
    config = settings.governor
    if state.watch.elapsed <= 0 or now - state.stepped_at < config.step_s:
        return state  # steps answer to sweeps: without a new one nothing is given back, either
    names = {cause.name for cause in causes}
    smooth = state.watch.smooth
    # Pauses alone do not cool it: fewer rows are the only thing left above the floor.
    at_floor = state.heat_duty <= config.duty_floor and smooth is not None and smooth > -config.target_below_c
    cap = settings.batch if state.cap is None else min(state.cap, settings.batch)
    if names & CAPPED or at_floor:
        new_cap = max(1, cap - max(1, cap // 4))
    else:
        new_cap = min(settings.batch, cap + 1)
    if names & BACKED_OFF:
        duty = max(config.duty_floor, state.stress_duty * DUTY_STEP_DOWN)
    else:
        duty = min(1.0, state.stress_duty + DUTY_STEP_UP)
    if (new_cap, duty) == (cap, state.stress_duty):
        return replace(state, cap=cap)
    return replace(state, cap=new_cap, stress_duty=duty, stepped_at=now)


def _actuate(settings: Settings, state: PolicyState, causes: list[Cause]) -> tuple[int, float]:
    config = settings.governor
    cap, duty = settings.batch, settings.limits.duty
    for limit in state.limits:
        cap = cap if limit.batch is None else min(cap, limit.batch)
        duty = duty if limit.duty is None else min(duty, limit.duty)
    if state.state is State.CRITICAL:
        return 0, 0.0
    if state.state is State.SHED:
        cap, duty = min(cap, 1), min(duty, config.duty_floor)
    elif state.state is State.THROTTLED:
        cap = cap if state.cap is None else min(cap, state.cap)
        duty = min(duty, state.heat_duty, state.stress_duty)
    if state.state is not State.NORMAL and any(cause.name in BLIND for cause in causes):
        # In SHED too: a floor above it must not let a hotter board do more.
        duty = min(duty, config.duty_unknown)
    return (cap, duty) if cap > 0 and duty > 0 else (0, 0.0)


def _decision(settings: Settings, state: PolicyState, causes: list[Cause], cap: int, duty: float) -> Decision:
    blame = state.blame
    if state.state is State.NORMAL:
        if not settings.governor.enabled:
            blame = DISABLED
        elif not state.watch.seen:
            blame = NO_ZONES
    current = state.calm_since is None or state.state is State.NORMAL
    detail = blame.detail if current else f"recovering: {blame.detail}"
    return Decision(state.state, cap, duty, blame.name, detail, tuple(causes))

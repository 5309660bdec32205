"""Why edgellm should back off: readings and what was seen before → causes. Pure, like the policy."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from edgellm.governor.config import GovernorConfig, LimitsConfig, SensorsConfig
from edgellm.governor.platform import Board
from edgellm.governor.sensors import Memory, Readings, Zone

MEBIBYTE = 1 << 20
BUSY = 0.9
"""A GPU with this load or more has a reason to run at its maximal clock."""
SLOW_S = 3.0
SWAP_WINDOW_S = 60.0
RELEASE = 1.25
"""A memory line is left when the value is better than the line by this factor."""
LONGEST_GAP_S = 5.0
"""Time that one sweep may stand for: after a longer gap the controller acts as after this one."""


class State(enum.IntEnum):
    """What edgellm does about the board's condition, from best to worst."""

    NORMAL = 0
    THROTTLED = 1
    SHED = 2
    CRITICAL = 3


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason to be in a state.

    Attributes:
        name: heat, throttle_alert, over_current, gpu_clock, power, memory, memory_pressure, swap,
            sensor_unknown, sensors_stale, limit or suspend: stable, for metrics and journal fields.
        state: what it asks for.
        detail: a sentence for a person, with the sensor and its value.
    """

    name: str
    state: State
    detail: str


@dataclass(frozen=True, slots=True)
class Limit:
    """A ceiling that another component asked for.

    Attributes:
        by: who asked; each has one limit at most, a new one replaces the old.
        batch: rows that may run, None: not limited.
        duty: 0…1, None: not limited.
        until: clock seconds when it ends by itself, None: when it is taken back.
    """

    by: str
    batch: int | None = None
    duty: float | None = None
    until: float | None = None

    @property
    def suspends(self) -> bool:
        """Whether nothing at all may run."""
        return self.batch == 0 or self.duty == 0


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the policy is told once: configuration, what must be readable, and the engine's slots."""

    slots: int
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    required: tuple[str, ...] = ()
    thermal: bool = False

    @classmethod
    def of(
        cls, governor: GovernorConfig, limits: LimitsConfig, sensors: SensorsConfig, board: Board, slots: int
    ) -> Settings:
        """Settings for a board; a configured `sensors.required` replaces what is expected of the board."""
        if sensors.required is not None:
            return cls(slots, governor, limits, tuple(sensors.required))
        return cls(slots, governor, limits, board.expects.required, board.expects.thermal)

    @property
    def batch(self) -> int:
        """Rows that run at the best of times."""
        return min(self.limits.batch, self.slots) if self.limits.batch else self.slots


@dataclass(frozen=True, slots=True)
class Seen:
    """A zone's last known temperature: margin is °C above its passive trip, at clock seconds `at`."""

    zone: str
    celsius: float
    margin: float
    at: float


@dataclass(frozen=True, slots=True)
class Watch:
    """What the causes remember from sweep to sweep.

    Attributes:
        at: `Readings.at` of the last sweep taken into account.
        elapsed: seconds between the last two sweeps, at most LONGEST_GAP_S; 0 when there was no new one.
        seen: governing zones, as last known.
        smooth, change: the hottest margin filtered, °C, and what the last sweep changed of it.
        rise: °C that the last sweep expects the hottest margin to rise within look_ahead_s, at least 0.
        heat, memory: what these ask for, with hysteresis.
        risen_from: (clock, hottest margin) that `escalate_s` compares with.
        counters: over-current counters as last known.
        event_until, slow_since, swap: over-current hold, GPU slow since, (clock, free bytes) to compare with.
    """

    at: float | None = None
    elapsed: float = 0.0
    seen: tuple[Seen, ...] = ()
    smooth: float | None = None
    change: float = 0.0
    rise: float = 0.0
    heat: State = State.NORMAL
    memory: State = State.NORMAL
    pressure: State = State.NORMAL
    risen_from: tuple[float, float] | None = None
    counters: tuple[tuple[str, int], ...] = ()
    event_until: float = -math.inf
    slow_since: float | None = None
    swap: tuple[float, int] | None = None

    @property
    def hottest(self) -> Seen | None:
        """The zone closest to its trip, or furthest above it."""
        return max(self.seen, key=lambda seen: seen.margin, default=None)


def watch(
    settings: Settings, before: Watch, readings: Readings | None, now: float
) -> tuple[Watch, list[Cause]]:
    """Take a sweep into account.

    Args:
        readings: the latest sweep, also if it was seen before; None: there was none yet.
        now: clock seconds, never less than at the last call.

    Returns:
        what to remember, and all causes, in the order in which they are named when equally severe.
    """
    config = settings.governor
    fresh = readings if readings is not None and now - readings.at <= config.stale_s else None
    new = fresh is not None and fresh.at != before.at
    after = replace(before, elapsed=0.0, change=0.0)
    if fresh is not None and new:
        gap = 0.0 if before.at is None else fresh.at - before.at
        after = replace(after, at=fresh.at, elapsed=min(max(gap, 0.0), LONGEST_GAP_S))
    after = _watch_heat(config, after, fresh, now)
    if fresh is not None:
        after = _watch_counters(config, after, fresh, now)
        after = _watch_memory(config, after, fresh.memory, now)
        slow = _gpu_is_slow(config, fresh)
        since = now if after.slow_since is None else after.slow_since
        after = replace(after, slow_since=since if slow else None)
    return after, list(_causes(settings, after, readings, fresh, now))


def _watch_heat(config: GovernorConfig, before: Watch, readings: Readings | None, now: float) -> Watch:
    seen = {entry.zone: entry for entry in before.seen if _still_hot(config, entry, now)}
    for zone in readings.zones if readings else ():
        if zone.celsius is not None and zone.margin is not None:
            seen[zone.name] = Seen(zone.name, zone.celsius, zone.margin, now)
    after = replace(before, seen=tuple(seen.values()))
    hottest = after.hottest
    if hottest is None:
        return replace(after, smooth=None, rise=0.0, heat=State.NORMAL, risen_from=None)
    margin = hottest.margin
    if before.smooth is None:
        after = replace(after, smooth=margin)
    elif before.elapsed > 0:
        share = 1.0 - math.exp(-before.elapsed / config.smooth_s) if config.smooth_s > 0 else 1.0
        change = share * (margin - before.smooth)
        after = replace(after, smooth=before.smooth + change, change=change)
    if before.elapsed > 0:
        # Kept until the next sweep: asking again in between must not take a rise for over.
        after = replace(after, rise=max(0.0, after.change / before.elapsed) * config.look_ahead_s)
    heat = _heat_state(config, before.heat, margin, margin + after.rise)
    return _escalated(config, replace(after, heat=heat), margin, now)


def _still_hot(config: GovernorConfig, entry: Seen, now: float) -> bool:
    """Whether a zone that is not readable now goes on counting: it was hot a short while ago."""
    return entry.margin >= -config.normal_below_c and now - entry.at <= config.hold_unknown_s


def _heat_state(config: GovernorConfig, before: State, margin: float, ahead: float) -> State:
    if margin >= 0 or (before is State.CRITICAL and margin >= -config.critical_exit_below_c):
        return State.CRITICAL
    if margin >= -config.shed_below_c or (before >= State.SHED and margin >= -config.shed_exit_below_c):
        return State.SHED
    entered = margin >= -config.throttle_below_c or ahead >= -config.shed_below_c
    if entered or (before >= State.THROTTLED and margin >= -config.normal_below_c):
        return State.THROTTLED
    return State.NORMAL


def _escalated(config: GovernorConfig, after: Watch, margin: float, now: float) -> Watch:
    """SHED runs at the floor: if that does not stop the rise, nothing but a pause is left."""
    if after.heat is not State.SHED or margin < -config.shed_below_c:
        return replace(after, risen_from=None)
    if after.risen_from is None:
        return replace(after, risen_from=(now, margin))
    since, then = after.risen_from
    if now - since < config.escalate_s:
        return after
    if margin >= then + 1.0:
        return replace(after, heat=State.CRITICAL, risen_from=None)
    return replace(after, risen_from=(now, margin))


def _watch_counters(config: GovernorConfig, before: Watch, readings: Readings, now: float) -> Watch:
    """A counter that went up is an event. One that went down was reset, and is where counting begins anew."""
    known = dict(before.counters)
    event = False
    for name, count in readings.over_current.items():
        if count is not None:
            event = event or count > known.get(name, count)
            known[name] = count
    # Held for a step, so that the duty answers to every event.
    until = now + config.step_s if event else before.event_until
    return replace(before, counters=tuple(known.items()), event_until=until)


def _watch_memory(config: GovernorConfig, before: Watch, memory: Memory, now: float) -> Watch:
    after = replace(
        before,
        memory=_memory_state(config, before.memory, memory),
        pressure=_pressure_state(config, before.pressure, memory),
    )
    free = memory.swap_free
    if free is None:
        return replace(after, swap=None)
    if after.swap is None or free >= after.swap[1] or now - after.swap[0] > SWAP_WINDOW_S:
        return replace(after, swap=(now, free))
    return after


def _memory_state(config: GovernorConfig, before: State, memory: Memory) -> State:
    if memory.available is None:
        return before
    for line, state in ((config.memory_hard_mib, State.SHED), (config.memory_soft_mib, State.THROTTLED)):
        bound = line * MEBIBYTE * (RELEASE if before >= state else 1.0)
        if memory.available < bound:
            return state
    return State.NORMAL


def _pressure_state(config: GovernorConfig, before: State, memory: Memory) -> State:
    if memory.psi_some is None or memory.psi_full is None:
        return State.NORMAL  # the kernel does not count it: pressure is optional
    for value, line, state in (
        (memory.psi_full, config.psi_full_percent, State.SHED),
        (memory.psi_some, config.psi_some_percent, State.THROTTLED),
    ):
        if value > (line / RELEASE if before >= state else line):
            return state
    return State.NORMAL


def _gpu_is_slow(config: GovernorConfig, readings: Readings) -> bool:
    gpu = readings.gpu
    if gpu is None or gpu.load is None or gpu.hertz is None or gpu.max_hertz is None:
        return False
    return gpu.load >= BUSY and gpu.hertz < config.gpu_clock_share * gpu.max_hertz


def module_watts(readings: Readings) -> float | None:
    """What the module draws, W: VDD_IN where there is one, else the rails of an AGX; None: unknown.

    An AGX has no total. Its VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0 and would count twice.
    """
    if "VDD_IN" in readings.rails:
        return readings.rails["VDD_IN"]
    watts = [value for name, value in readings.rails.items() if name != "VDDQ_VDD2_1V8AO"]
    known = [value for value in watts if value is not None]
    return sum(known) if watts and len(known) == len(watts) else None


def _causes(
    settings: Settings, after: Watch, readings: Readings | None, fresh: Readings | None, now: float
) -> Iterator[Cause]:
    config = settings.governor
    if after.heat > State.NORMAL and (hottest := after.hottest):
        yield Cause("heat", after.heat, _heat_detail(hottest, now))
    if fresh is None:
        age = (
            "no sensor reading yet"
            if readings is None
            else f"sensor readings are {now - readings.at:.0f} s old"
        )
        yield Cause("sensors_stale", State.THROTTLED, age)
    else:
        yield from _unknown(settings, fresh)
        yield from _throttling(config, after, fresh, now)
        yield from _shortage(config, after, fresh.memory)


def _heat_detail(hottest: Seen, now: float) -> str:
    known = "" if hottest.at == now else f", unreadable for {now - hottest.at:.0f} s"
    where = "above" if hottest.margin >= 0 else "below"
    return f"{hottest.zone} {hottest.celsius:.1f} °C{known}, {abs(hottest.margin):.1f} °C {where} its trip"


def _unknown(settings: Settings, readings: Readings) -> Iterator[Cause]:
    if settings.thermal and not any(map(_readable, readings.zones)):
        yield Cause("sensor_unknown", State.THROTTLED, "no thermal zone is readable on a board that has some")
        return
    missing = [name for name in settings.required if not readings.known(name)]
    if missing:
        yield Cause("sensor_unknown", State.THROTTLED, f"required but not readable: {', '.join(missing)}")


def _readable(zone: Zone) -> bool:
    return zone.celsius is not None


def _throttling(config: GovernorConfig, after: Watch, readings: Readings, now: float) -> Iterator[Cause]:
    alerts = [name for name, value in readings.throttling.items() if value]
    if alerts:
        yield Cause("throttle_alert", State.THROTTLED, f"the board throttles: {', '.join(alerts)}")
    if now < after.event_until:
        yield Cause("over_current", State.THROTTLED, "an over-current counter went up")
    if after.slow_since is not None and now - after.slow_since >= SLOW_S and readings.gpu:
        megahertz, most = (
            value / 1e6 if value else 0.0 for value in (readings.gpu.hertz, readings.gpu.max_hertz)
        )
        yield Cause("gpu_clock", State.THROTTLED, f"the GPU is busy at {megahertz:.0f} of {most:.0f} MHz")
    watts = module_watts(readings)
    if config.power_limit_w and watts is not None and watts > config.power_limit_w:
        yield Cause("power", State.THROTTLED, f"{watts:.1f} W, more than {config.power_limit_w:.1f} W")


def _shortage(config: GovernorConfig, after: Watch, memory: Memory) -> Iterator[Cause]:
    if after.memory > State.NORMAL:
        line = config.memory_hard_mib if after.memory is State.SHED else config.memory_soft_mib
        free = "unknown" if memory.available is None else f"{memory.available / MEBIBYTE:.0f} MiB"
        yield Cause("memory", after.memory, f"available memory {free}; the line is {line} MiB")
    if after.pressure > State.NORMAL:
        detail = f"memory pressure over 10 s: some {memory.psi_some:.0f} %, full {memory.psi_full:.0f} %"
        yield Cause("memory_pressure", after.pressure, detail)
    if config.swap_growth_mib and after.swap is not None and memory.swap_free is not None:
        grown = (after.swap[1] - memory.swap_free) / MEBIBYTE
        if grown > config.swap_growth_mib:
            yield Cause("swap", State.THROTTLED, f"{grown:.0f} MiB were swapped out within a minute")

"""Heat: how far the hottest zone is from where throttling begins, and whether something throttles already."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host


def check_thermal(host: Host) -> Iterator[Finding]:
    """Headroom, zones that cannot be read, throttling now, over-current events since boot."""
    if not host.running:
        yield Finding.not_asked("thermal")
        return
    if not host.sensors_answered:
        yield Finding(
            "sensors",
            Level.FAIL if host.tegra else Level.WARN,
            "sensors did not answer",
            "a read hangs, as a rule in firmware: the governor takes them for unknown and stays THROTTLED",
            "see dmesg for bpmp and thermal; a restart of the board ends it",
        )
        return
    yield _headroom(host)
    yield from _required(host)
    yield from _throttling(host)


def _headroom(host: Host) -> Finding:
    governor = host.config.governor
    zones = host.readings.zones
    governing = [(zone.margin, zone) for zone in zones if zone.margin is not None]
    if not governing:
        if host.tegra:
            return Finding(
                "thermal",
                Level.FAIL,
                f"none of {len(zones)} zones can be read",
                "the governor fails closed: THROTTLED for good",
                "show the host's /sys/class/thermal to this container; a guest without sensors sets"
                " sensors.required = []",
            )
        return Finding("thermal", Level.OK, "no zone with a trip", "a generic host: the governor runs NORMAL")
    margin, zone = max(governing, key=lambda found: found[0])
    value = f"{zone.name} {zone.celsius:.1f} °C, {-margin:.1f} °C below its trip at {zone.passive:.1f} °C"
    cool = "let the board cool, check fan and heat sink, or lower limits.duty"
    if margin >= 0:
        value = f"{zone.name} {zone.celsius:.1f} °C, above its trip at {zone.passive:.1f} °C"
        return Finding("thermal", Level.FAIL, value, "the governor is CRITICAL: no request is served", cool)
    if margin >= -governor.shed_below_c:
        return Finding("thermal", Level.WARN, value, "the governor is SHED: urgent requests only", cool)
    if margin >= -governor.throttle_below_c:
        return Finding("thermal", Level.WARN, value, "the governor is THROTTLED: answers are slower", cool)
    return Finding("thermal", Level.OK, value)


def _required(host: Host) -> Iterator[Finding]:
    zones = host.readings.zones
    unknown = [zone.name for zone in zones if zone.celsius is None]
    configured = host.config.sensors.required
    required = host.board.expects.required if configured is None else configured
    missing = [name for name in required if not host.readings.known(name)]
    if missing and any(zone.celsius is not None for zone in zones):
        yield Finding(
            "sensors",
            Level.WARN,
            f"{', '.join(missing)} cannot be read",
            "it is required: the governor stays THROTTLED",
            "see dmesg for thermal; sensors.required in the configuration says what must be readable",
        )
    elif zones:
        off = f"; off: {', '.join(unknown)}" if unknown else ""
        yield Finding("sensors", Level.OK, f"{len(zones) - len(unknown)} of {len(zones)} zones readable{off}")


def _throttling(host: Host) -> Iterator[Finding]:
    readings = host.readings
    if not (readings.throttling or readings.over_current):
        return
    active = [f"{name} ({state})" for name, state in readings.throttling.items() if state]
    events = [f"{name} {count}" for name, count in readings.over_current.items() if count]
    if active:
        yield Finding(
            "throttling",
            Level.WARN,
            f"now: {', '.join(active)}",
            "the hardware lowers clocks by itself; the governor is THROTTLED",
            "let the board cool, or choose a power mode that its cooling can bear",
        )
    if events:
        yield Finding(
            "over-current",
            Level.WARN,
            f"since boot: {', '.join(events)}",
            "oc1 is under-voltage, oc2 average and oc3 peak current: each lowered the clocks for a moment",
            "check the power supply and the power mode (nvpmodel)",
        )
    if not active and not events:
        yield Finding("throttling", Level.OK, "none now, no over-current event since boot")

"""Where a board's sensors are: found by type and name, never by index. No value is read here.

Indices move (a module is loaded again, and hwmon3 is another chip), so whatever is found carries an Identity:
the file that must still say the same when a value is read.

Layouts: Documentation/ABI/testing/sysfs-class-thermal, sysfs-class-devfreq and sysfs-class-hwmon of the Linux
kernel; zone, rail and cooling device names from NVIDIA's public device trees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.governor.platform import ORIN_CRITICAL_C, ORIN_PASSIVE_C, Expectations

LOWEST_TRIP_C = 50.0
HIGHEST_TRIP_C = 150.0
"""Trips outside these say nothing about heat: unset ones (0, −274 °C) on PCs."""


NOT_THROTTLING = ("pwm-fan", "hot-surface-alert", "fan", "tegra-pwm-fan")
"""Cooling devices whose trips and states say nothing about throttling. Jetson zones carry a *passive* trip at
70 °C that is bound to `hot-surface-alert` alone: the housing may be hot to touch, no clock is lowered."""

THROTTLING = re.compile(r"-throttle-alert$|^devfreq-.*(gpu|ga10b)$|^(thermal-)?cpufreq-")
"""Cooling devices whose cur_state > 0 says that the SoC, the GPU or the CPU is being throttled right now."""

GPU_DEVFREQ = re.compile(r"(^|\.)(gpu|ga10b|gv11b)$")


READ_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Identity:
    """A file that must say `text` for the sensor beside it to be the one that was found."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class ZonePaths:
    """A thermal zone: where its temperature is, and its trips in °C."""

    name: str
    identity: Identity
    celsius: str
    passive: float | None
    critical: float | None
    hot: float | None


@dataclass(frozen=True, slots=True)
class ValuePath:
    """A file with one number."""

    name: str
    identity: Identity
    path: str


@dataclass(frozen=True, slots=True)
class RailPaths:
    """One channel of an INA3221."""

    name: str
    identity: Identity
    millivolt: str
    milliampere: str


@dataclass(frozen=True, slots=True)
class GpuPaths:
    """The GPU's clock; `load` are the places where drivers have put it."""

    hertz: str
    min_hertz: str
    max_hertz: str
    load: tuple[str, ...]


@dataclass(slots=True)
class Found:
    """Everything that was found."""

    zones: list[ZonePaths] = field(default_factory=list)
    throttling: list[ValuePath] = field(default_factory=list)
    over_current: list[ValuePath] = field(default_factory=list)
    rails: list[RailPaths] = field(default_factory=list)
    gpu: GpuPaths | None = None


def discover(root: Path, expects: Expectations) -> Found:
    """Find every sensor below `root`. Reads types, names, trips and links; no value."""
    found = Found()
    for directory in _entries(root, "sys/class/thermal", "thermal_zone"):
        if zone := _discover_zone(directory, expects, taken={zone.name for zone in found.zones}):
            found.zones.append(zone)
    for directory in _entries(root, "sys/class/thermal", "cooling_device"):
        kind = (read_file(str(directory / "type")) or "").strip()
        if kind not in NOT_THROTTLING and THROTTLING.search(kind):
            identity = Identity(str(directory / "type"), kind)
            found.throttling.append(ValuePath(kind, identity, str(directory / "cur_state")))
    for directory in _entries(root, "sys/class/hwmon", "hwmon"):
        name = (read_file(str(directory / "name")) or "").strip()
        identity = Identity(str(directory / "name"), name)
        if name == "soctherm_oc":
            found.over_current.extend(
                ValuePath(file, identity, str(directory / file))
                for file in _names(directory)
                if re.fullmatch(r"oc\d+_event_cnt", file)
            )
        elif name == "ina3221":
            found.rails.extend(_discover_rails(directory, identity))
    found.gpu = _discover_gpu(root)
    return found


def _entries(root: Path, parent: str, stem: str) -> Iterator[Path]:
    directory = root / parent
    numbered = [name for name in _names(directory) if re.fullmatch(rf"{stem}\d+", name)]
    for name in sorted(numbered, key=lambda name: int(name[len(stem) :])):
        yield directory / name


def _discover_zone(directory: Path, expects: Expectations, taken: set[str]) -> ZonePaths | None:
    kind = (read_file(str(directory / "type")) or "").strip()
    if not kind:
        return None
    name, again = kind.lower(), 1
    while name in taken:  # PCs have several `acpitz`
        again += 1
        name = f"{kind.lower()}#{again}"
    trips = list(_trips(directory))
    lowest = {
        wanted: min((celsius for name, celsius in trips if name == wanted), default=None)
        for wanted in ("passive", "critical", "hot")
    }
    critical = expects.critical_c if lowest["critical"] is None else lowest["critical"]
    passive = lowest["passive"]
    if passive is None and expects.passive_c is not None and critical is not None:
        # A zone that shuts down earlier than usual also has to be spared earlier.
        passive = min(expects.passive_c, critical - (ORIN_CRITICAL_C - ORIN_PASSIVE_C))
    return ZonePaths(
        name=name,
        identity=Identity(str(directory / "type"), kind),
        celsius=str(directory / "temp"),
        passive=passive,
        critical=critical,
        hot=lowest["hot"],
    )


def _discover_gpu(root: Path) -> GpuPaths | None:
    parent = root / "sys/class/devfreq"
    for name in sorted(_names(parent)):
        if GPU_DEVFREQ.search(name):
            directory = parent / name
            return GpuPaths(
                hertz=str(directory / "cur_freq"),
                min_hertz=str(directory / "min_freq"),
                max_hertz=str(directory / "max_freq"),
                load=(
                    str(directory / "device/load"),
                    str(root / "sys/devices/platform" / name / "load"),
                    str(root / "sys/devices/platform/bus@0" / name / "load"),
                ),
            )
    return None


def _discover_rails(directory: Path, identity: Identity) -> Iterator[RailPaths]:
    for file in sorted(_names(directory)):
        found = re.fullmatch(r"in(\d+)_label", file)
        label = (read_file(str(directory / file)) or "").strip() if found else ""
        # "sum of shunt voltages" is a channel of the chip that has no current of its own.
        if found and label and (directory / f"curr{found[1]}_input").exists():
            yield RailPaths(
                name=label,
                identity=identity,
                millivolt=str(directory / f"in{found[1]}_input"),
                milliampere=str(directory / f"curr{found[1]}_input"),
            )


def _trips(directory: Path) -> Iterator[tuple[str, float]]:
    """A zone's (trip type, °C), without those that are unset or whose cooling devices throttle nothing."""
    cooling = list(_bindings(directory))
    for file in _names(directory):
        found = re.fullmatch(r"trip_point_(\d+)_type", file)
        if found is None:
            continue
        kind = (read_file(str(directory / file)) or "").strip()
        millidegrees = number(read_file(str(directory / f"trip_point_{found[1]}_temp")))
        if millidegrees is None or not LOWEST_TRIP_C <= millidegrees / 1000 <= HIGHEST_TRIP_C:
            continue
        bound = [device for trip, device in cooling if trip == int(found[1])]
        if kind == "passive" and bound and all(device in NOT_THROTTLING for device in bound):
            continue
        yield kind, millidegrees / 1000


def _bindings(directory: Path) -> Iterator[tuple[int, str]]:
    """(trip index, type of a cooling device bound to it): `cdevN` links to the device, `cdevN_trip_point` has
    the index."""
    for file in _names(directory):
        found = re.fullmatch(r"(cdev\d+)_trip_point", file)
        trip = number(read_file(str(directory / file))) if found else None
        kind = (read_file(str(directory / found[1] / "type")) or "").strip() if found else ""
        if trip is not None and kind:
            yield int(trip), kind


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - names only: no Path per entry
    except OSError:
        return []


def read_file(path: str, limit: int = READ_BYTES) -> str | None:
    """A file's text, or None. One open, one read, one close: sysfs gives a value whole."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(handle, limit).decode("ascii", "replace")
    except OSError:  # EIO, EAGAIN, ENODATA: how drivers say that a sensor is off
        return None
    finally:
        os.close(handle)


def number(text: str | None) -> float | None:
    """A whole number, or None: sysfs has no others, and what else a file says is no reading."""
    if text is None or re.fullmatch(r"\s*-?\d{1,18}\s*", text) is None:
        return None
    return float(text)

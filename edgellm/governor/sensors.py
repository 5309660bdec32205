"""What the board says about itself: discovered once, then read about once a second.

`Sensors` finds by type and name, never by index, and remembers paths. Indices move (a module is loaded
again, and hwmon3 is another chip), so a sweep reads each sensor's `type` or `name` again before its value: a
path that now belongs to something else, or to nothing, is *unknown*, and looking around again is allowed now
and then. Absent, unreadable, garbled and absurd values are all `None`: unknown, never cold.

Layouts: Documentation/ABI/testing/sysfs-class-thermal, sysfs-class-devfreq, sysfs-class-hwmon,
Documentation/accounting/psi.rst and Documentation/filesystems/proc.rst of the Linux kernel; zone, rail and
cooling device names from NVIDIA's public device trees.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.governor.platform import ORIN_CRITICAL_C, ORIN_PASSIVE_C, Board, identify_board

COLDEST_C = -40.0
HOTTEST_C = 150.0
"""Temperatures outside these are broken readings: −256 °C is how Tegra's firmware says that a zone is off."""

LOWEST_TRIP_C = 50.0
"""Trips below this say nothing about heat: unset ones (0, −274 °C) on PCs."""

NOT_THROTTLING = ("pwm-fan", "hot-surface-alert", "fan", "tegra-pwm-fan")
"""Cooling devices whose trips and states say nothing about throttling. Jetson zones carry a *passive* trip at
70 °C that is bound to `hot-surface-alert` alone: the housing may be hot to touch, no clock is lowered."""

THROTTLING = re.compile(r"-throttle-alert$|^devfreq-.*(gpu|ga10b)$|^(thermal-)?cpufreq-")
"""Cooling devices whose cur_state > 0 says that the SoC, the GPU or the CPU is being throttled right now."""

GPU_DEVFREQ = re.compile(r"(^|\.)(gpu|ga10b|gv11b)$")

_READ_BYTES = 4096
_MEMINFO_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Zone:
    """A thermal zone.

    Attributes:
        name: its `type`, lower case; `#2` and so on where several have the same.
        celsius: temperature, or None: unknown.
        passive: where throttling begins, °C: the zone's own, or the board's fallback; None: the zone does not
            govern.
        critical: where the board shuts down, °C, or None.
        hot: its `hot` trip, °C, or None.
    """

    name: str
    celsius: float | None
    passive: float | None = None
    critical: float | None = None
    hot: float | None = None

    @property
    def margin(self) -> float | None:
        """Degrees above the passive trip (negative: below), or None: unknown, or not governing."""
        if self.celsius is None or self.passive is None:
            return None
        return self.celsius - self.passive


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU's clock: Hz, and the share of time that it is busy, 0…1."""

    hertz: float | None
    min_hertz: float | None
    max_hertz: float | None
    load: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, and pressure in percent; None: unknown.

    Attributes:
        available: MemAvailable − CmaFree, which is nvmap's own idea of free where CPU and GPU share one DRAM.
        psi_some, psi_full: share of the last 10 s in which some, or all, tasks waited for memory; None where
            the kernel does not count it.
    """

    total: int | None = None
    available: int | None = None
    swap_total: int | None = None
    swap_free: int | None = None
    psi_some: float | None = None
    psi_full: float | None = None


@dataclass(frozen=True, slots=True)
class Readings:
    """One sweep.

    Attributes:
        at: clock seconds when the sweep was complete.
        zones: every thermal zone, by discovery.
        throttling: cooling devices that say something about throttling → cur_state, None: unknown.
        over_current: soctherm_oc counters, such as `oc3_event_cnt` → count since boot, None: unknown.
        gpu: None if no GPU clock was found.
        rails: INA3221 label → watts, None: unknown. Rails overlap: only VDD_IN is a module's total.
        memory: see Memory.
    """

    at: float
    zones: tuple[Zone, ...] = ()
    throttling: dict[str, int | None] = field(default_factory=dict)
    over_current: dict[str, int | None] = field(default_factory=dict)
    gpu: Gpu | None = None
    rails: dict[str, float | None] = field(default_factory=dict)
    memory: Memory = Memory()

    def known(self, name: str) -> bool:
        """Whether the sensor of that name is readable, in upper or lower case.

        Names are those of zones (`tj` stands for `tj-therm` and `tj-thermal`), rails, cooling devices and
        over-current counters, and `gpu-clock` and `memory`.
        """
        name = name.lower()
        values: list[tuple[str, object]] = [
            *((zone.name, zone.celsius) for zone in self.zones),
            *((zone.name.removesuffix("al").removesuffix("-therm"), zone.celsius) for zone in self.zones),
            *self.throttling.items(),
            *self.over_current.items(),
            *self.rails.items(),
            ("memory", self.memory.available),
            ("gpu-clock", self.gpu.hertz if self.gpu else None),
        ]
        return any(known.lower() == name and value is not None for known, value in values)


@dataclass(frozen=True, slots=True)
class _Identity:
    """A file that must say `text` for the sensor beside it to be the one that was found."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class _ZonePaths:
    name: str
    identity: _Identity
    celsius: str
    passive: float | None
    critical: float | None
    hot: float | None


@dataclass(frozen=True, slots=True)
class _ValuePath:
    name: str
    identity: _Identity
    path: str


@dataclass(frozen=True, slots=True)
class _RailPaths:
    name: str
    identity: _Identity
    millivolt: str
    milliampere: str


@dataclass(frozen=True, slots=True)
class _GpuPaths:
    hertz: str
    min_hertz: str
    max_hertz: str
    load: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    zones: list[_ZonePaths] = field(default_factory=list)
    throttling: list[_ValuePath] = field(default_factory=list)
    over_current: list[_ValuePath] = field(default_factory=list)
    rails: list[_RailPaths] = field(default_factory=list)
    gpu: _GpuPaths | None = None


class Sensors:
    """Finds the board's sensors and reads them. One thread uses it; a read may hang in firmware.

    Args:
        root: where /sys, /proc, /etc lie.
        board: None: identified below root.
        clock: monotonic seconds.
        rediscover_s: looking around again, after something vanished, at most this often.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        board: Board | None = None,
        clock: Callable[[], float] = time.monotonic,
        rediscover_s: float = 60.0,
    ) -> None:
        self._root = root
        self.board = identify_board(root) if board is None else board
        self._clock = clock
        self._rediscover_s = rediscover_s
        self._discovered_at = clock()
        self._lost = False
        self._watts: dict[str, float | None] = {}
        self._next_rail = 0
        self._found = self._discover()

    def read(self) -> Readings:
        """One sweep. Never raises; what cannot be read is None.

        Rails are all read in the first sweep, then one a sweep in turn, the others keeping their last value:
        older INA3221 drivers wait for a conversion at every read, some 7 ms each.
        """
        if self._lost and self._clock() - self._discovered_at >= self._rediscover_s:
            self._discovered_at = self._clock()
            self._found = self._discover()
            self._watts, self._next_rail = {}, 0
        self._lost = bool(self.board.expects.thermal and not self._found.zones)
        return Readings(
            zones=tuple(self._zone(paths) for paths in self._found.zones),
            throttling={paths.name: self._whole(paths) for paths in self._found.throttling},
            over_current={paths.name: self._whole(paths) for paths in self._found.over_current},
            gpu=self._gpu(),
            rails=self._rails(),
            memory=self._memory(),
            at=self._clock(),
        )

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────

    def _present(self, identity: _Identity) -> bool:
        text = _read(identity.path)
        if text is not None and text.strip() == identity.text:
            return True
        self._lost = True
        return False

    def _zone(self, paths: _ZonePaths) -> Zone:
        millidegrees = _number(_read(paths.celsius)) if self._present(paths.identity) else None
        celsius = None if millidegrees is None else millidegrees / 1000
        if celsius is not None and not COLDEST_C <= celsius <= HOTTEST_C:
            celsius = None
        return Zone(paths.name, celsius, paths.passive, paths.critical, paths.hot)

    def _whole(self, paths: _ValuePath) -> int | None:
        value = _number(_read(paths.path)) if self._present(paths.identity) else None
        return None if value is None or value < 0 else int(value)

    def _gpu(self) -> Gpu | None:
        paths = self._found.gpu
        if paths is None:
            return None
        permille = next((n for n in map(_number, map(_read, paths.load)) if n is not None), None)
        load = permille / 1000 if permille is not None and 0 <= permille <= 1000 else None
        return Gpu(_hertz(paths.hertz), _hertz(paths.min_hertz), _hertz(paths.max_hertz), load)

    def _rails(self) -> dict[str, float | None]:
        rails = self._found.rails
        if len(self._watts) < len(rails):
            self._watts = {paths.name: self._watt(paths) for paths in rails}
        elif rails:
            self._next_rail = (self._next_rail + 1) % len(rails)
            paths = rails[self._next_rail]
            self._watts[paths.name] = self._watt(paths)
        return dict(self._watts)

    def _watt(self, paths: _RailPaths) -> float | None:
        if not self._present(paths.identity):
            return None
        millivolt, milliampere = _number(_read(paths.millivolt)), _number(_read(paths.milliampere))
        if millivolt is None or milliampere is None:
            return None
        watts = millivolt * milliampere / 1e6
        return watts if 0 <= watts <= 1000 else None

    def _memory(self) -> Memory:
        values = dict(_meminfo(_read(str(self._root / "proc/meminfo"), _MEMINFO_BYTES) or ""))
        available = values.get("MemAvailable")
        if available is not None:
            available = max(0, available - values.get("CmaFree", 0))
        pressure = dict(_pressure(_read(str(self._root / "proc/pressure/memory")) or ""))
        return Memory(
            total=values.get("MemTotal"),
            available=available,
            swap_total=values.get("SwapTotal"),
            swap_free=values.get("SwapFree"),
            psi_some=pressure.get("some"),
            psi_full=pressure.get("full"),
        )

    # ── discovery ───────────────────────────────────────────────────────────────────────────────────────────

    def _discover(self) -> _Found:
        found = _Found()
        for directory in self._entries("sys/class/thermal", "thermal_zone"):
            if zone := self._discover_zone(directory, taken={zone.name for zone in found.zones}):
                found.zones.append(zone)
        for directory in self._entries("sys/class/thermal", "cooling_device"):
            kind = (_read(str(directory / "type")) or "").strip()
            if kind not in NOT_THROTTLING and THROTTLING.search(kind):
                identity = _Identity(str(directory / "type"), kind)
                found.throttling.append(_ValuePath(kind, identity, str(directory / "cur_state")))
        for directory in self._entries("sys/class/hwmon", "hwmon"):
            name = (_read(str(directory / "name")) or "").strip()
            identity = _Identity(str(directory / "name"), name)
            if name == "soctherm_oc":
                found.over_current.extend(
                    _ValuePath(file, identity, str(directory / file))
                    for file in _names(directory)
                    if re.fullmatch(r"oc\d+_event_cnt", file)
                )
            elif name == "ina3221":
                found.rails.extend(_discover_rails(directory, identity))
        found.gpu = self._discover_gpu()
        return found

    def _entries(self, parent: str, stem: str) -> Iterator[Path]:
        directory = self._root / parent
        numbered = [name for name in _names(directory) if re.fullmatch(rf"{stem}\d+", name)]
        for name in sorted(numbered, key=lambda name: int(name[len(stem) :])):
            yield directory / name

    def _discover_zone(self, directory: Path, taken: set[str]) -> _ZonePaths | None:
        kind = (_read(str(directory / "type")) or "").strip()
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
        expects = self.board.expects
        critical = expects.critical_c if lowest["critical"] is None else lowest["critical"]
        passive = lowest["passive"]
        if passive is None and expects.passive_c is not None and critical is not None:
            # A zone that shuts down earlier than usual also has to be spared earlier.
            passive = min(expects.passive_c, critical - (ORIN_CRITICAL_C - ORIN_PASSIVE_C))
        return _ZonePaths(
            name=name,
            identity=_Identity(str(directory / "type"), kind),
            celsius=str(directory / "temp"),
            passive=passive,
            critical=critical,
            hot=lowest["hot"],
        )

    def _discover_gpu(self) -> _GpuPaths | None:
        parent = self._root / "sys/class/devfreq"
        for name in sorted(_names(parent)):
            if GPU_DEVFREQ.search(name):
                directory = parent / name
                return _GpuPaths(
                    hertz=str(directory / "cur_freq"),
                    min_hertz=str(directory / "min_freq"),
                    max_hertz=str(directory / "max_freq"),
                    load=(
                        str(directory / "device/load"),
                        str(self._root / "sys/devices/platform" / name / "load"),
                        str(self._root / "sys/devices/platform/bus@0" / name / "load"),
                    ),
                )
        return None


def _discover_rails(directory: Path, identity: _Identity) -> Iterator[_RailPaths]:
    for file in sorted(_names(directory)):
        found = re.fullmatch(r"in(\d+)_label", file)
        label = (_read(str(directory / file)) or "").strip() if found else ""
        # "sum of shunt voltages" is a channel of the chip that has no current of its own.
        if found and label and (directory / f"curr{found[1]}_input").exists():
            yield _RailPaths(
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
        kind = (_read(str(directory / file)) or "").strip()
        millidegrees = _number(_read(str(directory / f"trip_point_{found[1]}_temp")))
        if millidegrees is None or not LOWEST_TRIP_C <= millidegrees / 1000 <= HOTTEST_C:
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
        trip = _number(_read(str(directory / file))) if found else None
        kind = (_read(str(directory / found[1] / "type")) or "").strip() if found else ""
        if trip is not None and kind:
            yield int(trip), kind


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - names only: no Path per entry
    except OSError:
        return []


def _read(path: str, limit: int = _READ_BYTES) -> str | None:
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


def _number(text: str | None) -> float | None:
    if text is None or re.fullmatch(r"\s*-?\d{1,18}\s*", text) is None:
        return None
    return float(text)


def _hertz(path: str) -> float | None:
    value = _number(_read(path))
    return value if value is not None and 0 < value < 1e11 else None


def _meminfo(text: str) -> Iterator[tuple[str, int]]:
    for found in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE | re.ASCII):
        yield found[1], int(found[2]) * 1024


def _pressure(text: str) -> Iterator[tuple[str, float]]:
    for found in re.finditer(r"^(some|full) avg10=(\d+\.\d+)", text, re.MULTILINE | re.ASCII):
        yield found[1], float(found[2])

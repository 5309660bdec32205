"""What the board says about itself, read about once a second.

A sweep reads each sensor's `type` or `name` again before its value: a path that now belongs to something
else, or to nothing, is *unknown*, and looking around again is allowed now and then. Absent, unreadable,
garbled and absurd values are all `None`: unknown, never cold.

Layouts: as in `governor/discovery.py`; the kernel's Documentation/accounting/psi.rst, filesystems/proc.rst.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.governor.discovery import (
    Identity,
    RailPaths,
    ValuePath,
    ZonePaths,
    discover,
    number,
    read_file,
)
from edgellm.governor.platform import Board, identify_board

COLDEST_C = -40.0
HOTTEST_C = 150.0
"""Temperatures outside these are broken readings: −256 °C is how Tegra's firmware says that a zone is off."""

MEMINFO_BYTES = 8192


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
        self._found = discover(root, self.board.expects)

    def read(self) -> Readings:
        """One sweep. Never raises; what cannot be read is None.

        Rails are all read in the first sweep, then one a sweep in turn, the others keeping their last value:
        older INA3221 drivers wait for a conversion at every read, some 7 ms each.
        """
        if self._lost and self._clock() - self._discovered_at >= self._rediscover_s:
            self._discovered_at = self._clock()
            self._found = discover(self._root, self.board.expects)
            self._watts, self._next_rail = {}, 0
        self._lost = bool(self.board.expects.thermal and not self._found.zones)
        return Readings(
            zones=tuple(self._zone(paths) for paths in self._found.zones),
            throttling={paths.name: self._whole(paths) for paths in self._found.throttling},
            over_current={paths.name: self._whole(paths) for paths in self._found.over_current},
            gpu=self._gpu(),
            rails=self._rails(),
            memory=read_memory(self._root),
            at=self._clock(),
        )

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────

    def _present(self, identity: Identity) -> bool:
        text = read_file(identity.path)
        if text is not None and text.strip() == identity.text:
            return True
        self._lost = True
        return False

    def _zone(self, paths: ZonePaths) -> Zone:
        millidegrees = number(read_file(paths.celsius)) if self._present(paths.identity) else None
        celsius = None if millidegrees is None else millidegrees / 1000
        if celsius is not None and not COLDEST_C <= celsius <= HOTTEST_C:
            celsius = None
        return Zone(paths.name, celsius, paths.passive, paths.critical, paths.hot)

    def _whole(self, paths: ValuePath) -> int | None:
        value = number(read_file(paths.path)) if self._present(paths.identity) else None
        return None if value is None or value < 0 else int(value)

    def _gpu(self) -> Gpu | None:
        paths = self._found.gpu
        if paths is None:
            return None
        permille = next((n for n in map(number, map(read_file, paths.load)) if n is not None), None)
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

    def _watt(self, paths: RailPaths) -> float | None:
        if not self._present(paths.identity):
            return None
        millivolt, milliampere = number(read_file(paths.millivolt)), number(read_file(paths.milliampere))
        if millivolt is None or milliampere is None:
            return None
        watts = millivolt * milliampere / 1e6
        return watts if 0 <= watts <= 1000 else None


def read_memory(root: Path) -> Memory:
    """Memory and pressure as the kernel counts them: no firmware is asked, so this does not hang."""
    values = dict(_meminfo(read_file(str(root / "proc/meminfo"), MEMINFO_BYTES) or ""))
    available = values.get("MemAvailable")
    if available is not None:
        available = max(0, available - values.get("CmaFree", 0))
    pressure = dict(_pressure(read_file(str(root / "proc/pressure/memory")) or ""))
    return Memory(
        total=values.get("MemTotal"),
        available=available,
        swap_total=values.get("SwapTotal"),
        swap_free=values.get("SwapFree"),
        psi_some=pressure.get("some"),
        psi_full=pressure.get("full"),
    )


def _hertz(path: str) -> float | None:
    value = number(read_file(path))
    return value if value is not None and 0 < value < 1e11 else None


def _meminfo(text: str) -> Iterator[tuple[str, int]]:
    for found in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE | re.ASCII):
        yield found[1], int(found[2]) * 1024


def _pressure(text: str) -> Iterator[tuple[str, float]]:
    for found in re.finditer(r"^(some|full) avg10=(\d+\.\d+)", text, re.MULTILINE | re.ASCII):
        yield found[1], float(found[2])

"""How much memory edgellm may take: a size, or `auto`, which is what is free now.

On a Jetson CPU and GPU share one DRAM, and the driver's own idea of free is MemAvailable − CmaFree: pages of
the contiguous area count as available, but a process's ordinary memory cannot all come from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgellm.errors import ConfigError
from edgellm.memory.config import AUTO, MemoryConfig
from edgellm.memory.sizes import parse_size, show_size

MEMINFO: Final = "proc/meminfo"

_MEMINFO_LINE: Final = re.compile(r"^(?P<name>\w+):\s+(?P<kib>\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Of /proc/meminfo (proc(5)), in bytes; CmaFree is 0 where the kernel has no such area."""

    total: int
    available: int
    cma_free: int


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be taken.

    Attributes:
        bytes: the budget; not below 0.
        ever: more than this there can never be: the size itself, or MemTotal − reserve; None: unknown.
        text: where the figure comes from, for a person.
        automatic: whether it is what happens to be free.
    """

    bytes: int
    ever: int | None
    text: str
    automatic: bool


def read_meminfo(root: Path) -> MemoryInfo | None:
    """`/proc/meminfo` below `root`, or None where it cannot be read."""
    try:
        text = (root / MEMINFO).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    values = {match["name"]: int(match["kib"]) << 10 for match in _MEMINFO_LINE.finditer(text)}
    if "MemTotal" not in values or "MemAvailable" not in values:
        return None
    return MemoryInfo(values["MemTotal"], values["MemAvailable"], values.get("CmaFree", 0))


def find_budget(config: MemoryConfig, root: Path = Path("/")) -> Budget:
    """The budget that the configuration gives, now.

    Args:
        root: where /proc is.

    Raises:
        ConfigError: the budget is `auto`, and /proc/meminfo is unreadable.
    """
    reserve = parse_size(config.reserve)
    info = read_meminfo(root)
    ever = None if info is None else max(0, info.total - reserve)
    if config.budget != AUTO:
        size = parse_size(config.budget)
        return Budget(
            bytes=size,
            ever=size if ever is None else min(size, ever),
            text=f"memory.budget = {config.budget}",
            automatic=False,
        )
    if info is None:
        raise ConfigError(
            f"memory.budget = auto, but {root / MEMINFO} does not say what is available; set it to a size"
        )
    return Budget(
        bytes=max(0, info.available - info.cma_free - reserve),
        ever=ever,
        text=(
            f"memory.budget = auto: MemAvailable {show_size(info.available)} − CmaFree "
            f"{show_size(info.cma_free)} − memory.reserve {show_size(reserve)}"
        ),
        automatic=True,
    )

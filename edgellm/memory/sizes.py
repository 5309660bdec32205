"""Sizes as people write them: `480MiB`, `1.5 GiB`, `4GB`."""

from __future__ import annotations

import re
from typing import Final

UNITS: Final = {
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
_SIZE: Final = re.compile(r"(?P<number>\d{1,20}(?:\.\d{1,9})?)\s*(?P<unit>[A-Za-z]+)")
_BY_NAME: Final = {name.lower(): size for name, size in UNITS.items()}


def parse_size(text: str) -> int:
    """Bytes of a size.

    Raises:
        ValueError: it is no size, or has no unit.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _BY_NAME.get(match["unit"].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size; write a number and a unit, such as 480MiB or 4GiB")
    # Integers throughout: a float would round sizes beyond 2^53.
    whole, _, fraction = match["number"].partition(".")
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def format_size(size: int) -> str:
    """The shortest exact text of a size that `parse_size` reads: 503316480 → `480MiB`."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit}"
    return f"{size}B"


def show_size(size: int) -> str:
    """A size for a person: `1.43 GiB`, `437.9 MiB`."""
    if abs(size) >= UNITS["GiB"]:
        return f"{size / UNITS['GiB']:.2f} GiB"
    return f"{size / UNITS['MiB']:.1f} MiB"

"""One allocation, carved: where each buffer lies, those that live at different times in the same place.

A buffer's life is a range of launches, `first` to `last`, both included: it is written at the first and read
at the last. Pure arithmetic; whoever allocates adds the offsets to an address.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

ALIGNMENT: Final = 256
"""What cudaMalloc gives, too; more than any load of a kernel asks for."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A named piece of memory.

    Attributes:
        bytes: how large.
        first, last: launches between which it must keep what it holds.
    """

    name: str
    bytes: int
    first: int = 0
    last: int = 0

    def lives_beside(self, other: Buffer) -> bool:
        """Whether both are needed at some time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class Placement:
    """Where buffers lie.

    Attributes:
        offsets: of each, a multiple of ALIGNMENT.
        bytes: of all, a multiple of ALIGNMENT.
    """

    offsets: Mapping[str, int]
    bytes: int


def place(buffers: Iterable[Buffer]) -> Placement:
    """Put each buffer at the lowest offset that is free during its life, the largest first.

    Never more than all of them side by side, and the least that is possible when all live at once.

    Raises:
        ValueError: two have the same name.
    """
    placed: list[tuple[int, int, Buffer]] = []  # begin, end
    offsets: dict[str, int] = {}
    for buffer in sorted(buffers, key=lambda each: (-each.bytes, each.name)):
        if buffer.name in offsets:
            raise ValueError(f"there are two buffers {buffer.name}")
        size = aligned(buffer.bytes)
        begin = 0
        for taken_begin, taken_end, other in sorted(placed, key=lambda each: each[:2]):
            if not buffer.lives_beside(other):
                continue
            if taken_begin >= begin + size:
                break
            begin = max(begin, taken_end)
        placed.append((begin, begin + size, buffer))
        offsets[buffer.name] = begin
    return Placement(offsets, max((end for _, end, _ in placed), default=0))


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT

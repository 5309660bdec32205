"""What one rendering of a template may make, and how long it may take.

jinja's own sandbox keeps a template from Python, not from time and memory: `x ~ x` in a loop, a list of lists
of lists, a macro that calls itself twice. Here everything that a template makes is paid for by its size, with
what it contains, and every payment looks at the clock. The budget is that of the thread's current rendering.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final

from jinja2.runtime import LoopContext

MAX_SECONDS: Final = 1.0
"""Processor time of one rendering; a real template takes a few milliseconds for a long conversation."""
MAX_CHARACTERS: Final = 64_000_000

_BASE_CHARACTERS: Final = 2_000_000
_TIMES_INPUT: Final = 32
"""How often a template may copy what it is given: each turn is trimmed, put together, compared."""
MAX_DEPTH: Final = 32
_MAX_BITS: Final = 8_192
_PARTS_PER_LOOK: Final = 4_096

_CONTAINERS: Final[Any] = (
    list,
    tuple,
    set,
    frozenset,
    dict,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)
_SIZED: Final[Any] = (str, range, *_CONTAINERS)


class Excess(Exception):
    """The template does more than any template needs."""


class Budget:
    """What one rendering may still make, and until when.

    Args:
        given: characters of what the template is given.
    """

    def __init__(self, given: int) -> None:
        self._left = min(_BASE_CHARACTERS + _TIMES_INPUT * given, MAX_CHARACTERS)
        self._until = time.thread_time() + MAX_SECONDS

    def spend(self, size: int) -> None:
        """Pay for so many characters, and look at the clock."""
        self._left -= size + 1
        if self._left < 0:
            raise Excess("it makes too much text")
        if time.thread_time() > self._until:
            raise Excess(f"it takes more than {MAX_SECONDS:g} s")

    def weigh(self, value: Any) -> int:
        """Characters and parts that `value` consists of; shared ones count as often as they would be written.

        Raises:
            Excess: it is larger than what is left, or deeply nested.
        """
        total, look = 0, _PARTS_PER_LOOK
        waiting = [(value, 0)]
        while waiting:
            part, depth = waiting.pop()
            total += _size(part)
            if isinstance(part, _CONTAINERS) and part:
                if depth == MAX_DEPTH:
                    raise Excess("it nests lists too deeply")
                if total <= self._left:  # or else it is not even listed
                    waiting += [(item, depth + 1) for item in part]
                    if isinstance(part, dict):
                        waiting += [(item, depth + 1) for item in part.values()]
            if total > self._left:
                raise Excess("it makes too much text")
            look -= 1
            if not look:
                look = _PARTS_PER_LOOK
                self.spend(0)
        return total


_current: ContextVar[Budget] = ContextVar("current")


def within(budget: Budget, parts: Iterator[str]) -> str:
    """What a template generates, under a budget."""
    before = _current.set(budget)
    try:
        return "".join(parts)
    finally:
        _current.reset(before)


def spend(size: int = 0) -> None:
    _current.get().spend(size)


def weigh(value: Any) -> int:
    return _current.get().weigh(value)


def made(value: Any) -> Any:
    """Pay for something that was made. What would be made while it is iterated over is made now."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        items: list[Any] = []
        for item in value:
            spend()
            items.append(item)
        value = items
    spend(len(value) if isinstance(value, str) else weigh(value))
    return value


def _size(part: Any) -> int:
    """Of one value alone."""
    if isinstance(part, int):
        if part.bit_length() > _MAX_BITS:
            raise Excess("it computes a huge number")
        return 1 + part.bit_length() // 3
    return 1 + len(part) if isinstance(part, _SIZED) else 1

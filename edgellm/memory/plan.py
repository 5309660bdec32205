"""What an engine of a given shape takes, line by line, before anything is taken. Pure arithmetic.

An executor's `Footprint` gives the lines; this file adds them up, holds them against a budget, and solves for
the largest shapes that fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

Kind = Literal["resident", "serving", "mapped", "transient", "pinned", "device"]
"""What sort of memory a line is:

    resident    the process's own, there at READY and from then on
    serving     what requests take on top, at most
    mapped      pages of the engine's files that come in as they are used, at most so much; the kernel may
                drop them at any time
    transient   what loading takes beyond all that stays
    pinned      host memory that a device reads
    device      the device's; where it shares the host's DRAM it counts like any other
"""

MAX_BATCH_SIZE: Final = 256
"""Most slots that the configuration allows."""


@dataclass(frozen=True, slots=True)
class Line:
    """One part of the plan.

    Attributes:
        name: a short noun; where the executor's MemoryReport has the same, they are compared.
        bytes: how much.
        formula: where the figure comes from, with its factors, for a person.
        kind: what sort of memory it is.
    """

    name: str
    bytes: int
    formula: str
    kind: Kind = "resident"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that are configured; TensorRT-LLM's names.

    Attributes:
        max_batch_size: slots.
        max_seq_len: tokens in a slot.
        max_num_tokens: tokens fed in one step.
    """

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int


class Footprint(Protocol):
    """What an executor knows of its own memory.

    Every line but `transient` ones, and the sum of all, grows or stays with each size of the shape.
    """

    @property
    def unified(self) -> bool:
        """Whether a device's memory is the host's, too; without a device it is."""
        ...

    def lines(self, shape: Shape) -> tuple[Line, ...]:
        """All parts, the process that it runs in among them."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Lines for one shape, and the budget in bytes that they must fit; None: no budget.

    With `unified` memory a device's lines count like any other; elsewhere the GPU's own memory has to do.
    """

    shape: Shape
    lines: tuple[Line, ...]
    budget: int | None = None
    unified: bool = True

    @property
    def total(self) -> int:
        """The promise: never more than this."""
        return sum(line.bytes for line in self._counted)

    @property
    def on_device(self) -> int:
        """Bytes of the GPU's own memory, where it has some."""
        return sum(line.bytes for line in self.lines) - self.total

    @property
    def at_ready(self) -> int:
        """What is there at READY: neither what loading gave back, nor what comes in with requests."""
        return sum(line.bytes for line in self._counted if line.kind in ("resident", "pinned", "device"))

    @property
    def headroom(self) -> int | None:
        """Bytes of the budget that are left; negative: missing."""
        return None if self.budget is None else self.budget - self.total

    @property
    def fits(self) -> bool:
        """Whether the budget, if there is one, suffices."""
        return self.budget is None or self.total <= self.budget

    @property
    def _counted(self) -> Iterable[Line]:
        """What the budget is for: all, or all but a GPU's own memory."""
        return (line for line in self.lines if self.unified or line.kind != "device")


def make_plan(footprint: Footprint, shape: Shape, budget: int | None = None) -> Plan:
    """The plan for a shape."""
    return Plan(shape, footprint.lines(shape), budget, footprint.unified)


def frontier(
    footprint: Footprint,
    *,
    budget: int,
    longest: int,
    max_num_tokens: int,
    batches: Iterable[int] | None = None,
) -> tuple[Shape, ...]:
    """For each number of slots the longest slots that fit; numbers for which nothing fits are left out.

    Args:
        budget: bytes.
        longest: most tokens in a slot: the model's context, or what the engine was built for.
        max_num_tokens: per step; never less than one for each slot, nor more than all slots hold.
        batches: 1, 2, 4, … 256 unless told otherwise.
    """
    found = []
    for batch in batches or _powers_of_two(MAX_BATCH_SIZE):

        def fits(length: int, batch: int = batch) -> bool:
            shape = with_tokens(Shape(batch, length, max_num_tokens))
            return make_plan(footprint, shape, budget).fits

        if length := _largest(fits, longest):
            found.append(with_tokens(Shape(batch, length, max_num_tokens)))
    return tuple(found)


def with_tokens(shape: Shape) -> Shape:
    """The shape with a max_num_tokens that it can have: from one for each slot to all that the slots hold."""
    most = shape.max_batch_size * shape.max_seq_len
    return replace(shape, max_num_tokens=max(shape.max_batch_size, min(shape.max_num_tokens, most)))


def _largest(fits: _Fits, most: int) -> int:
    """The largest n in 2…most for which `fits`, which holds up to some n and not beyond; 0: none."""
    if most < 2 or not fits(2):
        return 0
    low, high = 2, most + 1  # low fits, high is beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Fits(Protocol):
    def __call__(self, length: int, /) -> bool: ...


def _powers_of_two(most: int) -> Iterable[int]:
    number = 1
    while number <= most:
        yield number
        number *= 2

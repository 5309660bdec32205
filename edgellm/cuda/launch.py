"""What to compile and how to launch it, as plain data: nothing here needs CUDA.

Kernels are C++ templates, specialised on a model's numbers. An emitter gives launches over named buffers; the
executor carves the buffers from one allocation, compiles (or loads) the kernels and captures the launches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """What a kernel's launch depends on.

    Attributes:
        sm: compute capability, 87 for 8.7.
        multiprocessors: SMs that the launches may fill.
        shared_per_block: bytes of shared memory that a block can have, opted in.
    """

    sm: int
    multiprocessors: int
    shared_per_block: int

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel can start before the one in front of it has ended (PDL, compute capability 9)."""
        return self.sm >= 90


@dataclass(frozen=True, slots=True)
class Kernel:
    """One function to compile.

    Attributes:
        source: file in `edgellm/kernels`, e.g. `linear.cu`.
        expression: its C++ name with template arguments, e.g. `linear<4, 128, 8>`.
        threads: of a block.
        shared: bytes of dynamic shared memory.
    """

    source: str
    expression: str
    threads: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class At:
    """A place in a named buffer.

    Attributes:
        buffer: the buffer's name.
        offset: bytes from its start.
    """

    buffer: str
    offset: int = 0

    def __add__(self, offset: int) -> At:
        return At(self.buffer, self.offset + offset)


Argument = At | int | float | None
"""A device pointer, an int32, a float32, or a null pointer."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: what runs.
        grid: blocks in x, y, z.
        arguments: in the order of the kernel's parameters.
        early: it may start while the kernel before it still runs, and waits by itself (`griddepcontrol.wait`)
            before it touches what that one writes.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    early: bool = True

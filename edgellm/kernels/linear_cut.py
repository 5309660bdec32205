"""How a decode linear is cut: what blocks and warps take of it, and the memory and registers that takes.

`linear.cu` computes the same from its template's arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from edgellm.kernels.packing import CHUNK, PackedShape

Join = Literal["whole", "last_block", "cluster"]
"""Who adds what blocks with different columns found: nobody, if each has all columns; whichever block ends
last, through the workspace; the blocks of a cluster, out of shared memory (compute capability 9)."""

_LINE: Final = 20


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a linear is cut.

    Attributes:
        blocks: in x; each takes every blocks-th row block.
        slabs: blocks in y, which part the columns.
        join: who adds up the slabs.
        warps: of a block.
        warps_k: of them, side by side along the columns of one row block; divides `warps`.
        stages: panels of a warp's ring, each with its neighbours abreast.
        early: stages that are asked for before x is; the others follow behind it.
        abreast: neighbouring row blocks that a warp multiplies at a time, reading x once.
        sets: of buffers for sums over warps: with two, no warp waits for them to be read.
        held: whether a warp keeps its columns of x in registers; otherwise x lies in shared memory.
        blocks_per_sm: that registers leave room for, of this linear and the next, which then starts at once.
    """

    blocks: int
    slabs: int
    join: Join
    warps: int
    warps_k: int
    stages: int
    early: int
    abreast: int
    sets: int
    held: bool
    blocks_per_sm: int


def row_blocks_of(shape: PackedShape, cut: Tuning, block: int, warp: int) -> list[int]:
    """The row blocks that a warp of block (block, any) multiplies: the kernel's arithmetic, for tests."""
    side = cut.warps // cut.warps_k * cut.abreast
    first = block * side + warp // cut.warps_k * cut.abreast
    return [
        row_block + neighbour
        for row_block in range(first, shape.row_blocks, cut.blocks * side)
        for neighbour in range(min(cut.abreast, shape.row_blocks - row_block))
    ]


def panels_of(shape: PackedShape, cut: Tuning, slab: int, warp: int) -> range:
    """The panels of each of those row blocks that it multiplies, of all `shape.panels`."""
    slab_panels = -(-shape.panels // cut.slabs)
    first = slab * slab_panels
    count = min(slab_panels, shape.panels - first)
    part = warp % cut.warps_k
    return range(first + part * count // cut.warps_k, first + (part + 1) * count // cut.warps_k)


def shared_bytes(shape: PackedShape, rows: int, cut: Tuning) -> int:
    """Dynamic shared memory of a block: `Layout` in linear.cu, and with a cluster the parts to be added."""
    slab = -(-shape.panels // cut.slabs) * shape.panel
    size = cut.warps * cut.stages * cut.abreast * shape.panel_bytes
    if not cut.held:
        size += x_bytes(shape, rows, cut.slabs)
    if shape.bits < 16 and (not cut.held or rows > 8):
        size += -(-(slab // shape.group * max(2, rows) * 4) // 16) * 16
    size += -(-rows * 4 // 16) * 16
    size += cut.sets * cut.warps * cut.abreast * rows * _LINE * 4
    if cut.join == "cluster":
        side = cut.warps // cut.warps_k * cut.abreast
        # Of its share of the elements, 32 at a time, what each of the cluster's blocks found.
        lines, sums = (8, 2) if shape.swiglu else (16, 1)
        elements = -(-shape.row_blocks // (cut.blocks * side)) * side * rows * lines
        size += -(-elements // (32 * cut.slabs)) * 32 * cut.slabs * sums * 4
    return size


def held_registers(shape: PackedShape, rows: int, cut: Tuning) -> int:
    """Of a thread, for the columns of x that its warp would hold, and of up to eight rows their sums."""
    slab_panels = -(-shape.panels // cut.slabs)
    groups = shape.panel // shape.group if shape.bits < 16 else 0
    panel = shape.panel // 4 if rows > 8 else shape.panel // 8 + 2 * groups
    return -(-slab_panels // cut.warps_k) * panel


def x_bytes(shape: PackedShape, rows: int, slabs: int) -> int:
    """Of x in a block's shared memory, where no warp holds it."""
    return rows * (-(-shape.panels // slabs) * shape.panel + CHUNK // 2) * 2

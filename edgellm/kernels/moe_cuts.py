"""How the experts' linears are cut: a fixed grid parts whatever work there is, as `experts` in `moe.cu` does.

A group is rows that chose the same expert, at most `Cuts.most` of them; an item is a group's rows and a row
block of the expert's weights. Blocks part all items evenly, warps those of their block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from edgellm.cuda.launch import Device
from edgellm.errors import BuildError
from edgellm.kernels.gemm import TILES, Tile
from edgellm.kernels.gemm import shared_bytes as tile_bytes
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.moe_shape import MixtureShape
from edgellm.kernels.packing import PackedShape

_TILED_ROWS: Final = math.inf
"""Of an expert on average, from which on tiles are taken; 24 once a device has measured them."""
_WIDE_ROWS: Final = 40
"""From which on tiles have 64 rows, not 32."""
_TEAMS: Final = (1,)
"""Warps that may share a row block; (1, 2, 4) once a device has measured them."""
_STAGES_LEAST: Final = 4
_STAGES_MOST: Final = 16
_RESERVED: Final = 1 << 10
"""Bytes of shared memory that the system has of every block."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How an experts' linear is cut.

    Attributes:
        blocks: that part all row blocks of all groups evenly.
        warps: of a block.
        warps_k: of them, that part the columns of a row block among them; divides `warps`.
        stages: panels under way for each warp.
        most: rows of a group.
    """

    blocks: int
    warps: int
    warps_k: int
    stages: int
    most: int


@dataclass(frozen=True, slots=True)
class Cuts:
    """Of both linears, which share their groups: a tile's tokens are a group."""

    gate_up: Tuning | Tile
    down: Tuning | Tile

    def __post_init__(self) -> None:
        most, other = (_most(cut) for cut in (self.gate_up, self.down))
        if most != other:
            raise ValueError(f"groups of {most} and of {other} rows in one mixture")

    @property
    def most(self) -> int:
        """Rows of a group."""
        return _most(self.gate_up)

    @property
    def narrow(self) -> bool:
        """Whether what experts find is float16, as tiles store it; float32 otherwise."""
        return isinstance(self.down, Tile)


def _most(cut: Tuning | Tile) -> int:
    return cut.tokens if isinstance(cut, Tile) else cut.most


def groups_most(mixture: MixtureShape, rows: int, most: int) -> int:
    """Groups that rows can make: one for each active expert, more for those with more than `most` rows."""
    pairs = rows * mixture.top_k
    return min(mixture.experts, pairs) + pairs // most


def tuned(mixture: MixtureShape, *, rows: int, device: Device) -> Cuts:
    """The cuts of both linears for a bucket and a device.

    Raises:
        BuildError: not even one row fits into the device's shared memory.
    """
    average = rows * mixture.top_k / mixture.experts
    if average >= _TILED_ROWS and (tiles := tiled(mixture, rows=rows, device=device)):
        return tiles
    most = min(BUCKETS[-1], rows)
    groups = min(mixture.experts, rows * mixture.top_k)
    while most:
        gate_up, down = (_cut(shape, groups, most, device) for shape in (mixture.gate_up, mixture.down))
        if gate_up and down:
            return Cuts(gate_up, down)
        most //= 2
    widest = max(mixture.gate_up.k, mixture.down.k)
    raise BuildError(
        f"experts of {widest} columns need more than the {device.shared_per_block} bytes of shared memory "
        "that a block has on this device"
    )


def tiled(mixture: MixtureShape, *, rows: int, device: Device) -> Cuts | None:
    """Tiles for both linears of a chunk; None, if they do not fit the device."""
    tokens = 64 if rows * mixture.top_k / mixture.experts >= _WIDE_ROWS else 32
    found = [
        next(
            (
                tile
                for tile in TILES
                if tile.tokens == tokens
                and tile.warps_k == 1
                and 2 * tile_bytes(shape, tile) <= device.shared_per_block
            ),
            None,
        )
        for shape in (mixture.gate_up, mixture.down)
    ]
    return Cuts(found[0], found[1]) if found[0] and found[1] else None


def _cut(shape: PackedShape, groups: int, most: int, device: Device) -> Tuning | None:
    # Two blocks on an SM, where they fit: one waits for its rows while the other multiplies.
    for warps, per_sm in ((8, 2), (8, 1), (4, 1)):
        blocks = per_sm * device.multiprocessors
        cut = Tuning(blocks, warps, _warps_k(shape, groups / blocks, warps), 0, most)
        fixed = shared_bytes(shape, cut)
        available = (device.shared_per_block + _RESERVED) // per_sm - _RESERVED
        stages = min((available - fixed) // (warps * shape.panel_bytes), _STAGES_MOST)
        if stages >= _STAGES_LEAST:
            return replace(cut, stages=stages)
    return None


def _warps_k(shape: PackedShape, groups: float, warps: int) -> int:
    """Warps to a row block, if each block has row blocks of so many groups."""

    def cost(warps_k: int) -> float:
        rounds = math.ceil(groups * shape.row_blocks / (warps // warps_k))
        # A round costs its panels and about as much as one and a half for what is around them.
        return rounds * (math.ceil(shape.panels / warps_k) + 1.5)

    return min(_TEAMS, key=cost)


def shared_bytes(shape: PackedShape, cut: Tuning) -> int:
    """Dynamic shared memory of a block of `experts`: `Layout` in `moe.cu`."""
    size = cut.warps * cut.stages * shape.panel_bytes + cut.most * (shape.k + 32) * 2
    if shape.bits < 16:
        size += shape.k // shape.group * max(2, cut.most) * 4
    if cut.warps_k > 1:
        size = -(-size // 16) * 16 + 2 * cut.warps * (2 if cut.most > 8 else 1) * 512
    return size


def items_of(row_blocks: int, groups: int, cut: Tuning, block: int, warp: int) -> Iterator[tuple[int, int]]:
    """(group, row block) of each item that a warp of a block multiplies, as the kernel has it: for tests."""
    items = groups * row_blocks
    begin, end = items * block // cut.blocks, items * (block + 1) // cut.blocks
    for group in range(begin // row_blocks, groups):
        first = max(begin, group * row_blocks)
        teams = cut.warps // cut.warps_k
        for item in range(first + warp // cut.warps_k, min(end, (group + 1) * row_blocks), teams):
            yield group, item - group * row_blocks


def panels_of(shape: PackedShape, cut: Tuning, warp: int) -> range:
    """The panels of each of its items that a warp multiplies."""
    part = warp % cut.warps_k
    return range(part * shape.panels // cut.warps_k, (part + 1) * shape.panels // cut.warps_k)

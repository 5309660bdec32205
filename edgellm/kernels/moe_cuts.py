"""How the experts' linears are cut: a fixed grid parts whatever work there is, as `experts.cu` does.

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

_TILED_ROWS: Final = 8
"""Of an expert on average, from which on tiles are taken."""
_WIDE_ROWS: Final = 96
"""From which on tiles have 64 rows, not 32, of which fewer are nobody's."""
_TEAMS: Final = (1, 2)
"""Warps that may share a row block."""
_HELD_WARPS: Final = 16
_HELD_REGISTERS: Final = 64
"""That a thread has for x; with more than half of them row blocks do not go abreast."""
_HELD_STAGES: Final = 9
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
class Held:
    """How an experts' linear is cut whose rows are held in registers, a block for each SM.

    Attributes:
        warps: of a block.
        warps_k: of them, that part the columns evenly among them; divides `warps`.
        stages: steps under way for each warp.
        abreast: row blocks whose panels are a step.
        sets: buffers for sums over warps.
        most: rows of a group.
    """

    blocks: int
    warps: int
    warps_k: int
    stages: int
    abreast: int
    sets: int
    most: int


@dataclass(frozen=True, slots=True)
class Cuts:
    """Of both linears, which share their groups: a tile's tokens are a group."""

    gate_up: Held | Tuning | Tile
    down: Held | Tuning | Tile

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


def _most(cut: Held | Tuning | Tile) -> int:
    return cut.tokens if isinstance(cut, Tile) else cut.most


def groups_most(mixture: MixtureShape, rows: int, most: int) -> int:
    """Groups that rows can make: one for each active expert, more for those with more than `most` rows."""
    pairs = rows * mixture.top_k
    return min(mixture.experts, pairs) + pairs // most


def tuned(mixture: MixtureShape, *, rows: int, device: Device, held: bool = True, tiles: bool = True) -> Cuts:
    """The cuts of both linears for a bucket and a device.

    Args:
        held: whether few rows may be held in registers.
        tiles: whether many rows may be in tiles.

    Raises:
        BuildError: not even one row fits into the device's shared memory.
    """
    average = rows * mixture.top_k / mixture.experts
    # Up to 16 rows are one group of an expert at most, of which a tile would leave half nobody's.
    many = rows > BUCKETS[-1] and average >= _TILED_ROWS
    if tiles and many and (found := tiled(mixture, rows=rows, device=device)):
        return found
    most = min(BUCKETS[-1], rows)
    groups = min(mixture.experts, rows * mixture.top_k)
    while most:
        gate_up, down = (
            (_held(shape, most, device) if held and rows <= BUCKETS[-1] else None)
            or _cut(shape, groups, most, device)
            for shape in (mixture.gate_up, mixture.down)
        )
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


def _held(shape: PackedShape, most: int, device: Device) -> Held | None:
    """None: teams are faster, warps cannot part the columns evenly, or one would have to hold too many."""
    warps_k = max(n for n in range(1, _HELD_WARPS + 1) if shape.panels % n == 0)
    registers = shape.k // warps_k // 8 * (2 if most > 8 else 1)
    # Fewer abreast, or one buffer, pay for few rows alone; eight rows of `down` are faster by teams.
    ways = [(3, 2)] if most > 4 else [(3, 2), (3, 1)] if most > 1 else [(3, 2), (3, 1), (2, 2), (1, 2)]
    if most == 8 and not shape.swiglu:
        return None
    if most > 8 and shape.group < 128:  # Registers would be spilled.
        return None
    warps = _HELD_WARPS // warps_k * warps_k
    for abreast, sets in ways:
        if registers > (_HELD_REGISTERS if abreast == 1 else _HELD_REGISTERS // 2):
            continue
        cut = Held(device.multiprocessors, warps, warps_k, 0, abreast, sets, most)
        available = device.shared_per_block - held_bytes(shape, cut)
        stages = min(available // (warps * abreast * shape.panel_bytes), _HELD_STAGES)
        if stages >= 2 + (abreast == 1):
            return replace(cut, stages=stages)
    return None


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
    """Dynamic shared memory of a block of `experts`: `Layout` in `experts.cu`."""
    size = cut.warps * cut.stages * shape.panel_bytes + cut.most * (shape.k + 32) * 2
    if shape.bits < 16:
        size += shape.k // shape.group * max(2, cut.most) * 4
    if cut.warps_k > 1:
        size = -(-size // 16) * 16 + 2 * cut.warps * (2 if cut.most > 8 else 1) * 512
    return size


def held_bytes(shape: PackedShape, cut: Held) -> int:
    """Dynamic shared memory of a block of `held_experts`: `HeldLayout` in `held_experts.cu`."""
    size = cut.warps * cut.stages * cut.abreast * shape.panel_bytes
    if shape.bits < 16 and cut.most > 8:
        size += shape.k // shape.group * cut.most * 4
    return size + cut.sets * cut.warps * cut.abreast * cut.most * 20 * 4


def held_items_of(
    row_blocks: int, groups: int, cut: Held, block: int, side: int
) -> Iterator[tuple[int, int]]:
    """(group, row block) of each item that one side of a block's warps multiplies: for tests."""
    items, sides = groups * row_blocks, cut.warps // cut.warps_k
    begin, end = items * block // cut.blocks, items * (block + 1) // cut.blocks
    for group in range(begin // row_blocks, groups):
        last = min(end, (group + 1) * row_blocks)
        first = max(begin, group * row_blocks) + side * cut.abreast
        for item in range(first, last, sides * cut.abreast):
            for each in range(item, min(item + cut.abreast, last)):
                yield group, each - group * row_blocks


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

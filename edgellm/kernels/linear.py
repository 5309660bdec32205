"""Linear layers for 1 to 16 rows: launches of `linear.cu`, and how each is cut to its shape and device.

The time of a decode step is the time to read the weights, so what is chosen here is only how that stays true:
how many bytes are under way in each SM, how evenly they are spread, and that x costs little beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Literal

from edgellm.cuda.launch import Argument, At, Device, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.packing import CHUNK, ROW_BLOCK, PackedShape, Zero

Epilogue = Literal["store", "residual", "swiglu", "logits"]
"""`store`: float16 y; `residual`: added to float32; `swiglu`: float16 silu(gate) · up; `logits`: float32."""

Join = Literal["whole", "last_block", "cluster", "shared_x"]
"""Who adds what blocks with different columns found: nobody, if each has all columns; whichever block ends
last, through the workspace; the blocks of a cluster, out of shared memory (compute capability 9). With
`shared_x` the blocks of a cluster have all columns each, and part the work of loading x."""

BUCKETS: Final = (1, 2, 4, 8, 16)
"""Rows that there are kernels for."""
COUNTERS_BYTES: Final = 4096
"""Of the workspace: 1024 counters that must be 0 before the first launch; launches leave them so."""

_SOURCE: Final = "linear.cu"
ZERO_NAMES: Final[dict[Zero, str]] = {
    "none": "NONE",
    "centred": "CENTRED",
    "zero_point": "ZERO_POINT",
    "offset": "OFFSET",
}
_WARPS: Final = (16, 8, 4)
_LINE: Final = 20
_SHARED_GOAL: Final = 190 << 10
_SHARED_GOAL_EARLY: Final = 152 << 10
"""Of a block; the second where the next kernel starts before this one has ended."""
_RING_GOAL: Final = 53 << 10
"""Of weights under way in an SM, where there is room: latency × bandwidth, and what arrives meanwhile."""
_EARLY_BYTES: Final = 105 << 10
"""Of weights asked for before x, which waits behind them: one stage only where x is many rows of float32."""
_X_GOAL: Final = 72 << 10
"""Of x in a block: beyond it the columns are parted among blocks."""
_STAGES_LEAST: Final = 2
_STAGES_MOST: Final = 14
_CLUSTER_MOST: Final = 8
_GPC: Final = 16
_SLABS_MOST: Final = 32


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm on the way into a linear, whose x is then the float32 residual [rows, K].

    Attributes:
        gain: float32 [K].
        epsilon: added to the mean of squares.
        squares: float32 [rows, K / 16], sums of squares of 16 neighbours, left by who wrote the residual.
    """

    gain: At
    epsilon: float
    squares: At


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
        batch: rounds of row blocks whose sums over warps are added at a time.
        sets: of buffers for these sums: with two, no warp waits for them to be read.
        shared: blocks of a cluster that part the work of loading x, with `shared_x`; divides blocks and rows.
        blocks_per_sm: that registers leave room for, of this linear and the next.
    """

    blocks: int
    slabs: int
    join: Join
    warps: int
    warps_k: int
    stages: int
    early: int
    abreast: int
    batch: int
    sets: int
    blocks_per_sm: int
    shared: int = 1


def decode_linear(
    shape: PackedShape,
    *,
    rows: int,
    device: Device,
    x: At,
    norm: Norm | None,
    weights: At,
    bias: At | None,
    epilogue: Epilogue,
    out: At,
    workspace: At | None,
    squares: At | None = None,
    tuning: Tuning | None = None,
) -> list[Launch]:
    """y = x · wᵀ + bias for a bucket of rows, all of which are computed and stored.

    Args:
        rows: 1, 2, 4, 8 or 16.
        x: float16 [rows, K], or with `norm` the float32 residual.
        bias: float32 [16 · row_blocks], see `pack_bias`.
        out: float16 or float32 [rows, shape.outputs], see `Epilogue`.
        workspace: `decode_workspace` bytes, zeros before the first launch; linears that run one after the
            other can share it, other kernels cannot.
        squares: float32 [rows, outputs / 16], what `Norm.squares` of the next linear wants, written by
            `residual`; None: nobody does.
        tuning: how it is cut, instead of `tuned`.
    """
    if rows not in BUCKETS:
        raise ValueError(f"there are kernels for {BUCKETS} rows, not for {rows}")
    if (epilogue == "swiglu") != shape.swiglu:
        raise ValueError(f"epilogue {epilogue} does not suit weights with swiglu {shape.swiglu}")
    cut = tuning or tuned(shape, rows=rows, device=device, normed=norm is not None)
    if cut.join == "last_block" and workspace is None:
        raise ValueError("this linear needs a workspace")
    arguments: tuple[Argument, ...] = (
        weights,
        x,
        norm.gain if norm else None,
        norm.squares if norm else None,
        float(norm.epsilon if norm else 0.0),
        bias,
        out,
        squares,
        workspace if cut.join == "last_block" else None,
        shape.row_blocks,
        shape.outputs,
    )
    kernel = Kernel(
        _SOURCE,
        _expression(shape, rows, epilogue, cut, normed=norm is not None),
        cut.warps * 32,
        shared_bytes(shape, rows, cut, normed=norm is not None),
    )
    return [Launch(kernel, (cut.blocks, cut.slabs, 1), arguments)]


def decode_workspace(shape: PackedShape, rows: int, device: Device) -> int:
    """Bytes that this linear's launches need of a workspace; 0: none."""
    cuts = [tuned(shape, rows=rows, device=device, normed=normed) for normed in (False, True)]
    slabs = max((cut.slabs for cut in cuts if cut.join == "last_block"), default=0)
    return COUNTERS_BYTES + slabs * shape.row_blocks * rows * ROW_BLOCK * 4 if slabs else 0


@cache
def tuned(shape: PackedShape, *, rows: int, device: Device, normed: bool) -> Tuning:
    """The cut for a shape, a bucket and a device, with or without a norm in front.

    Raises:
        BuildError: in no way do two panels for each warp and x fit into the device's shared memory.
    """
    cuts = [
        cut
        for slabs, join, shared in _partings(shape, rows, device)
        for warps in _WARPS
        for warps_k in (16, 8, 4, 2, 1)
        if warps_k <= warps
        for abreast in _abreast(rows, device)
        if (cut := _fitted(shape, rows, device, normed, _Way(slabs, join, shared, warps, warps_k, abreast)))
    ]
    if not cuts:
        raise BuildError(
            f"a linear of {shape.k} columns needs more than the {device.shared_per_block} bytes of shared "
            "memory that a block has on this device"
        )
    return min(cuts, key=lambda cut: _cost(shape, rows, device, cut, normed=normed))


def _abreast(rows: int, device: Device) -> tuple[int, ...]:
    """Row blocks abreast that are worth trying. With many rows and clusters, shared memory is better used for
    stages."""
    if rows <= 2:
        return (1, 2, 3)
    return (1,) if rows >= 8 and device.has_dependent_launch else (1, 2)


@dataclass(frozen=True, slots=True)
class _Way:
    """A `Tuning` before its blocks and stages are known."""

    slabs: int
    join: Join
    shared: int
    warps: int
    warps_k: int
    abreast: int


def _partings(shape: PackedShape, rows: int, device: Device) -> list[tuple[int, Join, int]]:
    """Numbers of slabs with who joins them, and of blocks that share x; no slab is empty."""
    most = min(shape.panels, _SLABS_MOST)
    slabs = sorted({-(-shape.panels // -(-shape.panels // count)) for count in range(1, most + 1)})
    least = next((count for count in slabs if _x_bytes(shape, rows, count) <= _X_GOAL), slabs[-1])
    clusters = device.has_dependent_launch
    ways: list[tuple[int, Join, int]] = [(1, "whole", 1)]
    if clusters:
        ways += [(1, "shared_x", 2)] if rows >= 4 else []
    for count in slabs[1:]:
        if clusters and count <= _CLUSTER_MOST:
            ways.append((count, "cluster", 1))
        elif count >= least:
            ways.append((count, "last_block", 1))
    return ways


def _fitted(shape: PackedShape, rows: int, device: Device, normed: bool, way: _Way) -> Tuning | None:
    """With as many blocks as SMs, and as many stages as shared memory has room for; None: too few."""
    size = way.slabs * way.shared
    most = max(1, device.multiprocessors // size) * way.shared
    if way.join in ("cluster", "shared_x") and size > 2:
        # A cluster's blocks are on SMs of one GPC, most of which have 16 on an H100.
        most = max(1, device.multiprocessors // _GPC * (_GPC // size)) * way.shared
    side = way.warps // way.warps_k * way.abreast
    blocks = min(most, -(-shape.row_blocks // (side * way.shared)) * way.shared)
    rounds = -(-shape.row_blocks // (blocks * side))
    cut = Tuning(
        blocks=blocks,
        slabs=way.slabs,
        join=way.join,
        warps=way.warps,
        warps_k=way.warps_k,
        stages=0,
        early=0,
        abreast=way.abreast,
        batch=1,
        sets=2 if rounds > 1 and rows <= 8 else 1,
        blocks_per_sm=1,
        shared=way.shared,
    )
    fixed = shared_bytes(shape, rows, cut, normed=normed)
    unit = way.warps * way.abreast * shape.panel_bytes
    goal = _SHARED_GOAL_EARLY if device.has_dependent_launch else _SHARED_GOAL
    # A cluster's block has many columns of few row blocks: all that is left for its ring.
    least = 6 * unit if way.join == "cluster" else 0
    room = min(max(goal, fixed + _RING_GOAL, fixed + least), device.shared_per_block) - fixed
    stages = min(room // unit, _STAGES_MOST)
    if stages < _STAGES_LEAST:
        return None
    early = 1 if normed and rows >= 4 else max(1, min(stages - 1, _EARLY_BYTES // unit))
    return replace(cut, stages=stages, early=early)


def _cost(shape: PackedShape, rows: int, device: Device, cut: Tuning, *, normed: bool) -> float:
    """Time in panels that an SM multiplies: rounds with their sums over warps, x, and what a cluster's blocks
    wait for each other. Its numbers come from an H100."""
    slab_panels = -(-shape.panels // cut.slabs)
    side = cut.warps // cut.warps_k * cut.abreast
    rounds = -(-shape.row_blocks // (cut.blocks * side))
    # What a round takes is how long its warps are busy; few warps hide latencies badly.
    busy = -(-slab_panels // cut.warps_k) * cut.abreast * cut.warps * (1.0 if cut.warps > 8 else 1.3)
    x = 0.6 * rows * slab_panels * shape.panel * (4 if normed else 2) / shape.panel_bytes / cut.shared
    wait = {
        "whole": 0.0,
        "shared_x": 12.0 + 4.0 * cut.shared,
        "cluster": 24.0 + 12.0 * cut.slabs,
        "last_block": 96.0 + 8.0 * cut.slabs,
    }[cut.join]
    waves = -(-cut.blocks * cut.slabs // device.multiprocessors)
    time = waves * (rounds * (busy + 8.0 / cut.abreast) + x + wait)
    side_by_side = cut.warps // cut.warps_k
    if not device.has_dependent_launch:
        return time * (1 + 0.01 * side_by_side.bit_length())
    # With many row blocks side by side blocks end at different times, and the next kernel waits for the last.
    uneven = {1: 1.0, 2: 1.0, 4: 1.08}.get(side_by_side, 1.25)
    return time * uneven * (1.0 if cut.stages > 2 or cut.abreast > 1 else 1.15)


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


def shared_bytes(shape: PackedShape, rows: int, cut: Tuning, *, normed: bool) -> int:
    """Dynamic shared memory of a block: `Layout` in linear.cu, and with a cluster the parts to be added."""
    slab = -(-shape.panels // cut.slabs) * shape.panel
    size = cut.warps * cut.stages * cut.abreast * shape.panel_bytes + _x_bytes(shape, rows, cut.slabs)
    if shape.bits < 16:
        size += -(-(slab // shape.group * max(2, rows) * 4) // 16) * 16
    if normed:
        size += slab * 4
    size += cut.sets * cut.batch * cut.warps * cut.abreast * rows * _LINE * 4
    if cut.join == "cluster":
        side = cut.warps // cut.warps_k * cut.abreast
        size += -(-shape.row_blocks // (cut.blocks * side)) * side * rows * ROW_BLOCK * 4
    return size


def _x_bytes(shape: PackedShape, rows: int, slabs: int) -> int:
    return rows * (-(-shape.panels // slabs) * shape.panel + CHUNK // 2) * 2


def _expression(shape: PackedShape, rows: int, epilogue: Epilogue, cut: Tuning, *, normed: bool) -> str:
    weights = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}, {cut.slabs}"
    rest = f"{rows}, {epilogue.upper()}, {str(normed).lower()}, {cut.warps}, {cut.warps_k}"
    rest += f", {cut.stages}, {cut.early}, {cut.abreast}, {cut.batch}, {cut.sets}, {cut.blocks_per_sm}"
    if cut.join == "cluster":
        return f"cluster_linear<{weights}, {rest}>"
    if cut.join == "shared_x":
        weights = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}, {cut.shared}"
        return f"sharing_linear<{weights}, {rest}>"
    return f"linear<{weights}, {cut.join.upper()}, {rest}>"

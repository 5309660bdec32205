"""Linear layers for 1 to 16 rows: launches of `linear.cu`, and how each is cut to its shape and device.

The time of a decode step is the time to read the weights, so what is chosen here is only how that stays true:
how many bytes are under way in each SM, how evenly they are spread, and that x costs little beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from edgellm.cuda.launch import Argument, At, Device, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.packing import CHUNK, ROW_BLOCK, PackedShape, Zero

Epilogue = Literal["store", "residual", "swiglu", "logits"]
"""`store`: float16 y; `residual`: added to float32; `swiglu`: float16 silu(gate) · up; `logits`: float32."""

Join = Literal["whole", "last_block", "cluster"]
"""Who adds what blocks with different columns found: nobody, if each has all columns; whichever block ends
last, through the workspace; the blocks of a cluster, out of shared memory (compute capability 9)."""

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
_WARPS: Final = 8
_LINE: Final = 20
_SHARED_GOAL: Final = 100 << 10
"""Of a block, so that two kernels fit an SM: the next one's weights arrive while this one ends."""
_X_GOAL: Final = 72 << 10
"""Of x in a block: beyond it the columns are parted among blocks."""
_RING_LEAST: Final = 32 << 10
_STAGES_LEAST: Final = 3
_STAGES_MOST: Final = 24
_CLUSTER_MOST: Final = 8


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
        stages: units of a warp's ring.
        unit: panels that a warp waits for at a time; more than one only if all warps have whole units.
        batch: row blocks whose sums over warps are added at a time.
        blocks_per_sm: that registers leave room for, of this linear and the next.
    """

    blocks: int
    slabs: int
    join: Join
    warps: int
    warps_k: int
    stages: int
    unit: int
    batch: int
    blocks_per_sm: int = 2


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
    cut = tuning or tuned(shape, rows=rows, device=device)
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
        shared_bytes(shape, rows, cut),
    )
    return [Launch(kernel, (cut.blocks, cut.slabs, 1), arguments)]


def decode_workspace(shape: PackedShape, rows: int, device: Device) -> int:
    """Bytes that this linear's launches need of a workspace; 0: none."""
    cut = tuned(shape, rows=rows, device=device)
    if cut.join != "last_block":
        return 0
    return COUNTERS_BYTES + cut.slabs * shape.row_blocks * rows * ROW_BLOCK * 4


def tuned(shape: PackedShape, *, rows: int, device: Device) -> Tuning:
    """The cut for a shape, a bucket and a device.

    Raises:
        BuildError: not even in slabs does x fit into the device's shared memory.
    """
    for slabs, join in _partings(shape, rows, device):
        cut = _balanced(shape, rows, device, slabs, join)
        fixed = shared_bytes(shape, rows, replace(cut, stages=0))
        room = max(min(_SHARED_GOAL, device.shared_per_block) - fixed, _RING_LEAST)
        stages = min(room // (cut.warps * cut.unit * shape.panel_bytes), _STAGES_MOST)
        cut = replace(cut, stages=max(stages, _STAGES_LEAST))
        if shared_bytes(shape, rows, cut) <= device.shared_per_block:
            return cut
    raise BuildError(
        f"a linear of {shape.k} columns needs more than the {device.shared_per_block} bytes of shared "
        "memory that a block has on this device"
    )


def _partings(shape: PackedShape, rows: int, device: Device) -> Iterator[tuple[int, Join]]:
    """Slabs and who joins them, the best first."""
    slabs = 1
    while _x_bytes(shape, rows, slabs) > _X_GOAL:
        slabs += 1
    slabs = -(-shape.panels // -(-shape.panels // slabs))  # none is empty
    if slabs == 1:
        yield 1, "whole"
    elif device.has_dependent_launch:
        if slabs <= _CLUSTER_MOST:
            yield slabs, "cluster"
        # Many row blocks, as a vocabulary has: their sums do not fit beside x, but then x costs little.
        yield 1, "whole"
    for panels in range(-(-shape.panels // slabs), 0, -1):
        yield -(-shape.panels // panels), "last_block"


def _balanced(shape: PackedShape, rows: int, device: Device, slabs: int, join: Join) -> Tuning:
    """Blocks and warps that end together, as nearly as whole panels let them; no stages yet."""
    slab_panels = -(-shape.panels // slabs)
    most = max(1, device.multiprocessors // slabs)

    def cost(warps_k: int) -> tuple[float, int]:
        rounds = -(-shape.row_blocks // (most * (_WARPS // warps_k)))
        # A round costs its panels and about as much as one and a half for the sum over warps.
        return rounds * (-(-slab_panels // warps_k) + 1.5), -warps_k

    warps_k = min((8, 4, 2, 1), key=cost)
    blocks = min(most, -(-shape.row_blocks // (_WARPS // warps_k)))
    unit = 2 if shape.panels % (slabs * warps_k * 2) == 0 else 1
    rounds = -(-shape.row_blocks // (blocks * (_WARPS // warps_k)))
    batch = min(4 if rows <= 2 else 1, rounds)
    return Tuning(blocks, slabs, join, _WARPS, warps_k, 0, unit, batch)


def row_blocks_of(shape: PackedShape, cut: Tuning, block: int, warp: int) -> list[int]:
    """The row blocks that a warp of block (block, any) multiplies: the kernel's arithmetic, for tests."""
    side = cut.warps // cut.warps_k
    return list(range(block * side + warp // cut.warps_k, shape.row_blocks, cut.blocks * side))


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
    size = cut.warps * cut.stages * cut.unit * shape.panel_bytes + _x_bytes(shape, rows, cut.slabs)
    if shape.bits < 16:
        size += slab // shape.group * max(2, rows) * 4
    size += 2 * cut.batch * cut.warps * rows * _LINE * 4
    if cut.join == "cluster":
        side = cut.warps // cut.warps_k
        size += -(-shape.row_blocks // (cut.blocks * side)) * side * rows * ROW_BLOCK * 4
    return size


def _x_bytes(shape: PackedShape, rows: int, slabs: int) -> int:
    return rows * (-(-shape.panels // slabs) * shape.panel + CHUNK // 2) * 2


def _expression(shape: PackedShape, rows: int, epilogue: Epilogue, cut: Tuning, *, normed: bool) -> str:
    weights = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}, {cut.slabs}"
    rest = f"{rows}, {epilogue.upper()}, {str(normed).lower()}, {cut.warps}, {cut.warps_k}"
    rest += f", {cut.stages}, {cut.unit}, {cut.batch}, {cut.blocks_per_sm}"
    if cut.join == "cluster":
        return f"cluster_linear<{weights}, {rest}>"
    return f"linear<{weights}, {cut.join.upper()}, {rest}>"

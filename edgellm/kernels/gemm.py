"""Linear layers for a chunk of a prompt: launches of `gemm.cu`, over the weights that decode linears read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Literal

from edgellm.cuda.launch import Argument, At, Device, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.linear import BUCKETS, COUNTERS_BYTES, ZERO_NAMES, decode_linear, decode_workspace
from edgellm.kernels.packing import ROW_BLOCK, PackedShape

Epilogue = Literal["store", "residual", "swiglu", "logits"]
"""`store`: float16 y; `residual`: added to float32; `swiglu`: float16 silu(gate) · up; `logits`: float32."""

_SOURCE: Final = "gemm.cu"
_STEP: Final = 64
_SPLITS: Final = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes, and with how many warps.

    Attributes:
        row_blocks: of 16 out features.
        tokens: of the chunk.
        warps_r, warps_t: warps along each.
        stages: steps of 64 columns under way.
        splits: blocks that part the columns; their sums meet in the workspace.
    """

    row_blocks: int
    tokens: int
    warps_r: int
    warps_t: int
    stages: int
    splits: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_r * self.warps_t


TILES: Final = (
    Tile(8, 128, 2, 2, 4),
    Tile(8, 128, 2, 2, 3),
    Tile(8, 128, 2, 2, 2),
    Tile(8, 128, 4, 2, 4),
    Tile(8, 128, 4, 2, 3),
    Tile(8, 64, 2, 2, 4),
    Tile(8, 64, 2, 2, 2),
    Tile(4, 64, 2, 2, 4),
    Tile(4, 64, 2, 2, 3),
    Tile(8, 32, 4, 1, 4),
    Tile(4, 32, 4, 1, 4),
    Tile(4, 32, 4, 1, 3),
)
"""From large to small; what is read from shared memory for a product is the less the larger a warp's part."""


def prefill_linear(
    shape: PackedShape,
    *,
    tokens: int,
    device: Device,
    chunk: At,
    x: At,
    weights: At,
    bias: At | None,
    epilogue: Epilogue,
    out: At,
    workspace: At | None = None,
    tile: Tile | None = None,
) -> list[Launch]:
    """y = x · wᵀ + bias for a chunk's bucket of tokens.

    Rows of the bucket past the chunk's count may get anything, from rows of x that may hold anything.

    Args:
        tokens: the bucket; up to 16 are a decode linear's rows.
        chunk: the `Chunk` that says how many tokens there are.
        x: float16 [tokens, K].
        bias: float32 [16 · row_blocks], see `pack_bias`.
        out: float16 or float32 [tokens, shape.outputs], see `Epilogue`.
        workspace: `prefill_workspace` bytes, as `decode_linear` wants it.
        tile: instead of `tile_for`; its splits must find counters (`has_counters`).
    """
    if (epilogue == "swiglu") != shape.swiglu:
        raise ValueError(f"epilogue {epilogue} does not suit weights with swiglu {shape.swiglu}")
    if tile is None and tokens <= BUCKETS[-1]:
        return decode_linear(
            shape,
            rows=_bucket(tokens),
            device=device,
            x=x,
            norm=None,
            weights=weights,
            bias=bias,
            epilogue=epilogue,
            out=out,
            workspace=workspace,
        )
    cut = tile or tile_for(shape, tokens=tokens, device=device)
    if cut.splits > 1 and workspace is None:
        raise ValueError("this linear needs a workspace")
    if not has_counters(shape, tokens, cut):
        raise ValueError(f"{cut} has more tiles than a workspace has counters, {COUNTERS_BYTES // 4}")
    weight = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}"
    parts = f"{cut.row_blocks}, {cut.tokens}, {cut.warps_r}, {cut.warps_t}"
    kernel = Kernel(
        _SOURCE,
        f"gemm<{weight}, {parts}, {epilogue.upper()}, {cut.stages}, {cut.splits}>",
        cut.threads,
        shared_bytes(shape, cut),
    )
    arguments: tuple[Argument, ...] = (
        chunk,
        weights,
        x,
        bias,
        out,
        workspace if cut.splits > 1 else None,
        tokens,
        shape.row_blocks,
        shape.outputs,
    )
    return [Launch(kernel, grid_of(shape, tokens, cut), arguments)]


def prefill_workspace(shape: PackedShape, tokens: int, device: Device) -> int:
    """Bytes that the launches for a bucket need of a workspace; 0: none."""
    if tokens <= BUCKETS[-1]:
        return decode_workspace(shape, _bucket(tokens), device)
    return tile_workspace(shape, tokens, tile_for(shape, tokens=tokens, device=device))


def tile_workspace(shape: PackedShape, tokens: int, tile: Tile) -> int:
    """Bytes of a workspace for this tile: counters, and float32 sums of every split; 0: none."""
    if tile.splits == 1:
        return 0
    x, y, _ = grid_of(shape, tokens, tile)
    return COUNTERS_BYTES + x * y * tile.splits * tile.row_blocks * ROW_BLOCK * tile.tokens * 4


def has_counters(shape: PackedShape, tokens: int, tile: Tile) -> bool:
    """Whether each tile whose sums several splits leave has a counter of its own."""
    x, y, splits = grid_of(shape, tokens, tile)
    return splits == 1 or x * y <= COUNTERS_BYTES // 4


@cache
def tile_for(shape: PackedShape, *, tokens: int, device: Device) -> Tile:
    """The tile that should take the least time.

    Raises:
        BuildError: none fits the device's shared memory.
    """
    fitting = [
        replace(tile, splits=splits)
        for tile in TILES
        if shared_bytes(shape, tile) <= device.shared_per_block
        for splits in _SPLITS
        if splits == 1 or _can_split(shape, tokens, tile, splits)
    ]
    if not fitting:
        raise BuildError(
            f"a prefill linear needs more than the {device.shared_per_block} bytes of shared memory that a "
            "block has on this device"
        )
    return min(fitting, key=lambda tile: _cost(shape, tokens, device, tile))


def _can_split(shape: PackedShape, tokens: int, tile: Tile, splits: int) -> bool:
    # Sums of many tokens are many bytes to write and to read again.
    few = splits <= 2 if tokens > 256 else splits * tokens <= 512
    # A warp of 64 × 64 has no registers left for adding.
    small = tile.row_blocks * ROW_BLOCK * tile.tokens // tile.threads <= 64
    counted = has_counters(shape, tokens, replace(tile, splits=splits))
    return few and small and counted and shape.k // _STEP >= splits * tile.stages


def _cost(shape: PackedShape, tokens: int, device: Device, tile: Tile) -> float:
    """Time, in no particular unit: waves of blocks, each step of which takes as long as its arithmetic, or as
    its latencies. Measured on an H100, where a unit is 54 ns."""
    x, y, splits = grid_of(shape, tokens, tile)
    sums = tile.row_blocks * ROW_BLOCK * tile.tokens // tile.threads
    registers = 90 + 1.15 * sums
    per_sm = min(
        int(65_536 / (registers * tile.threads)),
        (device.shared_per_block + 1024) // (shared_bytes(shape, tile) + 1024),
    )
    per_sm = max(1, per_sm)
    full, rest = divmod(x * y * splits, device.multiprocessors * per_sm)
    step = full * _step_time(tile, per_sm)
    if rest:
        step += _step_time(tile, -(-rest // device.multiprocessors))
    return shape.k / _STEP / splits * step + (75.0 + 10.0 * splits if splits > 1 else 0.0)


def _step_time(tile: Tile, blocks: int) -> float:
    """Of an SM with this many blocks."""
    rows, tokens = tile.row_blocks * ROW_BLOCK // tile.warps_r, tile.tokens // tile.warps_t
    reuse = 1.0 if rows * tokens >= 4096 else 0.9 if rows * tokens >= 2048 else 0.75
    warps = 1.0 if blocks * tile.threads >= 256 else 0.55
    stages = 1.0 if tile.stages >= 4 else 0.97 if tile.stages == 3 else 0.75
    return max(11.5, blocks * tile.row_blocks * tile.tokens / 64 / (reuse * warps * stages))


def grid_of(shape: PackedShape, tokens: int, tile: Tile) -> tuple[int, int, int]:
    """Tiles along tokens, then along out features, so that neighbours in time share weights; then splits."""
    return -(-tokens // tile.tokens), -(-shape.row_blocks // tile.row_blocks), tile.splits


def shared_bytes(shape: PackedShape, tile: Tile) -> int:
    """Dynamic shared memory of a block: the ring (`Stage` in gemm.cu), or at the end the tile of results."""
    numbers = ROW_BLOCK * _STEP * shape.bits // 8
    scales = shape.panel_bytes - shape.number_bytes
    stage = tile.row_blocks * (numbers + scales) + tile.tokens * _STEP * 2
    rows = tile.row_blocks * (8 if shape.swiglu else ROW_BLOCK)
    return max(tile.stages * stage, tile.tokens * (rows + 8) * 2)


def steps_of(shape: PackedShape, tile: Tile, split: int) -> range:
    """The steps of 64 columns that a split takes: the kernel's arithmetic, for tests."""
    steps = shape.k // _STEP
    return range(split * steps // tile.splits, (split + 1) * steps // tile.splits)


def outputs_of(
    shape: PackedShape, tokens: int, tile: Tile, block: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """(row block, first of 8 tokens) of each mma tile that a block's warps compute: for tests."""
    parts_r, parts_t = tile.row_blocks // tile.warps_r, tile.tokens // tile.warps_t // 8
    for warp in range(tile.warps_r * tile.warps_t):
        warp_r, warp_t = warp % tile.warps_r, warp // tile.warps_r
        for r in range(parts_r):
            for t in range(parts_t):
                row_block = block[1] * tile.row_blocks + warp_r * parts_r + r
                token = block[0] * tile.tokens + (warp_t * parts_t + t) * 8
                if row_block < shape.row_blocks and token < tokens:
                    yield row_block, token


def _bucket(tokens: int) -> int:
    return next(rows for rows in BUCKETS if rows >= tokens)

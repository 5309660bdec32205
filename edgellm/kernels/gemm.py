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
        warps_r, warps_t: warps of a team along each.
        stages: steps of 64 columns under way for a team.
        splits: blocks that part the columns; their sums meet in the workspace.
        warps_k: teams of a block that part the columns; their sums meet in shared memory.
    """

    row_blocks: int
    tokens: int
    warps_r: int
    warps_t: int
    stages: int
    splits: int = 1
    warps_k: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_r * self.warps_t * self.warps_k


_TIMES: Final = {
    Tile(8, 128, 2, 2, 4): (0, 784, 289),
    Tile(8, 128, 2, 2, 3): (0, 800, 295),
    Tile(8, 128, 2, 2, 2): (0, 1000, 370),
    Tile(8, 64, 4, 1, 4): (700, 279, 291),
    Tile(8, 64, 4, 1, 3): (700, 285, 291),
    Tile(8, 64, 4, 1, 2): (700, 370, 370),
    Tile(4, 64, 4, 1, 4): (4300, 146, 188),
    Tile(4, 64, 4, 1, 3): (4300, 150, 192),
    Tile(8, 32, 4, 1, 4): (4100, 113, 212),
    Tile(4, 32, 4, 1, 4): (4900, 122, 105),
    Tile(4, 32, 4, 1, 3): (4900, 130, 115),
    Tile(8, 128, 4, 1, 3, warps_k=2): (0, 1379, 0),
    Tile(8, 64, 4, 1, 4, warps_k=2): (2200, 762, 0),
}
"""Nanoseconds on an H100: of a launch, whatever it does; of a step of 64 columns of each team, for the
blocks of a multiprocessor together, and for each of them. Fitted to what `tools/gpu/linear_tiles.py` found,
in 4 bits and groups of 128; of other weights and devices it is a guess. Two stages were not measured."""

TILES: Final = tuple(_TIMES)
"""The larger a warp's part, the less is read from shared memory, and unpacked, for a product."""


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
    parts = f"{cut.row_blocks}, {cut.tokens}, {cut.warps_r}, {cut.warps_t}, {cut.warps_k}"
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
    few = splits * max(tokens, 32) <= 256
    # A warp of 64 × 64 has no registers left for adding.
    small = _sums(tile) <= 64
    counted = has_counters(shape, tokens, replace(tile, splits=splits))
    return few and small and counted and shape.k // _STEP >= splits * tile.warps_k * tile.stages


def _sums(tile: Tile) -> int:
    """That a thread has."""
    return tile.row_blocks * ROW_BLOCK * tile.tokens * tile.warps_k // tile.threads


def _cost(shape: PackedShape, tokens: int, device: Device, tile: Tile) -> float:
    """Nanoseconds on an H100: waves of blocks, whose steps take as long as they do side by side."""
    x, y, splits = grid_of(shape, tokens, tile)
    registers = 66 + 1.35 * _sums(tile)
    per_sm = min(
        int(65_536 / (registers * tile.threads)),
        (device.shared_per_block + 1024) // (shared_bytes(shape, tile) + 1024),
    )
    per_sm = max(1, per_sm)
    start, together, each = _TIMES[replace(tile, splits=1)]
    full, rest = divmod(x * y * splits, device.multiprocessors * per_sm)
    step = full * (together + each * per_sm)
    if rest:
        step += together + each * -(-rest // device.multiprocessors)
    cost = start + shape.k / _STEP / splits / tile.warps_k * step
    if splits > 1:
        adding = 100.0 * tile.row_blocks * ROW_BLOCK * tile.tokens / tile.threads
        cost += adding + 4e-3 * x * tile.tokens * shape.n * splits / per_sm
    return cost


def grid_of(shape: PackedShape, tokens: int, tile: Tile) -> tuple[int, int, int]:
    """Tiles along tokens, then along out features, so that neighbours in time share weights; then splits."""
    return -(-tokens // tile.tokens), -(-shape.row_blocks // tile.row_blocks), tile.splits


def shared_bytes(shape: PackedShape, tile: Tile) -> int:
    """Dynamic shared memory of a block: the rings (`Stage` in gemm.cu), or at the end the tile of results, of
    float32 half of it, or sums of other teams."""
    numbers = ROW_BLOCK * _STEP * shape.bits // 8
    scales = shape.panel_bytes - shape.number_bytes
    stage = tile.row_blocks * (numbers + scales) + tile.tokens * _STEP * 2
    rows = tile.row_blocks * (8 if shape.swiglu else ROW_BLOCK)
    results = tile.tokens * (rows + 8) * 2
    wide_results = tile.tokens // 2 * (tile.row_blocks * ROW_BLOCK + 4) * 4
    sums = (tile.warps_k - 1) * tile.row_blocks * ROW_BLOCK * tile.tokens * 4
    return max(tile.warps_k * tile.stages * stage, results, wide_results, sums)


def steps_of(shape: PackedShape, tile: Tile, part: int) -> range:
    """The steps of 64 columns that a team takes, part `warps_k` · split + team: the kernel's arithmetic, for
    tests."""
    steps, parts = shape.k // _STEP, tile.splits * tile.warps_k
    return range(part * steps // parts, (part + 1) * steps // parts)


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

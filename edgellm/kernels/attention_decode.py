"""Decode attention: who works on what, and the launch of `attention_decode.cu`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.attention_shape import AttentionShape, Cache, HeadNorms, true_or_false

TILE: Final = 16
"""Tokens that a warp takes at a time."""

MOST_ROWS: Final = 32
"""A lane of a warp knows each row."""

_WARPS: Final = 4
_MOST_STAGES: Final = 3
_STATIC_SHARED: Final = 1024
"""Shared memory that the kernel declares itself, beside the sums and queries that depend on its shape."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch is cut.

    Attributes:
        warps: of a block.
        stages: tiles that each warp has on their way.
        blocks: for each KV head.
    """

    warps: int
    stages: int
    blocks: int

    @property
    def piece(self) -> int:
        """Tokens that a block takes at a time."""
        return TILE * self.warps


def plan(shape: AttentionShape, *, rows: int, device: Device, blocks_per_multiprocessor: int = 1) -> Plan:
    """Blocks enough to fill the device once, no more than there can be pieces.

    Raises:
        BuildError: more rows than a warp has lanes.
    """
    if rows > MOST_ROWS:
        raise BuildError(f"decode attention takes {MOST_ROWS} rows at most, not {rows}")
    # Two blocks of a multiprocessor, and the product that comes next, should fit side by side.
    room = min(device.shared_per_block, 96 * 1024) - _static_shared(shape)
    stages = max(1, min(_MOST_STAGES, room // (_WARPS * _stage_bytes(shape))))
    filled = max(1, device.multiprocessors * blocks_per_multiprocessor // shape.kv_heads)
    pieces = rows * -(-shape.max_seq // (TILE * _WARPS))
    return Plan(_WARPS, stages, min(filled, pieces))


@dataclass(frozen=True, slots=True)
class Segment:
    """What one block does for one row: pieces `first` … `last` of the row, both included.

    Attributes:
        row: index in the step's rows.
        whole: whether these are all of the row's pieces.
        place: where in the block's two partial sums it leaves its own, unless whole.
    """

    row: int
    first: int
    last: int
    whole: bool
    place: int


def segments(plan: Plan, pasts: Sequence[int | None]) -> Iterator[tuple[int, Segment]]:
    """The kernel's own arithmetic: (block, segment) of each KV head, for rows of these lengths.

    Args:
        pasts: tokens in front of each row's new one; None for nobody's row.
    """
    pieces = [0 if past is None else past // plan.piece + 1 for past in pasts]
    total = sum(pieces)
    share = -(-total // plan.blocks)
    for block in range(plan.blocks):
        begin, end = block * share, min((block + 1) * share, total)
        start = 0
        for row, count in enumerate(pieces):
            first, last = max(begin, start), min(end, start + count) - 1
            if first <= last:
                whole = last - first + 1 == count
                second = block == start // share and start != begin
                yield block, Segment(row, first - start, last - start, whole, int(second))
            start += count


def decode_workspace(shape: AttentionShape, *, rows: int, device: Device) -> int:
    """Bytes needed; the first `counter_bytes` must be zero before the first launch, and are after it."""
    cut = plan(shape, rows=rows, device=device)
    return counter_bytes(shape, rows=rows) + cut.blocks * 2 * shape.kv_heads * _partial_bytes(shape)


def counter_bytes(shape: AttentionShape, *, rows: int) -> int:
    """Bytes at the workspace's start that count blocks, a multiple of 256."""
    return -(-rows * shape.kv_heads * 4 // 256) * 256


def decode_attention(
    shape: AttentionShape,
    *,
    rows: int,
    device: Device,
    qkv: At,
    rows_at: At,
    rope: At,
    norms: HeadNorms,
    cache: Cache,
    out: At,
    workspace: At,
) -> list[Launch]:
    """One new token for each row: rotate, append to the cache, attend.

    Args:
        rows: the bucket; `rows_at` is an array of as many `rows.ROW`.
        qkv: float16 [rows, (heads + 2 · kv_heads) · head_size]: queries, keys, values.
        rope: `attention_shape.rope_table`.
        out: float16 [rows, heads · head_size]; nobody's rows stay as they are.
        workspace: `decode_workspace` bytes, at a multiple of 256.

    Raises:
        BuildError: more rows than the kernel takes.
    """
    cut = plan(shape, rows=rows, device=device)
    flags = (true_or_false(shape.kv == "int8"), true_or_false(shape.qk_norm))
    numbers = (shape.head_size, shape.queries, shape.kv_heads, *flags, cut.warps, cut.stages)
    kernel = Kernel(
        "attention_decode.cu",
        f"attention_decode<{', '.join(map(str, numbers))}>",
        cut.warps * 32,
        cut.warps * cut.stages * _stage_bytes(shape),
    )
    arguments = (
        *(rows, shape.max_seq, rows_at, qkv, rope, norms.q, norms.k, shape.epsilon),
        shape.scale * math.log2(math.e),
        *(cache.keys, cache.values, cache.key_scales, cache.value_scales, out),
        *(workspace + counter_bytes(shape, rows=rows), workspace),
    )
    return [Launch(kernel, (cut.blocks, shape.kv_heads, 1), arguments)]


def _stage_bytes(shape: AttentionShape) -> int:
    """A tile of keys and one of values in shared memory, with their scales."""
    return 2 * TILE * shape.shared_row_bytes + (2 * TILE * 2 if shape.kv == "int8" else 0)


def _static_shared(shape: AttentionShape) -> int:
    sums = _WARPS * shape.queries * (shape.head_size + 4 + 2) * 4
    return sums + shape.queries * (shape.head_size + 8) * 2 + _STATIC_SHARED


def _partial_bytes(shape: AttentionShape) -> int:
    """Sums of every query head, then the largest logit and the sum of weights of each; a multiple of 16."""
    return -(-shape.queries * (shape.head_size + 2) * 4 // 16) * 16

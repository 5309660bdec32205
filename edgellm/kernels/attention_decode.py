"""Decode attention: who works on what, and the launch of `attention_decode.cu`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.attention_shape import (
    COUNTERS,
    COUNTERS_BYTES,
    AttentionShape,
    Cache,
    HeadNorms,
    true_or_false,
)

TILE: Final = 16
"""Tokens that a warp takes at a time."""

MOST_ROWS: Final = 32
"""A lane of a warp knows each row."""

SECOND_ROW: Final = 3
"""What a second row takes a block, in tiles of each warp: its beginning and its end."""

_SOURCE: Final = "attention_decode.cu"

_CLUSTER_SM: Final = 90
_CLUSTER_MULTIPROCESSORS: Final = 64
"""Fewer are too few for clusters to find room, and are filled without."""
_CLUSTER_SIZES: Final = (8, 4, 2)
"""Of 8 blocks is what every device with clusters can do."""
_BEYOND_CLUSTERS: Final = 12
"""Multiprocessors that clusters of more than two blocks do not reach: a cluster's are of one GPC, and GPCs
have 14 to 18. An H100 of 132 said so (cuOccupancyMaxActiveClusters): 30 clusters of 4, 15 of 8, 66 of 2."""

_MOST_SHARED: Final = 224 * 1024
_RESERVED: Final = 1024
"""What the device takes of a multiprocessor's shared memory for each block."""
_STATIC_SHARED: Final = 1024
"""Shared memory that the kernel declares itself, beside the sums and queries that depend on its shape."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch is cut.

    Attributes:
        warps: of a block.
        stages: tiles that each warp has on their way.
        blocks: in all; in clusters, for each row and KV head.
        clusters: whether a row's blocks are a cluster.
        together: blocks that a multiprocessor has room for, where they are dealt.
    """

    warps: int
    stages: int
    blocks: int
    clusters: bool = False
    together: int = 1


def plan(shape: AttentionShape, *, rows: int, device: Device) -> Plan:
    """Blocks enough to fill the device, no more than there can be pieces.

    Raises:
        BuildError: more rows than a warp has lanes, or than there are counters for.
    """
    if rows > MOST_ROWS:
        raise BuildError(f"decode attention takes {MOST_ROWS} rows at most, not {rows}")
    if rows * shape.kv_heads > COUNTERS:
        raise BuildError(
            f"decode attention takes {COUNTERS // shape.kv_heads} rows of {shape.kv_heads} KV heads"
        )
    units = rows * shape.kv_heads
    for size in _CLUSTER_SIZES if _has_clusters(device) else ():
        # One that does not run with the others waits until they have ended.
        if units <= clusters_at_once(size, device) and (cut := _clustered(shape, rows, device, size)):
            return cut
    # Where a block has several rows one after the other, a neighbour hides their beginnings and ends.
    if units > device.multiprocessors and (cut := _in_twos(shape, device)):
        return cut
    warps = _warps(shape, device.shared_per_block)
    stages = max(1, min(_stages(shape), _fitting(shape, warps, device.shared_per_block)))
    rounds = units * -(-shape.max_seq // (TILE * warps))
    return Plan(warps, stages, min(device.multiprocessors, rounds))


def clusters_at_once(size: int, device: Device) -> int:
    """Clusters of `size` blocks that run at a time, each block on a multiprocessor of its own."""
    reached = device.multiprocessors - (_BEYOND_CLUSTERS if size > 2 else 0)
    return max(0, reached // size)


def _has_clusters(device: Device) -> bool:
    return device.sm >= _CLUSTER_SM and device.multiprocessors >= _CLUSTER_MULTIPROCESSORS


def _clustered(shape: AttentionShape, rows: int, device: Device, size: int) -> Plan | None:
    """With a cluster for each row and KV head; None: there is no room for its sums."""
    room = min(device.shared_per_block, _MOST_SHARED) - size * _gathered_bytes(shape)
    warps = _warps(shape, room)
    # A short context is in flight at once; smaller blocks leave more room for what comes next.
    short = rows == 1 and shape.max_seq <= 2048
    stages = min(1 if short else _stages(shape), _fitting(shape, warps, room))
    return Plan(warps, stages, size, clusters=True) if stages else None


def _in_twos(shape: AttentionShape, device: Device) -> Plan | None:
    """Dealt to two blocks on each multiprocessor; None: there is no room for enough that is under way."""
    room = (device.shared_per_block + _RESERVED) // 2 - _RESERVED
    for warps, least in ((8, 1), (4, 2)) if shape.queries <= 8 else ():
        if (fitting := _fitting(shape, warps, room)) >= least:
            return Plan(warps, min(_stages(shape), fitting), 2 * device.multiprocessors, together=2)
    return None


def _warps(shape: AttentionShape, room: int) -> int:
    return 8 if shape.queries <= 8 and _fitting(shape, 8, room) else 4


def _stages(shape: AttentionShape) -> int:
    return 2 if shape.kv == "fp16" else 3


def _fitting(shape: AttentionShape, warps: int, room: int) -> int:
    """Stages of each warp's ring that there is room for."""
    return max(0, room - _static_shared(shape, warps)) // (warps * _stage_bytes(shape))


@dataclass(frozen=True, slots=True)
class Segment:
    """What one block does for one row and KV head: the row's tiles `first` … `last`, both included.

    Attributes:
        head: the KV head.
        row: index in the step's rows.
        whole: whether these are all of the row's tiles.
        place: where in the block's two partial sums it leaves its own, unless whole.
    """

    head: int
    row: int
    first: int
    last: int
    whole: bool
    place: int


def segments(plan: Plan, kv_heads: int, pasts: Sequence[int | None]) -> Iterator[tuple[int, Segment]]:
    """The kernel's own arithmetic: (block, segment) for rows of these lengths.

    Args:
        pasts: tokens in front of each row's new one; None for nobody's row.

    In clusters blocks are numbered across rows and heads.
    """
    tiles = [0 if past is None else past // TILE + 1 for past in pasts]
    if plan.clusters:
        for i, (row, head) in enumerate(product(range(len(tiles)), range(kv_heads))):
            for block, each in _dealt(plan.blocks, [(head, row, tiles[row])]):
                yield i * plan.blocks + block, each
        return
    work = [(head, row, count) for head in range(kv_heads) for row, count in enumerate(tiles) if count]
    own = plan.blocks // len(work) if work else 0
    even = -(-sum(tiles) * kv_heads // plan.blocks)
    if own and -(-max(tiles) // own) <= even + SECOND_ROW * plan.warps:
        for i, unit in enumerate(work):
            for block, segment in _dealt(own, [unit]):
                yield i * own + block, segment
        return
    yield from _dealt(plan.blocks, work)


def _dealt(blocks: int, work: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Segment]]:
    """Deal (head, row, tiles), laid end to end, evenly to blocks."""
    total = sum(count for _, _, count in work)
    share = -(-total // blocks)
    for block in range(blocks):
        begin, end = block * share, min((block + 1) * share, total)
        start = 0
        for head, row, count in work:
            first, last = max(begin, start), min(end, start + count) - 1
            if first <= last:
                whole = last - first + 1 == count
                second = block == start // share and start != begin
                yield block, Segment(head, row, first - start, last - start, whole, int(second))
            start += count


def decode_workspace(shape: AttentionShape, *, rows: int, device: Device) -> int:
    """Bytes needed, whose first COUNTERS_BYTES must be 0 before the first launch."""
    cut = plan(shape, rows=rows, device=device)
    return COUNTERS_BYTES + (0 if cut.clusters else cut.blocks * 2 * _partial_bytes(shape))


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
    cut: Plan | None = None,
) -> list[Launch]:
    """One new token for each row: rotate, append to the cache, attend.

    Args:
        rows: the bucket; `rows_at` is an array of as many `rows.ROW`.
        qkv: float16 [rows, (heads + 2 · kv_heads) · head_size]: queries, keys, values.
        rope: `attention_shape.rope_table`.
        out: float16 [rows, heads · head_size]; nobody's rows stay as they are.
        workspace: `decode_workspace` bytes, at a multiple of 256.
        cut: instead of `plan`'s.

    Raises:
        BuildError: more rows than the kernel takes.
    """
    cut = cut or plan(shape, rows=rows, device=device)
    flags = (true_or_false(shape.kv == "int8"), true_or_false(shape.qk_norm))
    numbers = (shape.head_size, shape.queries, shape.kv_heads, *flags, cut.warps, cut.stages)
    shared = cut.warps * cut.stages * _stage_bytes(shape)
    arguments = (
        *(shape.max_seq, rows_at, qkv, rope, norms.q, norms.k, shape.epsilon),
        shape.scale * math.log2(math.e),
        *(cache.held, cache.scales, out),
    )
    if cut.clusters:
        kernel = Kernel(
            _SOURCE,
            f"attention_decode_cluster<{', '.join(map(str, (*numbers, cut.blocks)))}>",
            cut.warps * 32,
            shared + cut.blocks * _gathered_bytes(shape),
        )
        return [Launch(kernel, (cut.blocks, shape.kv_heads, rows), arguments)]
    kernel = Kernel(
        _SOURCE, f"attention_decode<{', '.join(map(str, (*numbers, cut.together)))}>", cut.warps * 32, shared
    )
    return [Launch(kernel, (cut.blocks, 1, 1), (rows, *arguments, workspace + COUNTERS_BYTES, workspace))]


def _stage_bytes(shape: AttentionShape) -> int:
    """A tile of keys and one of values in shared memory, with their scales."""
    return 2 * TILE * shape.shared_row_bytes + (2 * TILE * 2 if shape.kv == "int8" else 0)


def _static_shared(shape: AttentionShape, warps: int) -> int:
    sums = warps * shape.queries * (shape.head_size + 8 + 2) * 4
    # As float16, or two bytes each of a multiple of 32 and a scale.
    query = (shape.head_size + 8) * 2 if shape.kv == "fp16" else 2 * (-(-shape.head_size // 32) * 32 + 16) + 4
    return sums + shape.queries * query + _STATIC_SHARED


def _partial_bytes(shape: AttentionShape) -> int:
    """Sums of every query head, then the largest logit and the sum of weights of each; a multiple of 16."""
    return -(-shape.queries * (shape.head_size + 2) * 4 // 16) * 16


def _gathered_bytes(shape: AttentionShape) -> int:
    """What a block of a cluster leaves in the first one's shared memory."""
    return shape.queries * (shape.head_size + 4) * 4

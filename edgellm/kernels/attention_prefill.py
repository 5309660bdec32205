"""Prefill attention: launches of `attention_prefill.cu`."""

from __future__ import annotations

import math
from typing import Final

from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.kernels.attention_shape import COUNTERS_BYTES, AttentionShape, Cache, HeadNorms, true_or_false

_SOURCE: Final = "attention_prefill.cu"
_WARPS: Final = 4
_KEYS: Final = 64
_STAGES: Final = 2
_ROWS: Final = 16 * _WARPS
"""(Token, query head) rows of a block."""

_ON_A_MULTIPROCESSOR: Final = 2
"""Blocks that shared memory has room for, but for one of sm_86."""
MOST_PARTS: Final = 16
"""More are more sums than the last block adds up in the time they save."""
LEAST_TILES: Final = 256 // _KEYS
"""Tiles of a part."""
LEAST_PARTED: Final = 768 // _KEYS
"""Tiles of a row that has parts: adding up sums takes as long as about eight tiles."""


def rope_and_append(
    shape: AttentionShape, *, tokens: int, chunk: At, qkv: At, rope: At, norms: HeadNorms, cache: Cache
) -> list[Launch]:
    """Normalise and rotate a chunk's queries and keys; keys and values go to the cache.

    Queries stay in `qkv`, multiplied by what `prefill_attention` expects: scale / ln 2.

    Args:
        tokens: the bucket; `chunk` is one `rows.CHUNK`, which says how many there are.
        qkv: float16 [tokens, (heads + 2 · kv_heads) · head_size]: queries, keys, values.
        rope: `attention_shape.rope_table`.
    """
    flags = ", ".join(map(true_or_false, (shape.kv == "int8", shape.qk_norm)))
    kernel = Kernel(
        _SOURCE,
        f"rope_and_append<{shape.head_size}, {shape.heads}, {shape.kv_heads}, {flags}>",
        _WARPS * 32,
    )
    arguments = (
        *(shape.max_seq, chunk, qkv, rope, norms.q, norms.k, shape.epsilon),
        shape.scale * math.log2(math.e),
        *(cache.held, cache.scales),
    )
    heads = shape.heads + 2 * shape.kv_heads
    return [Launch(kernel, (-(-heads // _WARPS), tokens, 1), arguments)]


def parts(shape: AttentionShape, *, tokens: int, device: Device) -> int:
    """Blocks among which the keys of a row can be parted: as many as the device has room for at a time."""
    blocks = shape.kv_heads * _row_blocks(shape, tokens)
    return max(1, min(MOST_PARTS, _ON_A_MULTIPROCESSOR * device.multiprocessors // blocks))


def part_tiles(parts: int, keys: int) -> list[range]:
    """The kernel's own arithmetic: the tiles of `keys` keys of each part; the last may have none."""
    tiles = -(-keys // _KEYS)
    share = max(-(-tiles // parts), LEAST_TILES) if tiles >= LEAST_PARTED else tiles
    return [range(begin, min(begin + share, tiles)) for begin in range(0, tiles, share)]


def prefill_attention_workspace(shape: AttentionShape, *, tokens: int, device: Device) -> int:
    """Bytes needed, whose first COUNTERS_BYTES must be 0 before the first launch; 0: none."""
    count = parts(shape, tokens=tokens, device=device)
    if count == 1:
        return 0
    blocks = shape.kv_heads * _row_blocks(shape, tokens)
    return COUNTERS_BYTES + blocks * count * _ROWS * (shape.head_size + 2) * 4


def prefill_attention(
    shape: AttentionShape,
    *,
    tokens: int,
    device: Device,
    chunk: At,
    qkv: At,
    cache: Cache,
    out: At,
    workspace: At | None,
) -> list[Launch]:
    """Causal attention of a chunk's queries, which `rope_and_append` has prepared, over all of its slot.

    Args:
        tokens: the bucket.
        out: float16 [tokens, heads · head_size]; rows past the chunk's count stay as they are.
        workspace: `prefill_attention_workspace` bytes, at a multiple of 256; None: where that is 0.
    """
    count = parts(shape, tokens=tokens, device=device)
    kernel = Kernel(
        _SOURCE,
        f"attention_prefill<{shape.head_size}, {shape.queries}, {shape.kv_heads}, "
        f"{true_or_false(shape.kv == 'int8')}, {_WARPS}, {_KEYS}, {_STAGES}, {true_or_false(count > 1)}>",
        _WARPS * 32,
        _STAGES * _stage_bytes(shape),
    )
    arguments = (
        *(shape.max_seq, chunk, qkv, cache.held, cache.scales, out),
        *((workspace + COUNTERS_BYTES, workspace) if workspace is not None and count > 1 else (None, None)),
    )
    return [Launch(kernel, (shape.kv_heads, _row_blocks(shape, tokens), count), arguments)]


def _row_blocks(shape: AttentionShape, tokens: int) -> int:
    return -(-tokens * shape.queries // _ROWS)


def _stage_bytes(shape: AttentionShape) -> int:
    """A tile of keys and one of values in shared memory, with their scales."""
    return 2 * _KEYS * shape.shared_row_bytes + (2 * _KEYS * 2 if shape.kv == "int8" else 0)

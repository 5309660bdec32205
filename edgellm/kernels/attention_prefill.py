"""Prefill attention: launches of `attention_prefill.cu`."""

from __future__ import annotations

import math
from typing import Final

from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.kernels.attention_shape import AttentionShape, Cache, HeadNorms, true_or_false

_SOURCE: Final = "attention_prefill.cu"
_WARPS: Final = 4
_KEYS: Final = 64
_STAGES: Final = 2


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
        *(cache.keys, cache.values, cache.key_scales, cache.value_scales),
    )
    heads = shape.heads + 2 * shape.kv_heads
    return [Launch(kernel, (-(-heads // _WARPS), tokens, 1), arguments)]


def prefill_attention(
    shape: AttentionShape, *, tokens: int, chunk: At, qkv: At, cache: Cache, out: At
) -> list[Launch]:
    """Causal attention of a chunk's queries, which `rope_and_append` has prepared, over all of its slot.

    Args:
        tokens: the bucket.
        out: float16 [tokens, heads · head_size]; rows past the chunk's count stay as they are.
    """
    kernel = Kernel(
        _SOURCE,
        f"attention_prefill<{shape.head_size}, {shape.queries}, {shape.kv_heads}, "
        f"{true_or_false(shape.kv == 'int8')}, {_WARPS}, {_KEYS}, {_STAGES}>",
        _WARPS * 32,
        _STAGES * _stage_bytes(shape),
    )
    arguments = (
        *(shape.max_seq, chunk, qkv, cache.keys, cache.values, cache.key_scales, cache.value_scales),
        out,
    )
    blocks = -(-tokens * shape.queries // (16 * _WARPS))
    return [Launch(kernel, (shape.kv_heads, blocks, 1), arguments)]


def _stage_bytes(shape: AttentionShape) -> int:
    """A tile of keys and one of values in shared memory, with their scales."""
    return 2 * _KEYS * shape.shared_row_bytes + (2 * _KEYS * 2 if shape.kv == "int8" else 0)

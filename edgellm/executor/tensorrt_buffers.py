"""What the TensorRT executor keeps on the device beside the plan: caches, activations, a step's data.

Caches have room for the tokens that the plan was built for, whatever is asked for: that size is in the plan.
"""

from __future__ import annotations

from typing import Final

from edgellm.engine_config import BuildConfig
from edgellm.executor.sampling_launches import sampling_buffers
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.memory.arena import Buffer, aligned
from edgellm.memory.plan import Shape
from edgellm.model.spec import ModelSpec

HALF: Final = 2
"""Bytes of a float16."""
INDEX: Final = 4
"""Bytes of an int32."""


def longest_chunk(shape: Shape) -> int:
    """Most tokens of a prompt that go in one run."""
    return min(shape.max_num_tokens, shape.max_seq_len)


def row_bytes(spec: ModelSpec, build: BuildConfig) -> int:
    """Of one slot's keys, or values, in a layer."""
    return spec.num_key_value_heads * build.max_seq_len * spec.head_size * HALF


def cache_bytes(spec: ModelSpec, build: BuildConfig, shape: Shape) -> int:
    """Of all slots' keys, or values, in a layer, up to where the next ones begin."""
    return aligned(shape.max_batch_size * row_bytes(spec, build))


def lasting_buffers(
    spec: ModelSpec, build: BuildConfig, shape: Shape, *, context_bytes: int
) -> tuple[Buffer, ...]:
    """All of them.

    Args:
        context_bytes: of the activations, of the profile that needs more.
    """
    slots, tokens = shape.max_batch_size, longest_chunk(shape)
    sizes = {
        "kv_cache": 2 * spec.num_hidden_layers * cache_bytes(spec, build, shape),
        "spare_row": row_bytes(spec, build),
        "context": context_bytes,
        # Inputs of the network.
        "tokens": max(slots, tokens) * INDEX,
        "positions": max(slots, tokens) * INDEX,
        "past": slots * INDEX,
        "last": slots * INDEX,
        "lengths": slots * INDEX,
        "logits": slots * spec.vocab_size * 4,
        # What the host says of a step.
        "rows": slots * ROW.itemsize,
        "chunk": CHUNK.itemsize + tokens * INDEX,
    }
    own = (Buffer(name, size) for name, size in sizes.items())
    return (*own, *sampling_buffers(spec.vocab_size, slots=slots, rows=slots))

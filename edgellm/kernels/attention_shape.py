"""What attention kernels are specialised on, and how the KV cache they share is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.launch import At
from edgellm.errors import BuildError
from edgellm.model.rotary import Rotary

CacheKind = Literal["fp16", "int8"]

HEAD_SIZES: Final = (64, 80, 96, 128)
MOST_QUERIES: Final = 16
"""Query heads of one key/value head: two fragments' columns."""

COUNTERS: Final = 1024
COUNTERS_BYTES: Final = 4 * COUNTERS
"""Of a workspace's start: counters that must be 0 before the first launch; launches leave them so. As many
for all launches, which share one workspace: behind them lie partial sums."""

SEQUENCE_MULTIPLE: Final = 16
"""A slot's capacity is a multiple of this, a tile's tokens."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention.

    A cache is [slots, max_seq / 16, kv_heads, 2, 16, head_size]: of 16 tokens a head's keys, then its values.
    `fp16` holds halves. `int8` holds bytes, x = scale · (byte − 128), with float16 scales, which lie as it
    does: [slots, max_seq / 16, kv_heads, 2, 16].

    Attributes:
        heads, kv_heads: of queries, and of keys and values.
        head_size: elements of a head.
        max_seq: tokens that a slot can hold, a multiple of 16.
        kv: what the caches hold.
        scale: factor on q·k before the softmax.
        qk_norm: whether query and key heads are normalised before they are rotated.
        epsilon: of that norm.

    Raises:
        BuildError: there is no kernel for these numbers; the message names the one at fault.
    """

    heads: int
    kv_heads: int
    head_size: int
    max_seq: int
    kv: CacheKind
    scale: float
    qk_norm: bool = False
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.head_size not in HEAD_SIZES:
            sizes = ", ".join(map(str, HEAD_SIZES))
            raise BuildError(f"head_size {self.head_size} has no CUDA attention kernel; {sizes} have")
        if self.heads % self.kv_heads:
            raise BuildError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.queries > MOST_QUERIES:
            raise BuildError(
                f"{self.queries} query heads share a key/value head; at most {MOST_QUERIES} can on CUDA"
            )
        if self.max_seq % SEQUENCE_MULTIPLE:
            raise BuildError(f"max_seq {self.max_seq} must be a multiple of {SEQUENCE_MULTIPLE}")

    @property
    def queries(self) -> int:
        """Query heads of one key/value head."""
        return self.heads // self.kv_heads

    @property
    def qkv_width(self) -> int:
        """Elements of a row that the projections give: query heads, key heads, value heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def cache_bytes(self, slots: int) -> int:
        """Bytes of the keys and values."""
        return slots * self.held_bytes(self.max_seq)

    def scale_bytes(self, slots: int) -> int:
        """Bytes of the scales; 0 for fp16."""
        return slots * self.held_scale_bytes(self.max_seq)

    def held_bytes(self, tokens: int) -> int:
        """Bytes from a slot's start that hold so many tokens' keys and values."""
        return self._places(tokens) * self.row_bytes

    def held_scale_bytes(self, tokens: int) -> int:
        """The same of the scales."""
        return self._places(tokens) * 2 if self.kv == "int8" else 0

    def _places(self, tokens: int) -> int:
        """Heads' rows in whole tiles."""
        return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE * self.kv_heads * 2

    @property
    def row_bytes(self) -> int:
        """Bytes of a cached head, and of the same in shared memory: see `CacheRow` in attention.cuh."""
        return self.head_size * (2 if self.kv == "fp16" else 1)

    @property
    def shared_row_bytes(self) -> int:
        """Bytes of a cached head in shared memory, an odd number of 16: see `CacheRow` in attention.cuh."""
        return (self.row_bytes // 16 | 1) * 16


@dataclass(frozen=True, slots=True)
class Cache:
    """Where a layer's keys and values lie, and their scales; an fp16 cache has none."""

    held: At
    scales: At | None = None


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Gains float32 [head_size] of the norms on query and key heads; None where the model has none."""

    q: At | None = None
    k: At | None = None


def rope_table(rotary: Rotary, max_seq: int) -> NDArray[np.float32]:
    """What kernels rotate by: float32 [max_seq, 2, head_size / 2], a position's cosines, then its sines."""
    return np.stack(rotary.tables(max_seq), axis=1).astype(np.float32)


def true_or_false(flag: bool) -> str:
    """As C++ spells it."""
    return "true" if flag else "false"

"""The canonical form of a weight matrix: what every checkpoint reader gives and every emitter takes.

A weight is [N, K]: N out features, K in features, row-major. Group-wise quantized weights are
    w[n, k] = scale[n, g] · q[n, k] + offset[n, g],   g = k // group,
with the offset kept whole in float32 (or as an integer zero point, w = scale · (q − zero)), because its
rounding to float16 is not exact.

Nothing is read before it is asked for, and a weight can be asked for by rows: whoever goes through it by
`blocks()` holds a few times BLOCK_BYTES and never a whole tensor, however large the checkpoint.

Where groups are not of neighbouring columns (GPTQ's act-order), `perm` lists the columns group by group:
    w[n, perm[k]] = scale[n, g] · q[n, k] + offset[n, g],   g = k // group,
so x · wᵀ is x[perm] times a matrix with groups in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

BLOCK_BYTES: Final = 1 << 24
"""Of numbers in a block: 4 Mi of float32, 16 Mi of quantized ones."""
BLOCK_ROWS: Final = 128
"""A block begins at a multiple of this, where it can: words along N and heads are then whole in it."""


@dataclass(frozen=True, slots=True)
class Dense:
    """An unquantized weight.

    Attributes:
        name: its name in the checkpoint, for messages.
        shape: (N, K), or (N,) for a norm or bias.
        dtype: how the checkpoint stores it: `f16`, `bf16` or `f32`.
        read_rows: rows begin … end − 1, at least one, as float32 [end − begin, K]; exact for all three.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["f16", "bf16", "f32"]
    read_rows: Callable[[int, int], Float]

    def blocks(self) -> list[tuple[int, int]]:
        """(begin, end) of the rows that are best read at a time, in order."""
        return _blocks(self.shape, np.dtype(np.float32).itemsize)

    def read(self, begin: int = 0, end: int | None = None) -> Float:
        """Rows begin … end − 1, or to the last, as float32 [rows, K].

        Raises:
            CheckpointError: the file is damaged, or a value is NaN or infinite.
        """
        return self.read_rows(begin, self.shape[0] if end is None else end)

    dequantize = read


@dataclass(frozen=True, slots=True)
class Groups:
    """The arrays of a group-wise quantized weight.

    Attributes:
        q: uint8 [N, K] with values 0…15 (4 bit), or int8 [N, K] (8 bit).
        scale: float32 [N, K / group]; the checkpoint's float16 scales, widened.
        offset: float32 [N, K / group], or None where the layout has none (offset 0).
        zero: [N, K / group] integer zero points, or None; never set together with offset. They may lie one
            beyond the range of q, as GPTQ's do.
    """

    q: NDArray[np.uint8] | NDArray[np.int8]
    scale: Float
    offset: Float | None = None
    zero: NDArray[np.uint8] | NDArray[np.int16] | None = None

    def offsets(self) -> Float:
        """The offset as float32 [N, K / group], whichever way it is stored."""
        if self.offset is not None:
            return self.offset
        if self.zero is not None:
            return -self.scale * self.zero
        return np.zeros_like(self.scale)

    def rows(self, begin: int, end: int) -> Groups:
        """Rows begin … end − 1 of every array; a view."""
        offset = None if self.offset is None else self.offset[begin:end]
        zero = None if self.zero is None else self.zero[begin:end]
        return Groups(self.q[begin:end], self.scale[begin:end], offset, zero)


@dataclass(frozen=True, slots=True)
class Grouped:
    """A group-wise quantized weight.

    Attributes:
        name: its name in the checkpoint, for messages.
        shape: (N, K).
        bits: 4 or 8.
        group: elements of K that share a scale; divides K.
        asymmetric: whether there are offsets or zero points.
        centred: whether every offset is known to be −8 · scale, the middle of 4 bits (GGUF's Q4_0): an
            executor that centres the numbers then needs no offsets.
        read_rows: the arrays of rows begin … end − 1, at least one.
        middle: of the range that 8-bit numbers use, where that is not about 0: 16 for GGUF's Q5_K and Q5_1.
            An executor that rounds activations should centre the numbers, or their rounding is amplified.
        perm: int32 [K], the columns in the order of `Groups.q`; None: as they are.
    """

    name: str
    shape: tuple[int, int]
    bits: Literal[4, 8]
    group: int
    asymmetric: bool
    read_rows: Callable[[int, int], Groups]
    centred: bool = False
    middle: int = 0
    perm: NDArray[np.int32] | None = field(default=None, compare=False)

    def blocks(self) -> list[tuple[int, int]]:
        """(begin, end) of the rows that are best read at a time, in order."""
        return _blocks(self.shape, 1)

    def read(self, begin: int = 0, end: int | None = None) -> Groups:
        """The arrays of rows begin … end − 1, or to the last.

        Raises:
            CheckpointError: the file is damaged, or a scale or offset is NaN or infinite.
        """
        return self.read_rows(begin, self.shape[0] if end is None else end)

    def dequantize(self, begin: int = 0, end: int | None = None) -> Float:
        """Rows as float32 [rows, K], by the formula at the top of this file; raises as `read` does."""
        groups = self.read(begin, end)
        n, k = groups.q.shape
        w = groups.q.reshape(n, k // self.group, self.group).astype(np.float32)
        if groups.zero is not None:
            w -= groups.zero[..., None]
            w *= groups.scale[..., None]
        else:
            w *= groups.scale[..., None]
            w += groups.offsets()[..., None]
        if self.perm is None:
            return w.reshape(n, k)
        in_order = np.empty((n, k), np.float32)
        in_order[:, self.perm] = w.reshape(n, k)
        return in_order


Weight = Dense | Grouped


def scaled(weight: Weight, factor: float) -> Weight:
    """factor · weight in the same layout: of a group-wise one, scales and offsets are multiplied."""
    if isinstance(weight, Dense):
        values = weight.read_rows
        return replace(
            weight, dtype="f32", read_rows=lambda begin, end: values(begin, end) * np.float32(factor)
        )
    groups = weight.read_rows

    def read_rows(begin: int, end: int) -> Groups:
        stored = groups(begin, end)
        offset = None if stored.offset is None else stored.offset * np.float32(factor)
        return replace(stored, scale=stored.scale * np.float32(factor), offset=offset)

    return replace(weight, read_rows=read_rows)


def rows_of(weight: Weight, first: int, count: int) -> Weight:
    """Rows first … first + count − 1 as a weight of their own."""
    shape = (count, *weight.shape[1:])
    if isinstance(weight, Dense):
        values = weight.read_rows
        return replace(weight, shape=shape, read_rows=lambda begin, end: values(first + begin, first + end))
    groups = weight.read_rows
    return replace(
        weight,
        shape=(count, weight.shape[1]),
        read_rows=lambda begin, end: groups(first + begin, first + end),
    )


def _blocks(shape: tuple[int, ...], itemsize: int) -> list[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // (itemsize * math.prod(shape[1:])))
    if rows > BLOCK_ROWS:
        rows -= rows % BLOCK_ROWS
    return [(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows)]

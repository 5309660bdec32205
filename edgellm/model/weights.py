"""The canonical form of a weight matrix: what every checkpoint reader gives and every emitter takes.

A weight is [N, K]: N out features, K in features, row-major. Group-wise quantized weights are
    w[n, k] = scale[n, g] · q[n, k] + offset[n, g],   g = k // group,
with the offset kept whole in float32 (or as an integer zero point, w = scale · (q − zero)), because its
rounding to float16 is not exact. Arrays are made when asked for, so that a checkpoint streams through.

Where groups are not of neighbouring columns (GPTQ's act-order), `perm` lists the columns group by group:
    w[n, perm[k]] = scale[n, g] · q[n, k] + offset[n, g],   g = k // group,
so x · wᵀ is x[perm] times a matrix with groups in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Dense:
    """An unquantized weight.

    Attributes:
        name: its name in the checkpoint, for messages.
        shape: (N, K), or (N,) for a norm or bias.
        dtype: how the checkpoint stores it: `f16`, `bf16` or `f32`.
        read: gives float32 [N, K]; exact for all three.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["f16", "bf16", "f32"]
    read: Callable[[], Float]

    def dequantize(self) -> Float:
        """The weight as float32 [N, K]."""
        return self.read()


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
        read: gives the arrays.
        middle: of the range that 8-bit numbers use, where that is not about 0: 16 for GGUF's Q5_K and Q5_1.
            An executor that rounds activations should centre the numbers, or their rounding is amplified.
        perm: int32 [K], the columns in the order of `Groups.q`; None: as they are.
    """

    name: str
    shape: tuple[int, int]
    bits: Literal[4, 8]
    group: int
    asymmetric: bool
    read: Callable[[], Groups]
    centred: bool = False
    middle: int = 0
    perm: NDArray[np.int32] | None = field(default=None, compare=False)

    def dequantize(self) -> Float:
        """The weight as float32 [N, K], by the formula at the top of this file."""
        groups = self.read()
        n, k = self.shape
        q = groups.q.reshape(n, k // self.group, self.group).astype(np.float32)
        scale = groups.scale[..., None]
        if groups.zero is not None:
            w = (q - groups.zero[..., None]) * scale
        else:
            w = q * scale + groups.offsets()[..., None]
        if self.perm is None:
            return w.reshape(n, k)
        in_order = np.empty((n, k), np.float32)
        in_order[:, self.perm] = w.reshape(n, k)
        return in_order


Weight = Dense | Grouped


def scaled(weight: Weight, factor: float) -> Weight:
    """factor · weight in the same layout: of a group-wise one, scales and offsets are multiplied."""
    if isinstance(weight, Dense):
        read = weight.read
        return replace(weight, dtype="f32", read=lambda: read() * np.float32(factor))

    def read_groups(groups: Callable[[], Groups] = weight.read) -> Groups:
        stored = groups()
        offset = None if stored.offset is None else stored.offset * np.float32(factor)
        return replace(stored, scale=stored.scale * np.float32(factor), offset=offset)

    return replace(weight, read=read_groups)

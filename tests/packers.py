"""Packed layouts written number by number from their descriptions: slow, and nothing like the readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from model_directories import Tensors
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Quantized:
    """A layer before it is packed.

    Attributes:
        q: [N, K], 0 … 2^bits − 1.
        zero: [N, groups].
        scale: float16 or float32 [N, groups].
        group_of: [K], the group of each column.
    """

    q: Ints
    zero: Ints
    scale: NDArray[Any]
    group_of: Ints

    def weight(self) -> NDArray[np.float32]:
        """s · (q − z) in float32."""
        scale = self.scale.astype(np.float32)[:, self.group_of]
        shifted = (self.q - self.zero[:, self.group_of]).astype(np.float32)
        product: NDArray[np.float32] = scale * shifted
        return product


def quantize(
    values: NDArray[np.float32],
    group: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    group_of: Ints | None = None,
) -> Quantized:
    """Round to the nearest of 2^bits equidistant values between each group's extremes."""
    n, k = values.shape
    if group_of is None:
        group_of = np.arange(k) // group
    top = 2**bits - 1
    zero, scale = (np.empty((n, k // group)) for _ in range(2))
    for g in range(k // group):
        part = values[:, group_of == g]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scale[:, g] = (high - low) / top
        zero[:, g] = 2 ** (bits - 1) if symmetric else np.round(-low / scale[:, g])
    halves = scale.astype(np.float16)
    q = np.round(values / halves.astype(float)[:, group_of] + zero[:, group_of]).clip(0, top)
    return Quantized(q.astype(np.int64), zero.astype(np.int64), halves, group_of)


def awq(layer: str, made: Quantized) -> Tensors:
    """AutoAWQ GEMM."""
    return {
        f"{layer}.qweight": _awq_words(made.q.T),
        f"{layer}.qzeros": _awq_words(made.zero.T),
        f"{layer}.scales": np.ascontiguousarray(made.scale.T),
    }


def gptq(layer: str, made: Quantized, *, bits: int = 4, stored_zero: int = -1) -> Tensors:
    """GPTQ; `stored_zero` is what is added to zero points: −1 in version 1, 0 in version 2."""
    return {
        f"{layer}.qweight": words_of(made.q.T, bits, axis=0),
        f"{layer}.qzeros": words_of(made.zero.T + stored_zero, bits, axis=1),
        f"{layer}.scales": np.ascontiguousarray(made.scale.T),
        f"{layer}.g_idx": made.group_of.astype(np.int32),
    }


def compressed(
    layer: str, made: Quantized, *, bits: int = 4, symmetric: bool = False, act_order: bool = False
) -> Tensors:
    """compressed-tensors pack-quantized; its numbers are signed, and stored with 2^(bits − 1) added."""
    tensors: Tensors = {
        f"{layer}.weight_packed": words_of(made.q, bits, axis=1),
        f"{layer}.weight_scale": made.scale,
        f"{layer}.weight_shape": np.array(made.q.shape, np.int64),
    }
    if not symmetric:
        tensors[f"{layer}.weight_zero_point"] = words_of(made.zero, bits, axis=0)
    if act_order:
        tensors[f"{layer}.weight_g_idx"] = made.group_of.astype(np.int32)
    return tensors


def words_of(numbers: Ints, bits: int, *, axis: int) -> NDArray[np.int32]:
    """Consecutive numbers along an axis, the first in the lowest bits; the last word is filled with zeros."""
    if axis == 0:
        return np.ascontiguousarray(words_of(numbers.T, bits, axis=1).T)
    in_word = 32 // bits
    packed = np.zeros((len(numbers), -(-numbers.shape[1] // in_word)), np.uint32)
    for row, line in enumerate(numbers.tolist()):
        for column, number in enumerate(line):
            packed[row, column // in_word] |= np.uint32(number << bits * (column % in_word))
    return packed.view(np.int32)


def _awq_words(numbers: Ints) -> NDArray[np.int32]:
    packed = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
    for row in range(packed.shape[0]):
        for word in range(packed.shape[1]):
            for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[row, word] |= np.uint32(int(numbers[row, 8 * word + column]) << 4 * nibble)
    return packed.view(np.int32)

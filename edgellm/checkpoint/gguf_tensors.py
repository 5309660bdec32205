"""The tensors of a GGUF file: how each type lies in memory, and where a tensor lies in the file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a GGUF tensor type lies in memory: blocks of `elements` along the fastest dimension."""

    name: str
    elements: int
    bytes: int


TENSOR_TYPES: Final[dict[int, TensorType]] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
"""The types that edgellm reads, by their number in the file."""

OTHER_TYPES: Final[dict[int, str]] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    **dict(
        enumerate(
            ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"),
            start=16,
        )
    ),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M"), start=24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""Types that exist and are refused, so that the message can name them."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: slowest dimension first, as numpy has it: (N, K) of a weight matrix.
        offset: of its first byte, from the start of the file.
        size: bytes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    size: int

    def rows(self, first: int, count: int) -> TensorInfo:
        """Some rows [count, K] of a matrix or of matrices one below the other, [E, N, K]; or of a vector."""
        each = self.size // (math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0])
        shape = (count, *self.shape[1:][-1:])
        return replace(self, shape=shape, offset=self.offset + first * each, size=count * each)

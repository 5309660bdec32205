"""Blocks of GGUF's quantized types from random bytes: valid, of a given size, and with every field in use.

The `gguf` package has no quantizer for the K types, and none is needed: any bytes are a block, if only the
float16 factors are finite.
"""

from __future__ import annotations

from typing import Final

import gguf
import numpy as np
from numpy.typing import NDArray

# type → (byte of d, byte of m or None, m's share of d that makes the values' mean 0, the values' standard
# deviation for d = 1). The 6-bit scales are uniform over 0…63, the 8-bit ones over −128…127.
_FACTORS: Final = {
    "Q4_0": (0, None, 0.0, 4.6),
    "Q4_1": (0, 2, -7.5, 4.6),
    "Q5_0": (0, None, 0.0, 9.2),
    "Q5_1": (0, 2, -15.5, 9.2),
    "Q8_0": (0, None, 0.0, 73.9),
    "Q4_K": (0, 2, 7.5, 250.0),
    "Q5_K": (0, 2, 15.5, 500.0),
    "Q6_K": (208, None, 0.0, 1365.0),
}
BLOCK_TYPES: Final = tuple(_FACTORS)


def random_blocks(kind: str, shape: tuple[int, int], deviation: float, seed: int) -> NDArray[np.uint8]:
    """A matrix of this type, uint8 [N, bytes per row], whose values have about this standard deviation."""
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    chance = np.random.RandomState(seed)
    blocks = chance.randint(0, 256, (shape[0], shape[1] // elements, size)).astype(np.uint8)
    d_at, m_at, share, unit = _FACTORS[kind]
    d = deviation / unit * chance.uniform(0.7, 1.3, blocks.shape[:2])
    for at, factor in ((d_at, d), (m_at, d * share)):
        if at is not None:
            blocks[..., at : at + 2] = factor.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)

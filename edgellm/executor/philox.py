"""Philox4x32-10, a counter-based random generator: any number of a stream at once, without state.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). Every executor draws the
uniform for token `index` of a request from the same block, so that a seed means the same token on each:
    key     = (low, high) 32 bits of the request's seed
    counter = (low, high) 32 bits of the token's index, 0, 0
    u       = (word0 >> 5, word1 >> 6) as a 53-bit fraction in [0, 1)
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Block = tuple[int, int, int, int]


def philox4x32(counter: Block, key: tuple[int, int]) -> Block:
    """Four random words for a counter of four words and a key of two; every word is unsigned, 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIER[0] * c0
        product1 = _MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """A float in [0, 1) with 53 random bits, a pure function of the 64-bit seed and the token's index."""
    word0, word1, _, _ = philox4x32((index & _MASK, index >> 32, 0, 0), (seed & _MASK, (seed >> 32) & _MASK))
    return ((word0 >> 5) * 67108864 + (word1 >> 6)) / 9007199254740992

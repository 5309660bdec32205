"""Philox against the known answers that its authors publish with Random123 (kat_vectors, philox4x32 10)."""

from __future__ import annotations

import pytest

from edgellm.executor.philox import Block, philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: Block, key: tuple[int, int], expected: Block) -> None:
    assert philox4x32(counter, key) == expected


def test_uniform_is_the_documented_fraction_of_the_documented_block() -> None:
    for seed, index in [(0, 0), (2**64 - 1, 7), (0x299F31D0A4093822, 2**33 + 5)]:
        block = philox4x32((index % 2**32, index // 2**32, 0, 0), (seed % 2**32, seed // 2**32))
        bits = ((block[0] << 32 | block[1]) >> 37 << 26) | (block[1] >> 6)
        assert uniform(seed, index) == bits / 2**53


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    """Pearson's chi-square over 20 bins, 19 degrees of freedom: 43.8 is exceeded once in a thousand."""
    for draws in (
        [uniform(seed, 0) for seed in range(4000)],
        [uniform(12345, index) for index in range(4000)],
    ):
        assert all(0.0 <= u < 1.0 for u in draws)
        counts = [sum(bin_ <= 20 * u < bin_ + 1 for u in draws) for bin_ in range(20)]
        assert sum((count - 200) ** 2 / 200 for count in counts) < 43.8

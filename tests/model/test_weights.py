"""Weights by blocks of rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgellm.model.weights import BLOCK_BYTES, BLOCK_ROWS, Dense, Float, Grouped, Groups


def unread(begin: int, end: int) -> Float:
    raise AssertionError("blocks() must not read")


def unread_groups(begin: int, end: int) -> Groups:
    raise AssertionError("blocks() must not read")


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 200_000)), st.tuples(st.integers(1, 200_000), st.integers(1, 20_000))
    )
)
def test_blocks_cover_every_row_once_and_are_small(shape: tuple[int, ...]) -> None:
    weights: list[tuple[Dense | Grouped, int]] = [(Dense("w", shape, "bf16", unread), 4)]
    if len(shape) == 2:
        weights.append((Grouped("w", (shape[0], shape[1]), 4, 1, False, unread_groups), 1))
    for weight, itemsize in weights:
        blocks = weight.blocks()
        assert [begin for begin, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
        assert blocks[-1][1] == shape[0]
        row = itemsize * math.prod(shape[1:])
        assert all(0 < end - begin <= max(1, BLOCK_BYTES // row) for begin, end in blocks)
        if row * BLOCK_ROWS <= BLOCK_BYTES:
            assert all(begin % BLOCK_ROWS == 0 for begin, _ in blocks)


def test_rows_of_a_weight_in_another_order_of_columns() -> None:
    chance = np.random.default_rng(2)
    groups = Groups(
        chance.integers(0, 16, (6, 32), np.uint8),
        chance.standard_normal((6, 2)).astype(np.float32),
        offset=chance.standard_normal((6, 2)).astype(np.float32),
    )
    weight = Grouped("w", (6, 32), 4, 16, True, groups.rows, perm=chance.permutation(32).astype(np.int32))
    whole = weight.dequantize()
    for begin, end in itertools.combinations(range(7), 2):
        np.testing.assert_array_equal(weight.dequantize(begin, end), whole[begin:end])
    np.testing.assert_array_equal(weight.dequantize(2), whole[2:])

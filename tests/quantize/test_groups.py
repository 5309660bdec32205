"""The quantizer's numbers, against rounding to nearest written out and against their own definition."""

from __future__ import annotations

from typing import Literal

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm.model.weights import Float, Grouped
from edgellm.quantize.groups import LARGEST, Quantized, quantize

Bits = Literal[4, 8]
EITHER = pytest.mark.parametrize("bits", [4, 8])


def _dequantized(made: Quantized, bits: Bits, group: int) -> Float:
    """By the canonical form's own formula."""
    return Grouped("w", made.groups.q.shape, bits, group, bits == 4, made.groups.rows).dequantize()


def _nearest(w: Float, bits: Bits, group: int) -> NDArray[np.float64]:
    """Rounding to nearest between the least and the largest number, group by group."""
    out = np.empty(w.shape)
    for row in range(w.shape[0]):
        for begin in range(0, w.shape[1], group):
            numbers = w[row, begin : begin + group]
            low, high = (0, 15) if bits == 4 else (-127, 127)
            width = numbers.max() - numbers.min() if bits == 4 else np.abs(numbers).max()
            scale = float(np.float16(width / np.float32(high)))
            offset = float(np.float16(numbers.min())) if bits == 4 else 0.0
            q = np.clip(np.rint((numbers - offset) / scale), low, high) if scale else np.zeros(group)
            out[row, begin : begin + group] = scale * q + offset
    return out


def _of_groups(squares: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = squares.reshape(-1, group).sum(axis=1)
    return sums


floats = st.one_of(
    st.just(0.0),
    st.floats(-2.0, 2.0, width=32),
    st.floats(-LARGEST, LARGEST, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
)
matrices = st.sampled_from([32, 64]).flatmap(
    lambda group: st.tuples(
        st.just(group),
        arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(2 * group)), elements=floats),
    )
)


@EITHER
@settings(deadline=None)
@given(case=matrices)
def test_whatever_the_numbers(bits: Bits, case: tuple[int, Float]) -> None:
    """q in range, float16 numbers, the error as said, and no group worse than rounding to nearest."""
    group, w = case
    made = quantize(w, bits=bits, group=group)
    q, scale, offset = made.groups.q, made.groups.scale, made.groups.offset
    assert q.dtype == (np.uint8 if bits == 4 else np.int8)
    assert q.min() >= (0 if bits == 4 else -127)
    assert q.max() <= (15 if bits == 4 else 127)
    assert (scale >= 0).all()
    assert np.isfinite(scale).all()
    assert (scale == scale.astype(np.float16)).all()
    assert made.groups.zero is None
    assert (offset is None) == (bits == 8)
    if offset is not None:
        assert np.isfinite(offset).all()
        assert (offset == offset.astype(np.float16)).all()

    exact = w.astype(np.float64)
    squares = (_dequantized(made, bits, group) - exact) ** 2
    assert made.error == pytest.approx(squares.sum(axis=1), rel=1e-3, abs=1e-9)
    assert made.energy == pytest.approx((exact**2).sum(axis=1), rel=1e-4, abs=1e-30)
    # Sums of squares in float32 tell errors apart to about one part in 10⁵.
    allowed = _of_groups((_nearest(w, bits, group) - exact) ** 2, group)
    largest = _of_groups(exact**2, group)
    assert (_of_groups(squares, group) <= allowed * 1.0001 + largest * 1e-10).all()


@EITHER
@settings(deadline=None)
@given(
    weights=arrays.arrays(np.float32, 64, elements=st.floats(0, 1e6, width=32)),
    seed=st.integers(0, 1000),
)
def test_no_group_is_worse_by_importance_either(bits: Bits, weights: Float, seed: int) -> None:
    w = np.random.default_rng(seed).standard_t(3, (3, 64)).astype(np.float32)
    made = quantize(w, bits=bits, group=32, importance=weights)
    squares = (_dequantized(made, bits, 32) - w.astype(np.float64)) ** 2
    plain = (_nearest(w, bits, 32) - w.astype(np.float64)) ** 2
    h = np.tile(weights.astype(np.float64), (3, 1))
    means = _of_groups(h, 32)
    h = np.where(np.repeat(means, 32).reshape(h.shape) > 0, h, 1.0)
    least = _of_groups(h * w.astype(np.float64) ** 2, 32) * 1e-10  # what float32 sums tell apart
    assert (_of_groups(h * squares, 32) <= _of_groups(h * plain, 32) * 1.001 + least).all()


@EITHER
@pytest.mark.parametrize("value", [0.0, 0.5, -3.25, 65504.0])
def test_groups_of_one_float16_number_are_exact(bits: Bits, value: float) -> None:
    made = quantize(np.full((2, 64), value, np.float32), bits=bits, group=32)
    error = np.abs(_dequantized(made, bits, 32) - np.float32(value)).max()
    # Eight bits have no offset: the number is 127 times a rounded scale.
    assert error <= (0 if bits == 4 or value == 0 else abs(value) * 2**-11)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_numbers_on_a_grid_of_sixteen_steps_are_found_again(group: int) -> None:
    chance = np.random.default_rng(group)
    q = chance.integers(0, 16, (8, 2 * group))
    q[:, ::group], q[:, 1::group] = 0, 15
    scale = chance.uniform(0.01, 0.02, (8, 2)).astype(np.float16).astype(np.float32)
    offset = -chance.integers(0, 16, (8, 2)) * scale  # float32: not all are float16 numbers
    w = (np.repeat(scale, group, axis=1) * q + np.repeat(offset, group, axis=1)).astype(np.float32)
    made = quantize(w, bits=4, group=group)
    assert (made.groups.q == q).all()
    assert np.abs(_dequantized(made, 4, group) - w).max() < 2**-11 * 15 * scale.max()


def test_the_search_takes_a_sixth_off_the_error_of_normal_numbers() -> None:
    w = np.random.default_rng(0).normal(0, 1, (64, 256)).astype(np.float32)
    made = quantize(w, bits=4, group=32)
    nearest = ((_nearest(w, 4, 32) - w) ** 2).sum()
    assert made.error.sum() < 0.86 * nearest


def test_columns_that_matter_are_closer() -> None:
    w = np.random.default_rng(0).normal(0, 1, (64, 256)).astype(np.float32)
    importance = np.ones(256, np.float32)
    importance[::8] = 100
    plain, weighted = (
        (_dequantized(quantize(w, bits=4, group=32, importance=h), 4, 32) - w) ** 2
        for h in (None, importance)
    )
    assert weighted[:, ::8].mean() < 0.5 * plain[:, ::8].mean()
    assert weighted[:, 1::8].mean() > plain[:, 1::8].mean()


@EITHER
def test_threads_and_tiles_change_nothing(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(1).normal(0, 1, (37, 128)).astype(np.float32)
    importance = np.arange(128, dtype=np.float32)
    once = quantize(w, bits=bits, group=32, importance=importance)
    monkeypatch.setattr("edgellm.quantize.groups._TILE", 128 * 5)
    again = quantize(w, bits=bits, group=32, importance=importance, threads=3)
    assert (once.groups.q == again.groups.q).all()
    assert (once.groups.scale == again.groups.scale).all()
    assert (once.error == again.error).all()


def test_a_group_that_does_not_divide_a_row_is_a_bug() -> None:
    with pytest.raises(ValueError, match="groups of 32 of 48 columns"):
        quantize(np.zeros((1, 48), np.float32), bits=4, group=32)

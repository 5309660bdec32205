"""A weight times a factor, in its own layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.model.weights import Dense, Grouped, Groups, scaled

RANDOM = np.random.default_rng(5)
Q = RANDOM.integers(0, 16, (4, 32), dtype=np.uint8)
SCALE = RANDOM.normal(size=(4, 2)).astype(np.float32)
OFFSET = RANDOM.normal(size=(4, 2)).astype(np.float32)
ZERO = RANDOM.integers(0, 16, (4, 2), dtype=np.uint8)

WEIGHTS = {
    "offset": Grouped("w", (4, 32), 4, 16, True, Groups(Q, SCALE, offset=OFFSET).rows),
    "zero": Grouped("w", (4, 32), 4, 16, True, Groups(Q, SCALE, zero=ZERO).rows),
    "symmetric": Grouped("w", (4, 32), 8, 16, False, Groups(Q.astype(np.int8), SCALE).rows),
}


@pytest.mark.parametrize("kind", ["offset", "zero", "symmetric"])
@given(factor=st.sampled_from([0.125, 0.25, 2.0**-4]))
def test_a_power_of_two_is_exact(kind: str, factor: float) -> None:
    weight = WEIGHTS[kind]
    np.testing.assert_array_equal(scaled(weight, factor).dequantize(), factor * weight.dequantize())


@pytest.mark.parametrize("kind", ["offset", "zero", "symmetric"])
def test_any_factor_is_close(kind: str) -> None:
    weight, factor = WEIGHTS[kind], 80**-0.5
    np.testing.assert_allclose(
        scaled(weight, factor).dequantize(), factor * weight.dequantize(), rtol=1e-5, atol=1e-6
    )


def test_a_dense_weight_is_multiplied_and_keeps_its_shape() -> None:
    values = RANDOM.normal(size=(4, 32)).astype(np.float32)
    weight = Dense("w", (4, 32), "f16", lambda begin, end: values[begin:end])
    half = scaled(weight, 0.5)
    np.testing.assert_array_equal(half.dequantize(), 0.5 * values)
    assert half.shape == weight.shape

"""What writers of the residual leave for the norm behind them, in numpy: see edgellm/kernels/norm.py."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROOM: Final = 16.0
"""A scale is 1 / (ROOM · rms) of the norm before."""
HALF_MAX: Final = 65504.0


def inverse_rms(x: Array, epsilon: float) -> Array:
    """float64 [rows] of x [rows, hidden]."""
    wide = x.astype(np.float64)
    found: Array = 1 / np.sqrt((wide * wide).mean(-1) + epsilon)
    return found


def squares(x: Array) -> Array:
    """Sums of squares of 16 neighbours, float32 [rows, hidden / 16]."""
    summed: Array = (x.astype(np.float64) ** 2).reshape(len(x), -1, 16).sum(-1).astype(np.float32)
    return summed


def scaled(x: Array, gain: Array, scales: Array) -> Array:
    """float16(x · gain · scale), saturated."""
    wide = x.astype(np.float64) * gain * scales.astype(np.float64)[:, None]
    found: Array = np.clip(wide, -HALF_MAX, HALF_MAX).astype(np.float16)
    return found


def wrong_ahead(got: dict[str, Array], x: Array, gain: Array, scales: Array) -> list[str]:
    """What is wrong with `scaled` and `squares` in `got`, left beside the residual x."""
    wrong = []
    want = scaled(x, gain, scales).astype(np.float64)
    # Rounded more than once, in another order: within a unit in the last place, and where float16 ends.
    if not (np.abs(got["scaled"] - want) <= np.abs(want) * 2**-10 + 2**-24).all():
        wrong.append("what is left for the norm behind differs")
    if not np.allclose(got["squares"], squares(x), rtol=1e-5):
        wrong.append("sums of squares differ")
    return wrong

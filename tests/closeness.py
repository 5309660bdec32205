"""How far logits are from what they should be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating]


def relative(got: Logits, expected: Logits) -> float:
    """Largest difference over the largest logit."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def largest_kl(got: Logits, expected: Logits) -> float:
    """Largest KL divergence of a position, in nats."""
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (expected, got))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).max())

"""The sizes that steps on a device come in: rows of a decode step, tokens of a prompt, a slot's history."""

from __future__ import annotations

from typing import Final

from edgellm.kernels.linear import BUCKETS
from edgellm.memory.plan import Shape

MOST_ROWS: Final = BUCKETS[-1]
"""Of a decode program; more rows are several."""
SMALLEST_PREFILL: Final = 16
HISTORY: Final = 8192
"""Distinct tokens of a slot that the device can penalise; in longer slots penalties are the host's. One
number for all engines, so that their kernels do not depend on how long a slot is."""
MOST_TOKENS: Final = 2048
"""Of a prefill program; longer pieces are several."""


def decode_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Numbers of rows that there are decode programs for."""
    enough = next((rows for rows in BUCKETS if rows >= max_batch_size), MOST_ROWS)
    return tuple(rows for rows in BUCKETS if rows <= enough)


def prefill_buckets(shape: Shape) -> tuple[int, ...]:
    """Numbers of tokens that there are prefill programs for: powers of two."""
    most = min(shape.max_num_tokens, shape.max_seq_len, MOST_TOKENS)
    buckets = [SMALLEST_PREFILL]
    while buckets[-1] < most:
        buckets.append(buckets[-1] * 2)
    return tuple(buckets)

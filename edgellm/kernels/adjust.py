"""What a request wants changed of its logits on the device: a slot's state, as `adjust.cuh` reads it.

The device adds what it generates to the history: the slot's token of before, when the next is to be chosen.
Where min_tokens holds back all that there is, the row has nothing left; the host's sampler would look at the
whole row again and let the end be chosen. No real vocabulary is that small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.sampling import SamplingParams

BIASES: Final = 1024
"""As many as a request can have."""

SUPPRESSED: Final = 64
"""Tokens that min_tokens holds back; a request with more is the host's."""

_MAX_BIAS: Final = 1e30
"""As the host's sampler has it."""


@dataclass(frozen=True, slots=True)
class AdjustmentsShape:
    """What the kernel is specialised on.

    Attributes:
        vocab: width of the logits.
        max_seq: tokens that a slot can hold, which bounds the distinct ones it can have seen.
    """

    vocab: int
    max_seq: int

    @property
    def seen(self) -> int:
        """Distinct tokens that a slot's history has room for."""
        return min(self.vocab, self.max_seq)

    @property
    def numbers(self) -> str:
        """Of the template."""
        return f"{self.vocab}, {BIASES}, {SUPPRESSED}, {self.seen}"

    @property
    def dtype(self) -> np.dtype[np.void]:
        """A slot's state."""
        seen = np.dtype([("id", "<i4"), ("count", "<i4")])
        return np.dtype(
            [
                *((name, "<f4") for name in ("repetition", "presence", "frequency")),
                ("min_tokens", "<u4"),
                *((name, "<i4") for name in ("biases", "suppressed", "seen")),
                ("counted", "<u4"),
                ("bias_ids", "<i4", BIASES),
                ("bias", "<f4", BIASES),
                ("suppressed_ids", "<i4", SUPPRESSED),
                ("history", seen, self.seen),
            ]
        )


def adjusts(params: SamplingParams) -> bool:
    """Whether a request changes its logits at all."""
    return bool(params.counts_tokens or params.logit_bias or (params.min_tokens and params.suppressed))


def can_adjust(params: SamplingParams) -> bool:
    """Whether the device has room for what a request changes."""
    return len(params.logit_bias) <= BIASES and (
        not params.min_tokens or len(params.suppressed) <= SUPPRESSED
    )


def adjustments_state(
    shape: AdjustmentsShape, params: SamplingParams, history: NDArray[np.int32]
) -> NDArray[Any]:
    """What a slot that is bound to a new request starts with: one of `shape.dtype`.

    Args:
        history: int32, its prompt's tokens.

    Raises:
        ValueError: there is no room: see `can_adjust`.
    """
    if not can_adjust(params):
        raise ValueError("more biases or suppressed tokens than the device has room for")
    state = np.zeros((), shape.dtype)
    state["repetition"], state["presence"] = params.repetition_penalty, params.presence_penalty
    state["frequency"] = params.frequency_penalty
    ids = np.fromiter(params.logit_bias.keys(), np.int32, len(params.logit_bias))
    bias = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))
    state["biases"] = len(ids)
    state["bias_ids"][: len(ids)] = ids
    state["bias"][: len(ids)] = bias.clip(-_MAX_BIAS, _MAX_BIAS)
    if params.min_tokens and params.suppressed:
        state["min_tokens"], state["suppressed"] = params.min_tokens, len(params.suppressed)
        state["suppressed_ids"][: len(params.suppressed)] = params.suppressed
    if params.counts_tokens:
        distinct = np.unique(history)[: shape.seen]
        state["seen"] = len(distinct)
        state["history"]["id"][: len(distinct)] = distinct
        state["history"]["count"][: len(distinct)] = 1
    return state

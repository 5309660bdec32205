"""Sampling on the device: a slot's state, a row's result, and the launch of `sample.cu`.

The choice is `executor.sampler.Sampler`'s: the same uniform, the same kept set, the inverse CDF in the order
of ids. Sums round differently, so that a token may differ where u is within a rounding error of a border.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.kernels.adjust import AdjustmentsShape, adjusts, can_adjust
from edgellm.sampling import SamplingParams

SAMPLING: Final = np.dtype(
    [
        ("top_p", "<f8"),
        ("min_p", "<f8"),
        ("inverse_temperature", "<f4"),
        ("top_k", "<i4"),
        ("seed_low", "<u4"),
        ("seed_high", "<u4"),
        ("index", "<u4"),
        ("flags", "<u4"),
        ("unused", "<u4", 2),
    ]
)
"""A slot's sampling state; `index` is that of its next token, which the device counts."""

GREEDY: Final = 1
LOGPROB: Final = 2
ON_HOST: Final = 4
ADJUSTED: Final = 8
"""In `flags`: the most likely token is taken; its log-probability is wanted; the host chooses; the logits are
changed first (see `adjust.py`)."""

SAMPLED: Final = np.dtype([("token", "<i4"), ("status", "<i4"), ("logprob", "<f4"), ("index", "<u4")])
"""A row's result: `token` is −1 where none was chosen, `logprob` NaN where it is not asked for, `index` says
which of the slot's tokens it is."""

NONE: Final = 0
CHOSEN: Final = 1
NOT_FINITE: Final = 2
FOR_HOST: Final = 3
NOTHING_LEFT: Final = 4
"""A result's status: nobody's row, or none was wanted; a token; the logits have a NaN or +inf, or are −inf
everywhere; the host has to choose; they are −inf everywhere because of what the request changed. Only with
CHOSEN does the slot's state change."""

_SOURCE: Final = "sample.cu"
_SEGMENT: Final = 128
_SUMMARY_BYTES: Final = 16
_COUNTERS: Final = 1024
_CHOOSERS: Final = 512
_MOST_TOP_K: Final = 2**31 - 1
_MAX_INVERSE_TEMPERATURE: Final = 1e30
"""As the host's sampler has it."""


def chooses_on_device(params: SamplingParams, *, adjusting: bool = False) -> bool:
    """Whether the device can do all that the request asks for.

    The host's are top_logprobs, log-probabilities of adjusted requests, which are those of the logits as they
    came, and masks, which come with a step.

    Args:
        adjusting: whether `sample` is given adjustments; without them whatever changes logits is the host's.
    """
    if params.logprobs and params.top_logprobs:
        return False
    if not adjusts(params):
        return True
    return adjusting and can_adjust(params) and not params.logprobs


def sampling_state(params: SamplingParams, *, adjusting: bool = False) -> NDArray[np.void]:
    """What a slot that is bound to a new request starts with: one `SAMPLING`, index 0.

    Args:
        adjusting: see `chooses_on_device`.
    """
    state = np.zeros((), SAMPLING)
    state["top_p"], state["min_p"] = params.top_p, params.min_p
    # Any number of the wire's: as many as the vocabulary has, or more, keep all of it.
    state["top_k"] = min(params.top_k, _MOST_TOP_K)
    if not params.greedy:
        state["inverse_temperature"] = min(1.0 / params.temperature, _MAX_INVERSE_TEMPERATURE)
    state["seed_low"], state["seed_high"] = params.seed & 0xFFFFFFFF, params.seed >> 32
    flags = (GREEDY * params.greedy) | (LOGPROB * params.logprobs)
    if not chooses_on_device(params, adjusting=adjusting):
        flags |= ON_HOST
    elif adjusts(params):
        flags |= ADJUSTED
    state["flags"] = flags
    return state


def sample_workspace(vocab: int, *, rows: int) -> int:
    """Bytes of workspace: counters, which are 0 before and after, then whatever."""
    return _COUNTERS * 4 + rows * _segments(vocab) * _SUMMARY_BYTES


def sample(
    shape: AdjustmentsShape,
    *,
    rows: int,
    device: Device,
    rows_at: At,
    sampling: At,
    adjustments: At | None,
    logits: At,
    last_token: At,
    results: At,
    workspace: At,
) -> list[Launch]:
    """Choose a token for each row that wants one; at most once in a graph.

    Args:
        rows: the bucket; `rows_at` is an array of as many `rows.ROW`, or one `rows.CHUNK`.
        sampling: an array of `SAMPLING`, one for each slot.
        adjustments: an array of `shape.dtype`, one for each slot, of which those with ADJUSTED are looked at;
            None: there are none.
        logits: float32 [rows, vocab], at a multiple of 16; changed where a slot's request wants it.
        last_token: int32, one for each slot; the chosen token is written there.
        results: an array of `SAMPLED`, one for each row.
        workspace: `sample_workspace` bytes, at a multiple of 16.

    Raises:
        ValueError: more rows than there are counters.
    """
    if rows > _COUNTERS:
        raise ValueError(f"{rows} rows are more than {_COUNTERS}")
    places = (
        rows_at,
        sampling,
        adjustments,
        logits,
        workspace,
        workspace + _COUNTERS * 4,
        last_token,
        results,
    )
    return [Launch(sample_kernel(shape), (_blocks(shape.vocab, rows, device), rows, 1), places)]


def sample_kernel(shape: AdjustmentsShape) -> Kernel:
    """The one that `sample` launches, on any device."""
    return Kernel(_SOURCE, f"sample<{shape.numbers}>", _CHOOSERS)


def _segments(vocab: int) -> int:
    return -(-vocab // _SEGMENT)


def _blocks(vocab: int, rows: int, device: Device) -> int:
    """Of a row: a warp for each segment, but no more blocks than run at a time."""
    return max(1, min(-(-_segments(vocab) // (_CHOOSERS // 32)), device.multiprocessors // rows))

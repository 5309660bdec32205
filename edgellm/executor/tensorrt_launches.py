"""The kernels around a TensorRT plan: its inputs are made before it, tokens chosen behind it."""

from __future__ import annotations

from typing import Final

from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.executor.sampling_launches import sampling_kernel
from edgellm.kernels.feed import Inputs, feed_chunk, feed_rows

_INPUTS: Final = Inputs(At("tokens"), At("positions"), At("past"), At("last"), At("lengths"))


def before_rows(count: int) -> list[Launch]:
    """Of the buffer `rows`, for a decode step."""
    return feed_rows(count, rows_at=At("rows"), last_token=At("last_token"), inputs=_INPUTS)


def before_chunk(tokens: int) -> list[Launch]:
    """Of the buffer `chunk`, for a piece of a prompt."""
    return feed_chunk(tokens, chunk=At("chunk"), inputs=_INPUTS)


def kernels_around(vocab: int) -> tuple[Kernel, ...]:
    """All of them; the number of rows is in the launches alone."""
    feeding = [launch.kernel for launch in (*before_rows(1), *before_chunk(1))]
    return (*dict.fromkeys(feeding), sampling_kernel(vocab))

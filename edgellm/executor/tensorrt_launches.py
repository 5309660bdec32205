"""The kernels around a TensorRT plan: its inputs made before it, tokens chosen behind it."""

from __future__ import annotations

from typing import Final

from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.executor.buckets import HISTORY
from edgellm.kernels.adjust import AdjustmentsShape, adjust
from edgellm.kernels.feed import Inputs, feed_chunk, feed_rows
from edgellm.kernels.sample import sample

_INPUTS: Final = Inputs(At("tokens"), At("positions"), At("past"), At("last"), At("lengths"))


def before_rows(count: int) -> list[Launch]:
    """Of the buffer `rows`, for a decode step."""
    return feed_rows(count, rows_at=At("rows"), last_token=At("last_token"), inputs=_INPUTS)


def before_chunk(tokens: int) -> list[Launch]:
    """Of the buffer `chunk`, for a piece of a prompt."""
    return feed_chunk(tokens, chunk=At("chunk"), inputs=_INPUTS)


def behind(vocab: int, rows: int, rows_at: At) -> list[Launch]:
    """From `logits` to `results` and `last_token`, for the rows that want a token."""
    return [
        *adjust(
            AdjustmentsShape(vocab, HISTORY),
            rows=rows,
            rows_at=rows_at,
            sampling=At("sampling"),
            adjustments=At("adjustments"),
            last_token=At("last_token"),
            logits=At("logits"),
        ),
        *sample(
            vocab,
            rows=rows,
            rows_at=rows_at,
            sampling=At("sampling"),
            logits=At("logits"),
            last_token=At("last_token"),
            results=At("results"),
            workspace=At("sample_workspace"),
        ),
    ]


def kernels_around(vocab: int) -> tuple[Kernel, ...]:
    """All of them; the number of rows is in the launches alone."""
    launches = [*before_rows(1), *before_chunk(1), *behind(vocab, 1, At("rows"))]
    return tuple(dict.fromkeys(launch.kernel for launch in launches))

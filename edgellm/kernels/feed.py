"""What goes into a TensorRT plan, made on the device: launches of `feed.cu`.

A sampled token feeds the next step without the host knowing it. The inputs are those of `model/trt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.kernels.rows import CHUNK

_SOURCE: Final = "feed.cu"
_THREADS: Final = 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where a plan's inputs lie, all int32.

    Attributes:
        tokens, positions: [B, T].
        past, last, lengths: [B]; lengths are past + T.
    """

    tokens: At
    positions: At
    past: At
    last: At
    lengths: At


def feed_rows(count: int, *, rows_at: At, last_token: At, inputs: Inputs) -> list[Launch]:
    """One token for each of `count` rows: `rows_at` is an array of as many `rows.ROW`, none nobody's."""
    into = (inputs.tokens, inputs.positions, inputs.past, inputs.last, inputs.lengths)
    kernel = Kernel(_SOURCE, f"feed_rows<{_THREADS}>", _THREADS)
    return [Launch(kernel, (_blocks(count), 1, 1), (rows_at, last_token, count, *into), early=False)]


def feed_chunk(tokens: int, *, chunk: At, inputs: Inputs) -> list[Launch]:
    """A piece of exactly `tokens` tokens: `chunk` is a `rows.CHUNK`, its ids behind it."""
    into = (inputs.tokens, inputs.positions, inputs.past, inputs.last, inputs.lengths)
    kernel = Kernel(_SOURCE, f"feed_chunk<{_THREADS}>", _THREADS)
    return [Launch(kernel, (_blocks(tokens), 1, 1), (chunk, chunk + CHUNK.itemsize, *into), early=False)]


def _blocks(threads: int) -> int:
    return -(-threads // _THREADS)

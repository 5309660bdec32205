"""What the host hands over for a step, and gets back: cut out of page-locked memory once, used in turns.

A step becomes decode launches of up to 16 rows each and prefill launches of one piece of a prompt each. All
of its uploads have places of their own: nothing is overwritten that the device may not have read yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.executor.base import Row
from edgellm.executor.buckets import MOST_ROWS
from edgellm.executor.cuda_memory import Pinned, pinned_size
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.kernels.sample import SAMPLED
from edgellm.memory.plan import Shape

NOBODY = -1
"""A row's slot where a bucket has more rows than there are."""
SAMPLED_LAST = -1
"""A row's token: the one that the device sampled last for the slot."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a prompt that goes in one launch: tokens begin … end − 1 of a row's."""

    row: Row
    begin: int
    end: int
    last: bool


class StepBuffers:
    """One step's places in page-locked memory.

    Attributes:
        rows: ROW [groups, MOST_ROWS], for decode launches.
        pieces: bytes [pieces, header and ids], for prefill launches; see `piece`.
        results: SAMPLED [max_batch_size], rows of one token first, then the others.
        logits: float32 [max_batch_size, vocab], likewise, of those that the host samples.
    """

    def __init__(self, pinned: Pinned, shape: Shape, vocab: int, longest: int) -> None:
        self.rows: NDArray[Any] = pinned.take((groups_of(shape), MOST_ROWS), ROW)
        self._pieces: NDArray[np.uint8] = pinned.take(_pieces_shape(shape, longest), np.uint8)
        self.results: NDArray[Any] = pinned.take((shape.max_batch_size,), SAMPLED)
        self.logits: NDArray[np.float32] = pinned.take((shape.max_batch_size, vocab), np.float32)

    @staticmethod
    def size(shape: Shape, vocab: int, longest: int) -> int:
        """Bytes that one takes."""
        return (
            pinned_size((groups_of(shape), MOST_ROWS), ROW)
            + pinned_size(_pieces_shape(shape, longest), np.uint8)
            + pinned_size((shape.max_batch_size,), SAMPLED)
            + pinned_size((shape.max_batch_size, vocab), np.float32)
        )

    def piece(self, number: int, piece: Piece, flags: int) -> NDArray[np.uint8]:
        """Write a piece's CHUNK and ids; gives the bytes to upload."""
        assert isinstance(piece.row.tokens, np.ndarray)
        count = piece.end - piece.begin
        raw = self._pieces[number, : CHUNK.itemsize + 4 * count]
        raw[: CHUNK.itemsize].view(CHUNK)[0] = (piece.row.slot, piece.row.past + piece.begin, count, flags)
        raw[CHUNK.itemsize :].view(np.int32)[:] = piece.row.tokens[piece.begin : piece.end]
        return raw


def pieces_of(rows: Sequence[Row], longest: int) -> Iterator[Piece]:
    """The pieces of all rows of more than one token, none longer than `longest`."""
    for row in rows:
        count = len(row.tokens)
        for begin in range(0, count, longest):
            end = min(begin + longest, count)
            yield Piece(row, begin, end, last=end == count)


def groups_of(shape: Shape) -> int:
    """Decode launches that a step can have."""
    return -(-shape.max_batch_size // MOST_ROWS)


def _pieces_shape(shape: Shape, longest: int) -> tuple[int, int]:
    # Every slot can have a short last piece beside the full ones; half the tokens at least are in pairs.
    most = min(shape.max_batch_size, max(1, shape.max_num_tokens // 2)) + shape.max_num_tokens // longest
    return most, CHUNK.itemsize + 4 * min(longest, shape.max_num_tokens)

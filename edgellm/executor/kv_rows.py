"""Executors whose library takes a batch as contiguous rows: which slot lies in which row, and moving them.

Slots that decode together are brought beside each other. Moving swaps two rows, so no slot ever loses what it
holds, running or not: a freed slot's tokens stay usable as a prefix.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray


class RowMap(abc.ABC):
    """The map between slots and rows; a subclass has the memory.

    Args:
        rows: slots, and rows for them.
    """

    def __init__(self, rows: int) -> None:
        self._row_of = list(range(rows))
        self._slot_at = list(range(rows))
        self._held = [0] * rows

    def row(self, slot: int) -> int:
        """The row in which the slot lies now."""
        return self._row_of[slot]

    def held(self, slot: int) -> int:
        """How many tokens from the slot's start are valid."""
        return self._held[slot]

    def set_held(self, slot: int, length: int) -> None:
        """Say that the slot's first `length` tokens are valid, and nothing after them."""
        self._held[slot] = length

    def gather(self, slots: Sequence[int], *, first: int | None = None) -> int:
        """Bring the slots into contiguous rows, in any order, and give the first; moves little.

        Args:
            first: the row to begin with; None: whichever is best.
        """
        members = set(slots)
        count, rows = len(slots), len(self._slot_at)
        if first is None:
            first = min(range(rows - count + 1), key=lambda at: (self._cost(members, at, at + count), at))
        outside = [slot for slot in slots if not first <= self._row_of[slot] < first + count]
        strangers = [slot for slot in self._slot_at[first : first + count] if slot not in members]
        for slot, stranger in zip(outside, strangers, strict=True):
            self._swap(slot, stranger)
        return first

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, which then holds these alone."""
        assert 0 <= length <= self._held[source], (
            f"slot {source} holds {self._held[source]} tokens, not {length}"
        )
        if source != target:
            self._copy(self._row_of[source], self._row_of[target], length)
        self._held[target] = length

    @abc.abstractmethod
    def _copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""

    @abc.abstractmethod
    def _exchange(self, a: int, b: int, n: int, m: int) -> None:
        """Let the first n tokens of row a and the first m of row b change places."""

    def _cost(self, members: set[int], first: int, end: int) -> int:
        """Tokens that would move if the members were brought into rows first … end − 1."""
        coming = sum(self._held[slot] for slot in members if not first <= self._row_of[slot] < end)
        going = sum(self._held[slot] for slot in self._slot_at[first:end] if slot not in members)
        return coming + going

    def _swap(self, one: int, other: int) -> None:
        a, b = self._row_of[one], self._row_of[other]
        self._exchange(a, b, self._held[one], self._held[other])
        self._row_of[one], self._row_of[other] = b, a
        self._slot_at[a], self._slot_at[b] = other, one


class KvRows(RowMap):
    """The CPU executor's KV memory of `rows` slots.

    Attributes:
        tensors: [2 · layers, rows, kv_heads, max_seq, head_size]: key and value of layer i at 2i and 2i + 1.
    """

    def __init__(
        self, *, layers: int, rows: int, kv_heads: int, max_seq_len: int, head_size: int, dtype: DTypeLike
    ) -> None:
        super().__init__(rows)
        shape = (2 * layers, rows, kv_heads, max_seq_len, head_size)
        self.tensors: NDArray[np.generic] = np.empty(shape, dtype)
        # Written, not only reserved, the spare row too: every page is there from now on.
        self.tensors.fill(0)
        self._spare = np.full(shape[2:], 0, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and the spare one that swapping uses."""
        return self.tensors.nbytes + self._spare.nbytes

    def _copy(self, source: int, target: int, length: int) -> None:
        self.tensors[:, target, :, :length] = self.tensors[:, source, :, :length]

    def _exchange(self, a: int, b: int, n: int, m: int) -> None:
        for tensor in self.tensors:
            if m:
                self._spare[:, :m] = tensor[b, :, :m]
            tensor[b, :, :n] = tensor[a, :, :n]
            if m:
                tensor[a, :, :m] = self._spare[:, :m]

"""Moving rows about never changes what a slot holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm.executor.kv_rows import KvRows

SLOTS, LENGTH = 5, 6


def _rows() -> KvRows:
    return KvRows(layers=2, rows=SLOTS, kv_heads=3, max_seq_len=LENGTH, head_size=4, dtype=np.float32)


def _slot(rows: KvRows, slot: int) -> NDArray[np.generic]:
    """What the slot holds: [2 · layers, kv_heads, held, head_size]."""
    held: NDArray[np.generic] = rows.tensors[:, rows.row(slot), :, : rows.held(slot)].copy()
    return held


Fill = st.tuples(st.just("fill"), st.integers(0, SLOTS - 1), st.integers(0, LENGTH))
Gather = st.tuples(st.just("gather"), st.sets(st.integers(0, SLOTS - 1), min_size=1), st.just(0))
Copy = st.tuples(
    st.just("copy"), st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)), st.floats(0, 1)
)


@given(st.lists(st.one_of(Fill, Gather, Copy), max_size=30))
def test_slots_keep_what_they_hold(operations: list[tuple[str, object, object]]) -> None:
    rows = _rows()
    model = {slot: _slot(rows, slot) for slot in range(SLOTS)}
    for number, (kind, subject, amount) in enumerate(operations):
        if kind == "fill":
            assert isinstance(subject, int) and isinstance(amount, int)
            values = np.random.default_rng(number).standard_normal((4, 3, amount, 4)).astype(np.float32)
            rows.tensors[:, rows.row(subject), :, :amount] = values
            rows.set_held(subject, amount)
            model[subject] = values
        elif kind == "gather":
            assert isinstance(subject, set)
            first = rows.gather(sorted(subject))
            assert {rows.row(slot) for slot in subject} == set(range(first, first + len(subject)))
        else:
            assert isinstance(subject, tuple) and isinstance(amount, float)
            source, target = subject
            length = int(amount * rows.held(source))
            rows.copy_prefix(source, target, length)
            model[target] = model[source][:, :, :length]
        assert sorted(rows.row(slot) for slot in range(SLOTS)) == list(range(SLOTS))
        for slot in range(SLOTS):
            np.testing.assert_array_equal(_slot(rows, slot), model[slot])


def test_what_lies_together_is_not_moved() -> None:
    rows = _rows()
    for slot in range(SLOTS):
        rows.set_held(slot, LENGTH)
    assert rows.gather([3, 2, 4]) == 2
    assert [rows.row(slot) for slot in range(SLOTS)] == list(range(SLOTS))


def test_the_cheaper_neighbour_moves() -> None:
    rows = _rows()
    rows.set_held(0, 6)
    rows.set_held(4, 1)
    first = rows.gather([0, 4])
    assert rows.row(0) == 0 and rows.row(4) == 1 and first == 0


def test_more_than_a_slot_holds_is_a_bug() -> None:
    rows = _rows()
    rows.set_held(1, 2)
    with pytest.raises(AssertionError, match="holds 2 tokens, not 3"):
        rows.copy_prefix(1, 0, 3)

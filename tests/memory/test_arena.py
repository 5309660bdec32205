"""The arena: nothing that lives at the same time overlaps, and nothing is wasted that need not be."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.memory.arena import ALIGNMENT, Buffer, aligned, place


@st.composite
def buffers(draw: st.DrawFn) -> list[Buffer]:
    sizes = draw(st.lists(st.integers(0, 5000), max_size=20))
    made = []
    for index, size in enumerate(sizes):
        first = draw(st.integers(0, 12))
        made.append(Buffer(f"b{index}", size, first, first + draw(st.integers(0, 6))))
    return made


@given(buffers())
def test_what_lives_together_lies_apart(made: list[Buffer]) -> None:
    placement = place(made)
    assert set(placement.offsets) == {each.name for each in made}
    for each in made:
        begin = placement.offsets[each.name]
        assert begin % ALIGNMENT == 0
        assert 0 <= begin <= begin + each.bytes <= placement.bytes
    for one, other in combinations(made, 2):
        if set(range(one.first, one.last + 1)) & set(range(other.first, other.last + 1)):
            begin, other_begin = placement.offsets[one.name], placement.offsets[other.name]
            assert begin + one.bytes <= other_begin or other_begin + other.bytes <= begin


@given(buffers())
def test_never_more_than_side_by_side_nor_less_than_the_fullest_moment(made: list[Buffer]) -> None:
    size = place(made).bytes
    assert size <= sum(aligned(each.bytes) for each in made)
    fullest = max(
        (sum(aligned(b.bytes) for b in made if b.first <= time <= b.last) for time in range(20)), default=0
    )
    assert size >= fullest


def test_a_chain_takes_as_much_as_its_widest_link() -> None:
    chain = [Buffer(f"b{n}", 1000 * n, first=n, last=n + 1) for n in range(1, 9)]
    assert place(chain).bytes == aligned(8000) + aligned(7000)


def test_two_of_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two buffers x"):
        place([Buffer("x", 1), Buffer("x", 2)])

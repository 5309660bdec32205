"""Which slot a prompt gets, and what it finds there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm.scheduler.slots import WORTH_COPYING, WORTH_WAITING, Choice, Slot, Slots

MAX_SEQ_LEN = 512


def ids(*runs: tuple[int, int]) -> NDArray[np.int32]:
    """Token ids from (first id, how many) runs."""
    return np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count in runs])


def put(slots: Slots, index: int, tokens: NDArray[np.int32], *, running: bool = False) -> None:
    """Leave `tokens` in a slot, as a request that has gone through it does."""
    slots.take(Choice(slots[index], 0, None), tokens)
    slots[index].computed = slots[index].resident = len(tokens)
    if not running:
        slots.release(slots[index])


def choose(slots: Slots, prompt: NDArray[np.int32]) -> Choice:
    choice = slots.choose(prompt, slots.free(0))
    assert choice is not None
    return choice


@given(
    st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=12), st.data()
)
def test_shared_is_the_common_prefix(held: list[int], prompt: list[int], data: st.DataObject) -> None:
    limit = data.draw(st.integers(0, len(held)))
    slot = Slot(0, 16)
    slot.tokens[: len(held)] = held
    expected = 0
    for mine, other in zip(held[:limit], prompt[:-1], strict=False):
        if mine != other:
            break
        expected += 1
    assert slot.shared(np.array(prompt, np.int32), limit) == expected


def test_retained_needs_both_the_kv_and_the_ids() -> None:
    slot = Slot(0, 8)
    slot.known, slot.resident = 3, 5
    assert slot.retained == 3
    slot.known, slot.resident = 5, 3
    assert slot.retained == 3


def test_the_next_turn_goes_where_the_conversation_is() -> None:
    slots = Slots(3, MAX_SEQ_LEN)
    put(slots, 1, ids((0, 100)))
    put(slots, 2, ids((0, 50), (1000, 50)))
    assert choose(slots, ids((0, 100), (500, 20))) == Choice(slots[1], 100, None)


def test_a_fresh_slot_comes_before_a_used_one_and_then_the_longest_unused() -> None:
    slots = Slots(3, MAX_SEQ_LEN)
    put(slots, 0, ids((0, 10)))
    put(slots, 2, ids((100, 10)))
    assert choose(slots, ids((900, 5))).slot is slots[1]
    put(slots, 1, ids((200, 10)))
    assert choose(slots, ids((900, 5))) == Choice(slots[0], 0, None)
    put(slots, 0, ids((300, 10)))
    assert choose(slots, ids((900, 5))) == Choice(slots[2], 0, None)


def test_a_running_slot_gives_a_copy_when_no_free_one_has_as_much() -> None:
    slots = Slots(3, MAX_SEQ_LEN)
    put(slots, 0, ids((0, 60), (700, 40)))
    put(slots, 1, ids((0, 80), (800, 10)), running=True)
    choice = choose(slots, ids((0, 80), (900, 5)))
    assert choice == Choice(slots[2], 80, slots[1])
    # A copy must bring more than its call costs: not so for a few tokens.
    slots = Slots(2, MAX_SEQ_LEN)
    put(slots, 0, ids((0, 80 - WORTH_COPYING + 1)))
    put(slots, 1, ids((0, 80)), running=True)
    assert choose(slots, ids((0, 80), (900, 5))) == Choice(slots[0], 80 - WORTH_COPYING + 1, None)


def test_a_system_prompt_is_copied_rather_than_a_conversation_overwritten() -> None:
    slots = Slots(2, MAX_SEQ_LEN)
    put(slots, 0, ids((2000, 30)))
    put(slots, 1, ids((0, 40), (500, 200)))
    assert choose(slots, ids((0, 40), (900, 10))) == Choice(slots[0], 40, slots[1])
    slots[0].taken = True  # nothing else is free now
    assert choose(slots, ids((0, 40), (900, 10))) == Choice(slots[1], 40, None)


def test_the_last_token_of_the_prompt_is_never_reused() -> None:
    slots = Slots(1, MAX_SEQ_LEN)
    put(slots, 0, ids((0, 50)))
    assert choose(slots, ids((0, 50))).reused == 49
    assert choose(slots, ids((0, 1))).reused == 0


@pytest.mark.parametrize("coming", [WORTH_WAITING - 1, WORTH_WAITING])
def test_a_prefix_that_is_being_computed_is_waited_for_if_it_is_long(coming: int) -> None:
    slots = Slots(2, MAX_SEQ_LEN)
    prompt = ids((0, 200))
    slots.take(Choice(slots[0], 0, None), prompt)
    slots[0].computed = coming
    choice = slots.choose(prompt, slots.free(0))
    if coming < WORTH_WAITING:
        assert choice == Choice(slots[1], 0, None)
    else:
        assert choice is None
        slots[0].resident = coming
        assert choose(slots, prompt) == Choice(slots[1], coming, slots[0])


def test_a_slot_with_a_row_in_an_open_step_is_not_free() -> None:
    slots = Slots(2, MAX_SEQ_LEN)
    put(slots, 0, ids((0, 10)))
    slots[0].last_step = 7
    assert slots.free(6) == [slots[1]]
    assert slots.free(7) == [slots[0], slots[1]]

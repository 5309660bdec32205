"""The token budget of a step of bounded time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgellm.scheduler.pace import FIRST_GUESS, TELLING, Pace


def test_it_starts_with_a_guess_within_the_limit() -> None:
    assert Pace(0.2, 256).budget() == FIRST_GUESS
    assert Pace(0.2, 8).budget() == 8


@given(st.floats(1e-5, 0.1), st.floats(0.01, 1.0), st.integers(1, 4096))
def test_it_settles_on_what_fits(cost: float, bound: float, limit: int) -> None:
    pace = Pace(bound, limit)
    for _ in range(30):
        pace.observe(100, 100 * cost)
    assert pace.budget() <= limit
    assert pace.budget() * cost <= bound * 1.001
    if pace.budget() < limit:
        assert (pace.budget() + 1) * cost >= bound * 0.999


def test_short_steps_say_nothing() -> None:
    pace = Pace(0.2, 256)
    pace.observe(TELLING - 1, 10.0)
    pace.observe(100, 0.0)
    assert pace.budget() == FIRST_GUESS

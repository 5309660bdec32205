"""Sizes as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.memory.sizes import UNITS, format_size, parse_size


@given(st.integers(0, 1 << 60))
def test_what_is_formatted_parses_to_the_same(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 1 << 60), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_units(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * UNITS[unit]
    assert parse_size(f" {number}{space}{unit.upper()} ") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("480MiB", 503_316_480),
        ("4GiB", 4_294_967_296),
        ("1.5 GiB", 1_610_612_736),
        ("4GB", 4_000_000_000),
        ("0.1kB", 100),
        ("0B", 0),
    ],
)
def test_known_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "4", "GiB", "-1GiB", "4 GiB x", "4PiB", "1e3MiB", "four MiB", "1..5GiB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_the_shortest_exact_form() -> None:
    assert [format_size(size) for size in (0, 1000, 1 << 10, 3 << 20, 1536 << 20, 2 << 30)] == [
        "0B",
        "1000B",
        "1KiB",
        "3MiB",
        "1536MiB",
        "2GiB",
    ]

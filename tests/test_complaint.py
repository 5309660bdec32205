"""Complaints are those that msgspec makes of real values, about the real types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest

from edgellm.complaint import Complaint, complaint_of


class Leaf(msgspec.Struct, forbid_unknown_fields=True):
    colour: Literal["green", "red"] | None = None
    weight: Annotated[float, msgspec.Meta(gt=0, le=2.5)] = 1.0
    needed: int = 0


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    leaves: Annotated[list[Leaf], msgspec.Meta(min_length=1)]
    names: dict[str, Leaf] = {}
    weights: dict[int, float] = {}
    label: Annotated[str, msgspec.Meta(max_length=3)] | None = None
    either: str | list[int] = ""
    on: bool = False


@pytest.mark.parametrize(
    ("value", "path", "what"),
    [
        (3, "", "must be a map, not an integer"),
        ({}, "leaves", "is missing"),
        ({"leaves": []}, "leaves", "must be an array of at least 1 items"),
        ({"leaves": "x"}, "leaves", "must be an array, not a string"),
        ({"leaves": [{}, {"colour": "blue"}]}, "leaves[1].colour", "'blue' is not one of green, red"),
        ({"leaves": [{"weight": 0}]}, "leaves[0].weight", "must be a number, more than 0"),
        ({"leaves": [{"weight": 3}]}, "leaves[0].weight", "must be a number, at most 2.5"),
        ({"leaves": [{"needed": 1.5}]}, "leaves[0].needed", "must be an integer, not a float"),
        ({"leaves": [{}], "label": "long"}, "label", "must be a string of at most 3 characters"),
        ({"leaves": [{}], "label": 3}, "label", "must be a string, not an integer"),
        ({"leaves": [{}], "either": 3}, "either", "must be a string or an array, not an integer"),
        ({"leaves": [{}], "on": "x"}, "on", "must be true or false, not a string"),
        (
            {"leaves": [{}], "names": {"a": {"colour": "b"}}},
            "names[...].colour",
            "'b' is not one of green, red",
        ),
        ({"leaves": [{}], "weights": {"x": 1}}, "weights", "a key must be an integer, not a string"),
        ({"leaves": [{"color": "red"}]}, "leaves[0].color", "is not known"),
    ],
)
def test_what_is_wrong_and_where(value: Any, path: str, what: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert(value, Tree)
    complaint = complaint_of(str(raised.value), Tree)
    assert (complaint.path, complaint.what) == (path, what)


def test_the_field_that_was_meant() -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.convert({"leaves": [{"color": "red"}]}, Tree)
    assert complaint_of(str(raised.value), Tree).near == "colour"


def test_a_sentence_of_ones_own_stays_as_it_is() -> None:
    assert complaint_of("a must be less than b - at `$.x`", Tree) == Complaint(
        "x", "a must be less than b", expected="a must be less than b"
    )

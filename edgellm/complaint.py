"""msgspec's complaints in plain words: what was expected where, which values there are, which field is near.

msgspec's sentence is `WHAT - at `$.path``, with the types' names in backquotes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Final

from msgspec import inspect

_SENTENCE: Final = re.compile(
    r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$\.?(?P<path>[^`]*)`)?$", re.DOTALL
)
_UNKNOWN: Final = re.compile(r"unknown field `(?P<field>[^`]*)`")
_MISSING: Final = re.compile(r"missing required field `(?P<field>[^`]*)`")
_EXPECTED: Final = re.compile(
    r"Expected `(?P<kinds>[^`]*)`"
    r"(?:, got `(?P<got>[^`]*)`| (?P<length>of length )?(?P<sign>[<>]=?) (?P<bound>\S+))"
)
_ENUM: Final = re.compile(r"Invalid enum value (?P<value>.*)", re.DOTALL)

_KINDS: Final = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "a map",
    "null": "nil",
    "bytes": "binary",
}
_FOUND: Final = {**_KINDS, "float": "a float", "bool": "a boolean"}
_UNITS: Final = {"str": "characters", "array": "items", "object": "entries"}
_SIGNS: Final = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}


@dataclass(frozen=True, slots=True)
class Complaint:
    """A value that does not fit.

    Attributes:
        path: where it is, as in `messages[0].role`; empty: the whole.
        what: what is wrong and what would work, to follow the path and a colon.
        kind: `value`, `unknown` (there is no such field) or `missing`.
        near: for `unknown`, the field that may have been meant.
        expected: `what` without what was found instead, for sources in which everything is text.
    """

    path: str
    what: str
    kind: str = "value"
    near: str | None = None
    expected: str = ""


def complaint_of(error: str, model: Any) -> Complaint:
    """What msgspec means.

    Args:
        error: the text of its ValidationError.
        model: the type that was validated against; of a tagged union, the member at hand, if it is known.
    """
    match = _SENTENCE.match(error)
    assert match is not None
    what, path = match["what"], match["path"] or ""
    if found := _UNKNOWN.search(what):
        names = _field_names(_at(model, path))
        near = difflib.get_close_matches(found["field"], names, n=1, cutoff=0.5)
        return Complaint(_join(path, found["field"]), "is not known", "unknown", near[0] if near else None)
    if found := _MISSING.search(what):
        return Complaint(_join(path, found["field"]), "is missing", "missing")
    whose = "a key " if match["key"] else ""
    if found := _EXPECTED.fullmatch(what):
        expected = whose + _expectation(found)
        instead = f", not {_FOUND.get(found['got'], found['got'])}" if found["got"] else ""
        return Complaint(path, expected + instead, expected=expected)
    if found := _ENUM.fullmatch(what):
        what = f"{found['value']} is not one of {', '.join(_values(_at(model, path)))}"
    return Complaint(path, what, expected=what)


def _expectation(found: re.Match[str]) -> str:
    kinds = [kind for kind in found["kinds"].split(" | ") if kind != "null"]
    text = "must be " + " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    if not found["sign"]:
        return text
    bound = found["bound"].removesuffix(".0")
    if found["length"]:
        return f"{text} of {_SIGNS[found['sign']]} {bound} {_UNITS.get(kinds[0], '')}".rstrip()
    return f"{text}, {_SIGNS[found['sign']]} {bound}"


def _join(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _at(model: Any, path: str) -> list[inspect.Type]:
    """The types that a value at a path may have."""
    kinds = _members(inspect.type_info(model))
    for word in re.findall(r"\[|[^.\[\]]+", path.replace("[...]", "[").replace("]", "")):
        if word.isdigit():
            continue  # the index of the [ before it
        found: list[inspect.Type] = []
        for kind in kinds:
            if isinstance(kind, inspect.StructType):
                found += [field.type for field in kind.fields if field.encode_name == word]
            elif word == "[" and isinstance(kind, inspect.ListType):
                found.append(kind.item_type)
            elif word == "[" and isinstance(kind, inspect.DictType):
                found.append(kind.value_type)
        kinds = [member for kind in found for member in _members(kind)]
    return kinds


def _members(kind: inspect.Type) -> list[inspect.Type]:
    return list(kind.types) if isinstance(kind, inspect.UnionType) else [kind]


def _field_names(kinds: list[inspect.Type]) -> list[str]:
    return [f.encode_name for kind in kinds if isinstance(kind, inspect.StructType) for f in kind.fields]


def _values(kinds: list[inspect.Type]) -> list[str]:
    return [str(value) for kind in kinds if isinstance(kind, inspect.LiteralType) for value in kind.values]

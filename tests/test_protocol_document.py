"""docs/protocol.md says what edgellm/protocol/ does: every table, every code, every example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from msgspec import inspect

from edgellm import protocol
from edgellm.errors import REQUEST_ERRORS

DOCUMENT = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")

STRUCTS: dict[str, type[msgspec.Struct]] = {
    "Every request": protocol.Envelope,
    "Generation fields": protocol.Generation,
    "chat": protocol.Chat,
    "generate": protocol.Generate,
    "cancel": protocol.Cancel,
    "tokenize": protocol.Tokenize,
    "status": protocol.Status,
    "health": protocol.Health,
    "model": protocol.Model,
    "limit": protocol.Limit,
    "suspend": protocol.Suspend,
    "resume": protocol.Resume,
    "Message": protocol.Message,
    "Every reply": protocol.Reply,
    "Event accepted": protocol.Accepted,
    "Event delta": protocol.Delta,
    "Event done": protocol.Done,
    "Event error": protocol.Error,
    "Event cancel": protocol.CancelReply,
    "Event tokenize": protocol.TokenizeReply,
    "Event health": protocol.HealthReply,
    "Event status": protocol.StatusReply,
    "Event model": protocol.ModelReply,
    "Event limit": protocol.LimitReply,
    "Event suspend": protocol.SuspendReply,
    "Event resume": protocol.ResumeReply,
    "Event state": protocol.StateEvent,
    "Event stats": protocol.StatsEvent,
    "Logprob": protocol.Logprob,
    "Usage": protocol.Usage,
    "Timings": protocol.Times,
}
"""Heading → the struct whose own fields the table under it lists."""


def replies(base: type[msgspec.Struct] = protocol.Reply) -> list[type[msgspec.Struct]]:
    """Every kind of reply, those that extend another one included."""
    return [kind for child in base.__subclasses__() for kind in (child, *replies(child))]


def bounds(low: Any, high: Any, above: Any = None) -> str:
    if above is not None:
        return f" > {above:g}" + (f", ≤ {high:g}" if high is not None else "")
    if low is None and high is None:
        return ""
    if high is None:
        return f" ≥ {low:g}"
    return f" {low:.15g}…{high:.15g}" if low is not None else f" ≤ {high:g}"


def spell(kind: inspect.Type) -> str:
    """A type as the document writes it."""
    match kind:
        case inspect.BoolType():
            return "bool"
        case inspect.IntType():
            return "int" + bounds(kind.ge, kind.le)
        case inspect.FloatType():
            return "float" + bounds(kind.ge, kind.le, kind.gt)
        case inspect.StrType():
            low, high = kind.min_length, kind.max_length
            return "str" + (f" of {low}…{high}" if high else f" of ≥ {low}" if low else "")
        case inspect.NoneType():
            return "nil"
        case inspect.LiteralType():
            # msgspec sorts the values; the order in the document is free.
            return " · ".join(sorted(str(value) for value in kind.values))
        case inspect.ListType() | inspect.VarTupleType():
            low, high = kind.min_length, kind.max_length
            count = f" {low}…{high}" if low and high else f" ≥ {low}" if low else f" ≤ {high}" if high else ""
            return f"array of{count} ({spell(kind.item_type)})"
        case inspect.TupleType():
            return "[" + ", ".join(spell(item) for item in kind.item_types) + "]"
        case inspect.DictType():
            most = f" ≤ {kind.max_length}" if kind.max_length else ""
            return f"map of{most} ({spell(kind.key_type)}) → ({spell(kind.value_type)})"
        case inspect.StructType():
            return heading_of(kind.cls)
        case inspect.UnionType():
            return " or ".join(spell(item) for item in kind.types)
    raise AssertionError(kind)


def heading_of(struct: type[msgspec.Struct]) -> str:
    return next(heading for heading, known in STRUCTS.items() if known is struct)


def own_fields(struct: type[msgspec.Struct]) -> list[inspect.Field]:
    """The fields that the struct adds to those of its bases."""
    inherited = {
        name
        for base in struct.__mro__[1:]
        if issubclass(base, msgspec.Struct) and base is not msgspec.Struct
        for name in base.__struct_fields__
    }
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return [field for field in info.fields if field.name not in inherited]


def default_of(field: inspect.Field) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value in ([], {}) else f"{value:g}" if isinstance(value, float) else str(value)


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two header lines; none if it has no table."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert section, f"docs/protocol.md has no section {heading}"
    first = re.search(r"(^\|.*\n)+", section[1], re.MULTILINE)
    lines = first[0].splitlines() if first else []
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("heading", STRUCTS)
def test_a_table_lists_the_fields_with_their_types(heading: str) -> None:
    struct = STRUCTS[heading]
    reply = issubclass(struct, protocol.Reply) or struct in (protocol.Logprob, protocol.Usage, protocol.Times)
    rows = table(heading)
    found = {row[0]: row[1].replace("`", "") for row in rows}
    tag = {} if struct not in (protocol.Envelope, protocol.Reply) else {"op" if not reply else "ev": "str"}
    fields = own_fields(struct)
    assert found == {**{field.name: spell(field.type) for field in fields}, **tag}
    if not reply:
        defaults = {row[0]: row[2] for row in rows}
        assert defaults == {**{f.name: default_of(f) for f in fields}, **dict.fromkeys(tag, "required")}
    assert all(row[-1] for row in rows), "a field without its meaning"


def test_every_op_and_every_event_is_there() -> None:
    requests = {kind.__struct_config__.tag for kind in protocol.Request.__args__}
    assert requests == set(protocol.OPS) <= set(STRUCTS)
    events = {kind.__struct_config__.tag for kind in replies()}
    assert {f"Event {event}" for event in events} <= set(STRUCTS)


def test_every_code_is_explained() -> None:
    assert {row[0] for row in table("Errors")} == set(REQUEST_ERRORS)


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def test_the_bytes_in_the_examples_are_messages() -> None:
    decoded = [msgpack.unpackb(bytes.fromhex("".join(text.split()))) for text in examples("hex")]
    assert len(decoded) >= 2
    for message in decoded:
        if "op" in message:
            protocol.decode_request(msgpack.packb(message))
        else:
            assert message["ev"] in {kind.__struct_config__.tag for kind in replies()}


def test_the_messages_in_the_examples_are_valid() -> None:
    count = 0
    for text in examples("json"):
        for line in text.splitlines():
            arrow, message = line[:2], msgspec.json.decode(line[2:])
            if arrow == "→ ":
                protocol.decode_request(msgpack.packb(message))
            else:
                assert arrow == "← "
                (kind,) = (k for k in replies() if k.__struct_config__.tag == message["ev"])
                assert set(message) == {"ev", *kind.__struct_fields__}
                msgspec.convert(message, kind)
            count += 1
    assert count >= 10


def test_the_bytes_in_the_cpp_example_are_messages() -> None:
    (code,) = examples("cpp")
    found = re.findall(r'std::string (\w+)\("([^"]*)", (\d+)\)', code)
    assert len(found) == 2
    for name, literal, length in found:
        payload = re.sub(r"\\x([0-9a-f]{2})", lambda m: chr(int(m[1], 16)), literal).encode("latin-1")
        # A hexadecimal escape in C++ goes on for as long as there are hexadecimal digits.
        assert not re.search(r"\\x[0-9a-f]{3}", literal)
        assert len(payload) == int(length)
        assert protocol.decode_request(payload).__struct_config__.tag == name

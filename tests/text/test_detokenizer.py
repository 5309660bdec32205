"""Detokenizer: whatever the splits, the text is the bytes' text and no delta ends inside a character."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edgellm.text.detokenizer import Detokenizer

CHARACTERS = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé中😀\ufffd")))


def _cut(data: bytes, borders: list[int]) -> list[bytes]:
    edges = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


@given(text=CHARACTERS, borders=st.lists(st.integers(0)))
def test_valid_text_comes_through_in_whole_characters(text: str, borders: list[int]) -> None:
    detokenizer = Detokenizer()
    sent = ""
    for piece in _cut(text.encode(), borders):
        sent += detokenizer.push(piece)
        assert text.startswith(sent)
    assert sent == text
    assert detokenizer.flush() == ""


@given(data=st.binary(), borders=st.lists(st.integers(0)))
def test_any_bytes_come_through_as_python_decodes_them(data: bytes, borders: list[int]) -> None:
    detokenizer = Detokenizer()
    sent = "".join(detokenizer.push(piece) for piece in _cut(data, borders)) + detokenizer.flush()
    assert sent == data.decode(errors="replace")


def test_half_a_character_waits() -> None:
    detokenizer = Detokenizer()
    face = "😀".encode()
    assert [detokenizer.push(face[:1]), detokenizer.push(face[1:3]), detokenizer.push(face[3:])] == [
        "",
        "",
        "😀",
    ]
    assert detokenizer.push(face[:2]) == ""
    assert detokenizer.flush() == "\ufffd"

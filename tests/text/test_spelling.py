"""Which decoders of tokenizer.json can be done token by token, and what they make of a token."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from edgellm.text.spelling import BYTE_ALPHABET, Spelling

BYTES = Spelling("bytes")
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@pytest.mark.parametrize(
    ("decoder", "spelling"),
    [
        (decoders.ByteLevel(), BYTES),
        (decoders.Sequence([decoders.ByteLevel()]), BYTES),
        (decoders.Sequence(LLAMA), Spelling("pieces", byte_fallback=True)),
        (
            decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
            Spelling("pieces", byte_fallback=True, strips_space=True),
        ),
        (decoders.Metaspace(), Spelling("pieces", strips_space=True)),
        (decoders.Metaspace(prepend_scheme="never"), Spelling("pieces")),
        (
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
            Spelling("pieces", byte_fallback=True, strips_space=True),
        ),
        (decoders.WordPiece(), None),
        (decoders.BPEDecoder(), None),
        (decoders.Metaspace(replacement="_"), None),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), None),
        (decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)]), None),
        (decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 1)]), None),
        (decoders.Sequence([*LLAMA, decoders.Replace("a", "b")]), None),
    ],
)
def test_decoders(decoder: Any, spelling: Spelling | None) -> None:
    assert Spelling.of(json.loads(decoder.__getstate__())) == spelling


@pytest.mark.parametrize(
    "decoder", [None, {}, [], "ByteLevel", {"type": "Sequence"}, {"type": "Sequence", "decoders": [3]}]
)
def test_what_is_no_decoder(decoder: Any) -> None:
    assert Spelling.of(decoder) is None


def test_the_alphabet_is_that_of_tokenizers() -> None:
    assert set(BYTE_ALPHABET) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))


@given(st.lists(st.sampled_from(["▁a", "▁", "é", "▁▁", "<0x0A>", "<0xC3>", "<0xA9>", "b"])))
def test_pieces_are_decoded_as_tokenizers_decodes_them(pieces: list[str]) -> None:
    spelling = Spelling("pieces", byte_fallback=True)
    spelled = b"".join(map(spelling.bytes_of, pieces))
    try:
        text = spelled.decode()
    except UnicodeDecodeError:  # tokenizers replaces each byte of a run with a wrong one, also the right ones
        return
    assert decoders.Sequence(LLAMA).decode(pieces) == text


def test_padding_is_no_text() -> None:
    assert BYTES.bytes_of("[PAD 7]") == b""
    assert Spelling("pieces").bytes_of("<0x0A>") == b"<0x0A>"

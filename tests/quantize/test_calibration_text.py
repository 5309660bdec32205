"""Texts for the quantizer: what is read, how it is cut, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_directories import tokenizer_json

from edgellm.errors import UsageError
from edgellm.quantize import text
from edgellm.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    return Tokenizer.from_file(tmp_path / "tokenizer.json", bos_id=1)


def test_sequences_are_from_all_over_the_text(tokenizer: Tokenizer) -> None:
    words = "".join(chr(33 + i % 90) for i in range(10_000))
    tokens = tokenizer.encode(words)
    found = text.cut(words, tokenizer, most=1000, fewest=10, longest=2048, bos=True, what="it")
    assert found.dtype == np.int32
    assert found.shape == (3, text.SEQUENCE)
    assert (found[:, 0] == 1).all()
    assert (found[0, 1:] == tokens[: text.SEQUENCE - 1]).all()
    assert (found[-1, 1:] == tokens[-text.SEQUENCE + 1 :]).all()


def test_a_short_context_or_text_makes_short_sequences(tokenizer: Tokenizer) -> None:
    words = "abcdefghij" * 10
    sizes = {
        longest: text.cut(words, tokenizer, most=90, fewest=10, longest=longest, bos=False, what="it").shape
        for longest in (20, 4096)
    }
    assert sizes == {20: (4, 20), 4096: (1, 100)}


@pytest.mark.parametrize("words", ["", "abc"])
def test_too_short_a_text_is_refused(tokenizer: Tokenizer, words: str) -> None:
    with pytest.raises(UsageError, match=f"^it has {len(words)} tokens; at least 64 are needed"):
        text.cut(words, tokenizer, most=1000, fewest=64, longest=2048, bos=True, what="it")


def test_the_end_is_held_out() -> None:
    assert text.split_text("0123456789") == ("01234567", "89")


def test_only_the_beginning_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_BYTES", 10)
    path = tmp_path / "long.txt"
    path.write_text("abcdefghé and more", encoding="utf-8")
    assert text.read_text(path, "--evaluate") == "abcdefghé"
    path.write_text("abcdefghié and more", encoding="utf-8")  # é is cut in two
    assert text.read_text(path, "--evaluate") == "abcdefghi"


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "cannot be read: No such file"), (b"abc\xff" + bytes(20), "is not UTF-8 text, from byte 3 on")],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        text.read_text(path, "--calibrate")
    assert str(caught.value).startswith(f"--calibrate {path} {named}")

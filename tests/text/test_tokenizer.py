"""The tokenizer against llama.cpp's (tests/golden/tokenizer.json), and byte for byte."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from ggufs import CONTROL_TOKENS
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import TINY, load

from edgellm.checkpoint.gguf_model import GgufCheckpoint
from edgellm.errors import BadRequest, CheckpointError, EngineError
from edgellm.text.bpe import PRE_TOKENIZERS, BpeVocabulary
from edgellm.text.tokenizer import Tokenizer

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text())


def _load(vocabulary: BpeVocabulary, *, bos_id: int | None = None) -> Tokenizer:
    return load(vocabulary.tokenizer_json(), bos_id=bos_id)


def _join(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text).tolist())


@pytest.mark.model
@pytest.mark.parametrize("pre", sorted(GOLDEN["ids"]))
def test_ids_are_those_of_llama_cpp(smollm2_gguf: Path, pre: str) -> None:
    vocabulary = GgufCheckpoint(smollm2_gguf).vocabulary
    assert isinstance(vocabulary, BpeVocabulary)
    tokenizer = _load(dataclasses.replace(vocabulary, pre=pre))
    compared = 0
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][pre], strict=True):
        if PRE_TOKENIZERS[pre].normalizer and unicodedata.normalize("NFC", text) != text:
            continue  # Qwen's own tokenizer composes characters first; llama.cpp does not
        assert tokenizer.encode(text).tolist() == ids, text
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) - {"qwen2"}))
@given(text=st.text())
def test_bytes_of_the_tokens_are_the_text(pre: str, text: str) -> None:
    assert _join(_TINY[pre], text) == text.encode()


@given(text=st.text())
def test_qwen_composes_first(text: str) -> None:
    assert _join(_TINY["qwen2"], text) == unicodedata.normalize("NFC", text).encode()


_TINY = {pre: _load(dataclasses.replace(TINY, pre=pre)) for pre in PRE_TOKENIZERS}


def test_merges_and_special_tokens() -> None:
    tokenizer = _load(TINY, bos_id=1)
    spelled = [
        TINY.tokens[token] for token in tokenizer.encode("<|im_start|>hello hello w<|im_end|>").tolist()
    ]
    assert spelled == ["<|im_start|>", "hello", "Ġhello", "Ġw", "<|im_end|>"]
    assert [tokenizer.token_bytes(token) for token in range(len(CONTROL_TOKENS))] == [b"", b"", b""]
    assert tokenizer.token_bytes(TINY.tokens.index("Ġhello")) == b" hello"
    assert tokenizer.vocab_size == len(TINY.tokens)


def test_every_single_byte_has_a_token() -> None:
    tokenizer = _load(TINY)
    spelled = {tokenizer.token_bytes(TINY.tokens.index(TINY.tokens[token])) for token in range(3, 259)}
    assert spelled == {bytes([byte]) for byte in range(256)}


def test_bos_only_where_it_is_asked_for() -> None:
    tokenizer = _load(TINY, bos_id=1)
    assert tokenizer.encode("w").tolist() == tokenizer.encode("w", bos=True).tolist()[1:]
    assert tokenizer.encode("w", bos=True)[0] == 1
    assert _load(TINY).encode("w", bos=True).tolist() == tokenizer.encode("w").tolist()
    assert tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("token", [-1, 100_000, 2**31])
def test_ids_that_do_not_exist_add_nothing(token: int) -> None:
    assert _load(TINY).token_bytes(token) == b""


def test_user_defined_tokens_are_text_and_padding_is_none() -> None:
    types = [*TINY.types, 4, 5]
    vocabulary = dataclasses.replace(TINY, tokens=[*TINY.tokens, "<tööl>", "[PAD 7]"], types=types)
    tokenizer = _load(vocabulary)
    ids = tokenizer.encode("a<tööl>b").tolist()
    assert ids[1] == len(TINY.tokens)
    assert tokenizer.token_bytes(ids[1]) == "<tööl>".encode()
    assert tokenizer.token_bytes(ids[1] + 1) == b""


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        _load(TINY).encode("a\ud800b")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre": "deepseek-v3"}, r"tokenizer\.ggml\.pre deepseek-v3; edgellm knows smollm"),
        ({"merges": ["h e", "he llo"]}, r"merge 1 'he llo'"),
        ({"merges": ["he"]}, r"merge 0 'he'"),
        ({"tokens": [*TINY.tokens[:-1], "he"]}, r"token 'he' twice"),
    ],
)
def test_damaged_vocabulary_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        dataclasses.replace(TINY, **changes).tokenizer_json()


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", TINY.tokenizer_json().decode()[:-20]):
        path.write_text(content)
        with pytest.raises(EngineError, match=r"tokenizer\.json"):
            Tokenizer.from_file(path)
    path.write_bytes(TINY.tokenizer_json())
    assert Tokenizer.from_file(path).encode("hello").tolist() == [TINY.tokens.index("hello")]


@given(st.text() | st.text(alphabet="helo <|im_start|>end\n ", max_size=200))
def test_text_has_at_least_as_many_tokens_as_its_length_demands(text: str) -> None:
    tokenizer = _load(TINY)
    assert tokenizer.longest_token is not None
    assert len(text.encode()) <= tokenizer.longest_token * len(tokenizer.encode(text))


def test_a_normalizer_leaves_a_looser_bound_or_none() -> None:
    longest = _load(TINY).longest_token
    assert longest is not None
    assert _load(dataclasses.replace(TINY, pre="qwen2")).longest_token == 4 * longest
    inner = tokenizers.Tokenizer.from_str(TINY.tokenizer_json().decode())
    inner.normalizer = tokenizers.normalizers.NFKC()
    assert Tokenizer(inner).longest_token is None


def test_nfc_shortens_no_character_more_than_fourfold() -> None:
    """Each character against the longest text that NFC turns into it: parts may have longer synonyms."""
    longest_synonym: dict[str, int] = {}
    for code in range(0x30000):
        character = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        if len(part := unicodedata.normalize("NFD", character)) == 1:
            size = max(longest_synonym.get(part, 0), len(character.encode()))
            longest_synonym[part] = size
    for code in range(0x30000):
        if not 0xD800 <= code < 0xE000:
            composed = unicodedata.normalize("NFC", chr(code))
            parts = sum(longest_synonym[part] for part in unicodedata.normalize("NFD", composed))
            assert parts <= 4 * len(composed.encode()), hex(code)

"""SentencePiece's and tiktoken's vocabularies against the tokenizers that they are made for."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import GOLDEN, LEGACY, MODEL, QWEN, RANKS, SPM, load

from edgellm.checkpoint.sentencepiece_model import read_sentencepiece
from edgellm.errors import CheckpointError
from edgellm.text.bpe import NORMAL
from edgellm.text.detokenizer import Detokenizer
from edgellm.text.tiktoken import SPECIAL_TOKENS, tiktoken_json
from edgellm.text.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What a client of `chat` is sent."""
    detokenizer = Detokenizer(strip_space=tokenizer.strips_space)
    return "".join(detokenizer.push(tokenizer.token_bytes(token)) for token in ids) + detokenizer.flush()


def test_sentencepiece_and_its_decoding() -> None:
    golden = GOLDEN["sentencepiece"]
    compared = 0
    for text, ids, decoded in zip(GOLDEN["texts"], golden["ids"], golden["decoded"], strict=True):
        if ids is None:
            continue
        assert SPM.encode(text).tolist() == ids, text
        assert stream(SPM, ids) == decoded, text
        compared += 1
    assert compared > 100


def test_llama_cpp_reads_the_same_pieces_alike() -> None:
    for text, ids in zip(GOLDEN["texts"], GOLDEN["llama.cpp"], strict=True):
        assert SPM.encode(text).tolist() == ids, text


def test_transformers_without_legacy() -> None:
    tokenizer = load(read_sentencepiece(MODEL, legacy=False, add_bos=True).tokenizer_json())
    for text, ids in zip(GOLDEN["texts"], GOLDEN["transformers"], strict=True):
        assert tokenizer.encode(text).tolist() == ids, text


def test_tiktoken() -> None:
    for text, ids in zip(GOLDEN["texts"], GOLDEN["tiktoken"], strict=True):
        assert QWEN.encode(text).tolist() == ids, text


@given(text=st.text() | st.text(alphabet="<0xE5>▁ </s>\n中"))
def test_what_sentencepiece_reads_comes_back(text: str) -> None:
    ids = SPM.encode(text).tolist()
    spoken = [name for name in ("<s>", "</s>", "<unk>") if name in text]
    if not spoken and "▁" not in text:
        assert stream(SPM, ids) == text


def test_a_continuation_keeps_its_space() -> None:
    prompt, whole = (SPM.encode(text).tolist() for text in ("Hello", "Hello world"))
    assert whole[: len(prompt)] == prompt
    rest = whole[len(prompt) :]
    assert b"".join(map(SPM.token_bytes, rest)) == b" world"
    assert stream(SPM, rest) == "world"


def test_byte_tokens_join_to_characters() -> None:
    bytes_of = {byte: LEGACY.tokens.index(f"<0x{byte:02X}>") for byte in range(256)}
    assert [SPM.token_bytes(bytes_of[byte]) for byte in range(256)] == [bytes([b]) for b in range(256)]
    assert stream(SPM, [bytes_of[byte] for byte in "堂😀".encode()]) == "堂😀"


@given(st.text() | st.text(alphabet="▁ =-abé", max_size=200))
def test_text_has_at_least_as_many_tokens_as_its_length_demands(text: str) -> None:
    for tokenizer in (SPM, QWEN):
        assert tokenizer.longest_token is not None
        assert len(text.encode()) <= tokenizer.longest_token * len(tokenizer.encode(text))


def test_tokens_may_follow_the_pieces() -> None:
    count = len(LEGACY.tokens)
    vocabulary = LEGACY.extended(
        {1: ("<s>", True), count: ("<|im_start|>", True), count + 1: ("[PAD]", False)}
    )
    tokenizer = load(vocabulary.tokenizer_json())
    assert tokenizer.encode("<|im_start|>[PAD]").tolist() == [count, count + 1]
    assert (tokenizer.token_bytes(count), tokenizer.token_bytes(count + 1)) == (b"", b"[PAD]")
    with pytest.raises(CheckpointError, match="not the next"):
        LEGACY.extended({count + 1: ("x", True)})
    with pytest.raises(CheckpointError, match=r"has piece '<s>' for 1"):
        LEGACY.extended({1: ("x", True)})


def test_scores_that_give_no_order_are_refused() -> None:
    scores = [
        0.0 if kind == NORMAL else score for kind, score in zip(LEGACY.types, LEGACY.scores, strict=True)
    ]
    with pytest.raises(CheckpointError, match="has score 0 for both"):
        replace(LEGACY, scores=scores).tokenizer_json()


@pytest.mark.parametrize("length", [0, 1, 100, 2000])
def test_a_truncated_model_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_sentencepiece(path, legacy=True, add_bos=True).tokenizer_json()


@given(st.binary(max_size=64))
def test_any_bytes_are_a_model_or_named(raw: bytes) -> None:
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile() as file:
        Path(file.name).write_bytes(raw)
        with pytest.raises(CheckpointError):
            read_sentencepiece(Path(file.name), legacy=True, add_bos=True).tokenizer_json()


def field(number: int, value: int | bytes) -> bytes:
    """A protobuf field with a number below 16, or below 2048 in two bytes."""
    wire = number << 3 | (2 if isinstance(value, bytes) else 0)
    key = bytes([wire]) if wire < 128 else bytes([wire & 127 | 128, wire >> 7])
    return key + (bytes([len(value)]) + value if isinstance(value, bytes) else bytes([value]))


PLAIN = field(4, 0)  # remove_extra_whitespaces off
PIECE = field(1, field(1, b"a"))


@pytest.mark.parametrize(
    ("trainer", "normalizer", "named"),
    [
        (field(3, 1), PLAIN, "type unigram; edgellm reads bpe"),
        (field(3, 2) + field(24, 1), PLAIN, "treat_whitespace_as_suffix"),
        (field(3, 2), PLAIN + field(2, b"map"), "precompiled_charsmap"),
        (field(3, 2), b"", "remove_extra_whitespaces"),
        (field(3, 2), PLAIN + field(5, 0), "escape_whitespaces"),
        (field(3, 2), PLAIN, "no byte piece <0x00>"),
        (field(3, b"bpe"), PLAIN, "text where a number should be"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, trainer: bytes, normalizer: bytes, named: str
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(PIECE + field(2, trainer) + field(3, normalizer))
    with pytest.raises(CheckpointError, match=named):
        read_sentencepiece(path, legacy=True, add_bos=True).tokenizer_json()


def test_qwens_special_tokens_follow_the_ranks() -> None:
    ranks = len(RANKS.read_text().splitlines())
    ids = QWEN.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|><|extra_204|>").tolist()
    assert ids == [ranks, ranks + 1, ranks + 2, ranks + 3, ranks + 207]
    assert QWEN.vocab_size == ranks + len(SPECIAL_TOKENS)


def line(token: bytes, rank: int) -> str:
    return f"{base64.b64encode(token).decode()} {rank}\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no token for byte 33"),
        ("IQ==\n", "line 1 is not a token"),
        ("I! 0\n", "line 1 is not a token"),
        (line(b"!", 0) + line(b"a", 7), "line 2 has rank 7"),
        (line(b"!", 0) + line(b"!", 1), "token b'!' twice"),
        (line(b"", 0), "line 1"),
    ],
)
def test_damaged_ranks_are_named(text: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        tiktoken_json(text.encode(), Path("qwen.tiktoken"))

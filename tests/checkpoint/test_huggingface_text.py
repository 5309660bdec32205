"""Directories without tokenizer.json: SentencePiece's tokenizer.model, and qwen.tiktoken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ggufs import Llama, token_types, tokens
from vocabularies import GOLDEN, LEGACY, MODEL, RANKS, load

from edgellm.checkpoint.config_file import ConfigFile
from edgellm.checkpoint.gguf_model import GgufCheckpoint
from edgellm.checkpoint.huggingface_text import TextFiles
from edgellm.errors import CheckpointError
from edgellm.text.tiktoken import CHATML

VOCAB_SIZE = 2000


def read(path: Path, vocabulary: Path, eos: int | None = 2, **files: Any) -> TextFiles:
    """The text files of a directory with this vocabulary and these JSON files."""
    shutil.copy(vocabulary, path)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return TextFiles(path, ConfigFile("config.json", {"eos_token_id": eos}), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("legacy", "reference"), [(None, "llama.cpp"), (True, "llama.cpp"), (False, "transformers")]
)
def test_sentencepiece(tmp_path: Path, legacy: bool | None, reference: str) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "legacy": legacy}
    files = read(tmp_path, MODEL, tokenizer_config=config)
    assert (files.bos_id, files.bos_token, files.add_bos, files.eos_ids) == (1, "<s>", True, (2,))
    assert files.chat_template is None
    tokenizer = load(files.tokenizer_json())
    for text, ids in zip(GOLDEN["texts"], GOLDEN[reference], strict=True):
        assert tokenizer.encode(text).tolist() == ids, text


def test_pieces_alone_have_the_usual_ends(tmp_path: Path) -> None:
    files = read(tmp_path, MODEL, eos=None)
    assert (files.bos_id, files.bos_token, files.add_bos, files.eos_ids) == (1, "<s>", True, (2,))
    files = read(tmp_path, MODEL, tokenizer_config={"bos_token": None, "eos_token": "</s>"})
    assert (files.bos_id, files.bos_token, files.add_bos, files.eos_token) == (None, "", False, "</s>")


def test_tokens_beside_the_pieces(tmp_path: Path) -> None:
    next_id = len(LEGACY.tokens)
    config = {
        "add_bos_token": False,
        "bos_token": "<s>",
        "added_tokens_decoder": {
            "1": {"content": "<s>"},
            str(next_id + 1): {"content": "<|im_end|>", "special": True},
        },
    }
    files = read(tmp_path, MODEL, tokenizer_config=config, added_tokens={"[TOOL_CALL]": next_id})
    assert not files.add_bos
    assert files.eos_ids == (2, next_id + 1)
    assert load(files.tokenizer_json()).encode("[TOOL_CALL]<|im_end|>").tolist() == [next_id, next_id + 1]


@pytest.mark.parametrize(
    ("token", "named"),
    [
        ({"content": "x", "rstrip": True}, "rstrip"),
        ("x", "added_tokens_decoder"),
        ({"content": 3}, "added_tokens"),
    ],
)
def test_tokens_that_cannot_be_added(tmp_path: Path, token: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, MODEL, tokenizer_config={"added_tokens_decoder": {"0": token}})


def test_qwens_first_generation(tmp_path: Path) -> None:
    ranks = len(RANKS.read_text().splitlines())
    files = read(
        tmp_path, RANKS, eos=None, generation_config={"chat_format": "chatml", "eos_token_id": ranks}
    )
    assert files.eos_ids == (ranks, ranks + 2)  # <|endoftext|>, and ChatML's <|im_end|>
    assert files.chat_template == CHATML
    assert (files.bos_id, files.bos_token, files.add_bos) == (None, "", False)
    tokenizer = load(files.tokenizer_json())
    for text, ids in zip(GOLDEN["texts"], GOLDEN["tiktoken"], strict=True):
        assert tokenizer.encode(text).tolist() == ids, text


def test_a_base_model_has_no_chat_template(tmp_path: Path) -> None:
    assert read(tmp_path, RANKS, generation_config={"chat_format": "raw"}).chat_template is None


def test_a_vocabulary_that_is_larger_than_the_model(tmp_path: Path) -> None:
    shutil.copy(RANKS, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"qwen\.tiktoken has token \d+, but config\.json's vocab_size is 300"
    ):
        TextFiles(tmp_path, ConfigFile("config.json", {"eos_token_id": 2}), 300)


def test_tokenizer_json_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(LEGACY.tokenizer_json())
    files = read(tmp_path, RANKS, tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    assert files.add_bos
    assert files.tokenizer_json() == LEGACY.tokenizer_json()


def test_a_gguf_file_with_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": LEGACY.tokens,
        "tokenizer.ggml.scores": LEGACY.scores,
        "tokenizer.ggml.token_type": LEGACY.types,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.add_bos_token": None,
    }
    extra = {"token_embd.weight": (len(LEGACY.tokens), 64)}
    Llama(keys=keys, extra=extra).write(path)
    checkpoint = GgufCheckpoint(path)
    assert (checkpoint.bos_token, checkpoint.add_bos, checkpoint.eos_ids) == ("<s>", True, (2,))
    assert checkpoint.tokenizer_json() == LEGACY.tokenizer_json()
    Llama(
        keys=keys | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False},
        extra=extra,
    ).write(path)
    checkpoint = GgufCheckpoint(path)
    tokenizer = load(checkpoint.tokenizer_json())
    assert (checkpoint.add_bos, tokenizer.strips_space) == (False, False)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("a b").tolist())) == b"a b"
    Llama(keys=keys | {"tokenizer.ggml.scores": [1.0]}, extra=extra).write(path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores has 1"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("kind", [1, 4])  # normal, user-defined
def test_a_token_that_ends_answers_is_a_control_token_whatever_the_file_says(
    tmp_path: Path, kind: int
) -> None:
    path = tmp_path / "tiny.gguf"
    types = [
        kind if token == "<|im_end|>" else each for token, each in zip(tokens(), token_types(), strict=True)
    ]
    Llama(keys={"tokenizer.ggml.token_type": types, "tokenizer.ggml.eos_token_id": 0}).write(path)
    checkpoint = GgufCheckpoint(path)
    end = tokens().index("<|im_end|>")
    assert checkpoint.eos_ids == (0, end)
    tokenizer = load(checkpoint.tokenizer_json())
    assert tokenizer.encode("<|im_end|>").tolist() == [end]
    assert tokenizer.token_bytes(end) == b""

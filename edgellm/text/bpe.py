"""A byte-level BPE vocabulary → `tokenizer.json`, the format of Hugging Face's `tokenizers`.

How a text is cut before the merges apply is not in a GGUF file, only its name is (`tokenizer.ggml.pre`). The
patterns are those of the models' own tokenizer.json and of llama.cpp (llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from edgellm.errors import CheckpointError

# gguf-py's TokenType.
NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What `tokenizer.ggml.pre` stands for.

    Attributes:
        steps: in the format of tokenizer.json.
        normalizer: likewise, or None.
        ignore_merges: a piece that is a token stays whole, whatever the merges say.
    """

    steps: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False


def _gpt4(digits: str) -> list[dict[str, Any]]:
    """GPT-4's pattern; families differ in how many digits make a piece."""
    pattern = (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [_split(pattern), _byte_level(use_regex=False)]


PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    "smollm": PreTokenizer([{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]),
    "llama-bpe": PreTokenizer(_gpt4(r"\p{N}{1,3}"), ignore_merges=True),
    "qwen2": PreTokenizer(_gpt4(r"\p{N}"), normalizer={"type": "NFC"}),
}
"""`tokenizer.ggml.pre` → what it means."""


def added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's `added_tokens`: recognised in a text as it is written."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def byte_level_json(
    vocabulary: Mapping[str, int], merges: Sequence[str], added: list[dict[str, Any]], pre: PreTokenizer
) -> bytes:
    """A byte-level BPE tokenizer as tokenizer.json, UTF-8.

    Args:
        vocabulary: token in GPT-2's alphabet → id.
        merges: "left right", most urgent first.
        added: entries of `added_tokens`.
        pre: how a text is cut.
    """
    return msgspec.json.encode(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": pre.normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
            "post_processor": None,
            "decoder": _byte_level(use_regex=True),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": pre.ignore_merges,
                "vocab": vocabulary,
                "merges": merges,
            },
        }
    )


@dataclass(frozen=True, slots=True)
class BpeVocabulary:
    """A byte-level BPE vocabulary as GGUF stores it.

    Attributes:
        source: the file it comes from, for messages.
        tokens: id → token, bytes written in GPT-2's alphabet.
        types: id → gguf-py's TokenType.
        merges: "left right", most urgent first.
        pre: name of the pre-tokenizer.
        add_bos: whether a text starts with the BOS token.
    """

    source: Path
    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    add_bos: bool

    def tokenizer_json(self) -> bytes:
        """The vocabulary as tokenizer.json, UTF-8.

        Control tokens become special tokens: they are recognised in a text, and left out of one.

        Raises:
            CheckpointError: `pre` is not known, a token appears twice, or a merge makes no sense.
        """
        pre = PRE_TOKENIZERS.get(self.pre)
        if pre is None:
            raise CheckpointError(
                f"{self.source} has tokenizer.ggml.pre {self.pre}; edgellm knows {', '.join(PRE_TOKENIZERS)}"
            )
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        self._check(vocabulary)
        added = [
            added_token(index, self.tokens[index], special=kind != USER_DEFINED)
            for index, kind in enumerate(self.types)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        return byte_level_json(vocabulary, self.merges, added, pre)

    def _check(self, vocabulary: dict[str, int]) -> None:
        if len(vocabulary) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if vocabulary[token] != index)
            raise CheckpointError(f"{self.source} has token {twice!r} twice in tokenizer.ggml.tokens")
        for index, merge in enumerate(self.merges):
            left, space, right = merge.partition(" ")
            if (
                not space
                or left not in vocabulary
                or right not in vocabulary
                or left + right not in vocabulary
            ):
                raise CheckpointError(
                    f"{self.source} has merge {index} {merge!r} in tokenizer.ggml.merges, "
                    "which does not join two tokens into a third"
                )

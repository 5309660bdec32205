"""A SentencePiece BPE vocabulary (Llama 2, Mistral 7B) → `tokenizer.json`.

SentencePiece writes a space as `▁`, puts one in front of a text, and spells characters that it does not know
in byte tokens, `<0xE5>`. Merges follow from the pieces' scores. Sources: sentencepiece (bpe_model.cc),
llama.cpp (llama-vocab.cpp, llm_tokenizer_spm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgellm.errors import CheckpointError
from edgellm.text.bpe import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, added_token
from edgellm.text.merges import merges_of
from edgellm.text.spelling import SPACE

Prefix = Literal["none", "first", "every"]
"""Where a text gets a space in front: nowhere; at its beginning, unless it has one; there and after every
special token, as llama.cpp and transformers' `legacy` tokenizers do.
"""


@dataclass(frozen=True, slots=True)
class SentencePieceVocabulary:
    """A SentencePiece vocabulary of type BPE, with byte fallback and without a normalizer.

    Attributes:
        source: the file it comes from, for messages.
        tokens: id → piece.
        scores: id → score; the higher, the earlier a piece is merged.
        types: id → TokenType, numbered alike by sentencepiece and gguf-py.
        prefix: where a space goes in front.
        add_bos: whether a text starts with the BOS token.
    """

    source: Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    prefix: Prefix
    add_bos: bool

    def extended(self, extra: Mapping[int, tuple[str, bool]]) -> SentencePieceVocabulary:
        """With tokens by their numbers: text, and whether it is special. Known ones may be named again.

        Raises:
            CheckpointError: a number is a piece of another text, or leaves a gap.
        """
        tokens, scores, types = list(self.tokens), list(self.scores), list(self.types)
        for number, (text, special) in sorted(extra.items()):
            if not 0 <= number <= len(tokens):
                raise CheckpointError(
                    f"{self.source} has {len(self.tokens)} pieces, and token {text!r} is number {number}, "
                    "which is not the next"
                )
            if number == len(tokens):
                tokens.append(text)
                scores.append(0.0)
                types.append(CONTROL if special else USER_DEFINED)
            elif tokens[number] != text:
                raise CheckpointError(
                    f"{self.source} has piece {tokens[number]!r} for {number}, not {text!r}"
                )
        return replace(self, tokens=tokens, scores=scores, types=types)

    def tokenizer_json(self) -> bytes:
        """The vocabulary as tokenizer.json, UTF-8.

        Raises:
            CheckpointError: a piece appears twice, scores do not give an order, or byte pieces are missing.
        """
        ids = {token: index for index, token in enumerate(self.tokens)}
        self._check(ids)
        normal = {token: index for index, token in enumerate(self.tokens) if self.types[index] == NORMAL}
        # Of equal scores the longer first: see _check_order.
        ranked = sorted(normal, key=lambda token: (-self.scores[normal[token]], -len(token)))
        merges = merges_of(normal, ranked)
        self._check_order(merges, normal)
        return msgspec.json.encode(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [
                    added_token(index, self.tokens[index], special=kind != USER_DEFINED)
                    for index, kind in enumerate(self.types)
                    if kind in (CONTROL, UNKNOWN, USER_DEFINED)
                ],
                "normalizer": self._normalizer(),
                "pre_tokenizer": self._pre_tokenizer(),
                "post_processor": None,
                "decoder": {"type": "Sequence", "decoders": list(self._decoders())},
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": self.tokens[self.types.index(UNKNOWN)],
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": True,
                    "byte_fallback": True,
                    "ignore_merges": False,
                    "vocab": ids,
                    "merges": [f"{left} {right}" for left, right in merges],
                },
            }
        )

    def _normalizer(self) -> dict[str, Any] | None:
        if self.prefix == "first":
            return None
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        if self.prefix == "none":
            return spaces
        return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}

    def _pre_tokenizer(self) -> dict[str, Any] | None:
        if self.prefix != "first":
            return None
        return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}

    def _decoders(self) -> Iterator[dict[str, Any]]:
        yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        yield {"type": "ByteFallback"}
        yield {"type": "Fuse"}
        if self.prefix != "none":
            yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}

    def _check(self, ids: dict[str, int]) -> None:
        if len(ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if ids[token] != index)
            raise CheckpointError(f"{self.source} has piece {twice!r} twice")
        for byte in range(256):
            index = ids.get(f"<0x{byte:02X}>")
            if index is None or self.types[index] != BYTE:
                raise CheckpointError(
                    f"{self.source} has no byte piece <0x{byte:02X}>; edgellm reads SentencePiece "
                    "vocabularies with byte fallback"
                )
        if UNKNOWN not in self.types:
            raise CheckpointError(f"{self.source} has no piece of type unknown")

    def _check_order(self, merges: list[tuple[str, str]], normal: dict[str, int]) -> None:
        """Of equal scores the leftmost pair is merged first, which a list of merges cannot say.

        Llama 2's and Mistral's runs of spaces have one score, the lowest. From the left, a run becomes its
        longest piece before anything else is merged; so it does if longer pieces are the more urgent ones.
        """
        equals: dict[float, list[tuple[str, str]]] = {}
        for left, right in merges:
            equals.setdefault(self.scores[normal[left + right]], []).append((left, right))
        for score, pairs in equals.items():
            pieces = {left + right for left, right in pairs}
            if len(pieces) > 1 and not (len(set("".join(pieces))) == 1 and _is_same_from_the_left(pairs)):
                one, other, *_ = sorted(pieces)
                raise CheckpointError(
                    f"{self.source} has score {score:g} for both {one!r} and {other!r}: edgellm reads "
                    "SentencePiece vocabularies of type BPE, whose scores differ"
                )


def _is_same_from_the_left(pairs: list[tuple[str, str]]) -> bool:
    """Whether runs of one character become the same, merged in the order of `pairs` or leftmost first."""
    listed = {(len(left), len(right)): rank for rank, (left, right) in reversed([*enumerate(pairs)])}
    leftmost = dict.fromkeys(listed, 0)
    longest = max(left + right for left, right in listed)
    return all(_merge_run(run, listed) == _merge_run(run, leftmost) for run in range(2, 3 * longest))


def _merge_run(length: int, ranks: Mapping[tuple[int, int], int]) -> list[int]:
    """Lengths of the pieces that a run becomes."""
    parts = [1] * length
    while found := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts

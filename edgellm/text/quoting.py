"""Special tokens that are only quoted: text that a client wrote must not open or close a turn.

A chat template puts special tokens (`<|im_end|>`) and what clients say into one text, and a client could
write them too. So before the template runs, every special token within a message is interrupted by a mark, a
character that stands for nothing; the template may strip, cut and compare messages as ever. The reader of a
marked text looks for special tokens first and drops marks then, so what the template wrote is recognised and
what was quoted is ordinary text. Messages without special tokens are not touched at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import tokenizers

from edgellm.errors import BadRequest

_MARKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Noncharacters: Unicode keeps them for a program's own use, so texts hardly ever have them."""

_MARKER: Final = re.compile(r"<\|.+\|>", re.DOTALL)


class Quotation:
    """Quotes the special tokens of one tokenizer. Any thread may use it.

    Args:
        inner: the loaded tokenizer.json.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._added = inner.get_added_tokens_decoder()
        guarded = [token for token in self._added.values() if _is_guarded(token)]
        names = [token.content for token in guarded]
        self._heads = {name[:2] for name in names}
        # Zero-width, so that tokens are found that overlap.
        self._begin = re.compile("(?=" + "|".join(map(re.escape, names)) + ")")
        self._openings = {name[:end] for name in names for end in range(2, len(name))}
        self._closings = {name[begin:] for name in names for begin in range(1, len(name) - 1)}
        self._longest = max(map(len, names), default=0)
        # A token that is looked for in the normalized text is also found where a text only resembles it.
        self._resembled = tuple(token.content for token in guarded if token.normalized)
        self._readers: dict[str, tokenizers.Tokenizer] = {}

    def quote(self, texts: Sequence[str]) -> tuple[list[str], str]:
        """See `Tokenizer.quote`."""
        places = [self._places(text) for text in texts]
        if not any(places) and not any(map(self._resembles, texts)):
            return list(texts), ""
        mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise BadRequest(
                "the messages hold special tokens, and all of U+FDD0…U+FDEF, which are no characters",
                field="messages",
            )
        return [_insert(mark, text, where) for text, where in zip(texts, places, strict=True)], mark

    def reader(self, mark: str) -> tokenizers.Tokenizer:
        """The tokenizer for texts with this mark; it shares the model with the other."""
        reader = self._readers.get(mark)
        if reader is None:
            reader = self._readers[mark] = self._make_reader(mark)
        return reader

    def _places(self, text: str) -> set[int]:
        """Where special tokens are to be interrupted: behind their first characters.

        Also the beginning of one at the text's end, and the end of one at its beginning: what the template
        puts beside it, such as another message, could complete it.
        """
        places = set()
        if any(head in text for head in self._heads):
            places = {found.start() + 1 for found in self._begin.finditer(text)}
        end = len(text.rstrip())
        begin = len(text) - len(text.lstrip())
        for size in range(2, min(self._longest, end - begin + 1)):
            if text[end - size : end] in self._openings:
                places.add(end - size + 1)
            if text[begin : begin + size] in self._closings:
                places.add(begin + 1)
        return places

    def _resembles(self, text: str) -> bool:
        if not self._resembled or self._inner.normalizer is None:
            return False
        normalized = self._inner.normalizer.normalize_str(text.encode(errors="replace").decode())
        return any(name in normalized for name in self._resembled)

    def _make_reader(self, mark: str) -> tokenizers.Tokenizer:
        inner, drop = self._inner, tokenizers.normalizers.Replace(mark, "")
        reader = tokenizers.Tokenizer(inner.model)
        reader.normalizer = (
            drop if inner.normalizer is None else tokenizers.normalizers.Sequence([drop, inner.normalizer])
        )
        if inner.pre_tokenizer is not None:
            reader.pre_tokenizer = inner.pre_tokenizer
        for index, token in sorted(self._added.items()):
            # Guarded tokens are looked for before marks are dropped, which is a normalizer.
            normalized = token.normalized and not _is_guarded(token)
            reader.add_tokens(
                [
                    tokenizers.AddedToken(
                        token.content,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=normalized,
                        special=token.special,
                    )
                ]
            )
            assert reader.token_to_id(token.content) == index
        return reader


def _is_guarded(token: tokenizers.AddedToken) -> bool:
    """Whether a token may mark turns: it is special, or looks so. Fine-tunes have added `<|im_start|>` as if
    it were a word.
    """
    return len(token.content) > 1 and (token.special or _MARKER.fullmatch(token.content) is not None)


def _insert(mark: str, text: str, places: set[int]) -> str:
    edges = [0, *sorted(places), len(text)]
    return mark.join(text[begin:end] for begin, end in pairwise(edges))

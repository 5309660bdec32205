"""Text to token ids, and one token id to its bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edgellm.errors import BadRequest, EngineError
from edgellm.text.quoting import Quotation
from edgellm.text.spelling import SPACE, Spelling

_NFC_SHORTENS: Final = 4
"""NFC makes UTF-8 shorter at most so many times: U+1FBE U+0308 U+0301, 7 bytes, becomes U+0390, 2 bytes."""


class Tokenizer:
    """A byte-level BPE tokenizer, or one of SentencePiece's kind.

    Any thread may encode; the work happens without the interpreter's lock. `token_bytes` keeps what it has
    worked out and belongs to one thread.

    Args:
        inner: the loaded tokenizer.json.
        bos_id: the token that `encode(text, bos=True)` puts first, or None for none.

    Raises:
        EngineError: tokens cannot be turned into text one by one.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, bos_id: int | None = None) -> None:
        self._inner = inner
        self._bos = [] if bos_id is None else [bos_id]
        self._added = inner.get_added_tokens_decoder()
        self._cache: dict[int, bytes] = {}
        spelling = Spelling.of(_state(inner.decoder))
        if spelling is None:
            raise EngineError("the tokenizer's decoder is neither ByteLevel nor SentencePiece's")
        self._spelling = spelling
        self._quotation = Quotation(inner)
        self.strips_space: bool = spelling.strips_space
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.longest_token: int | None = self._longest()

    def _longest(self) -> int | None:
        """Bytes of text that one token can stand for; None if there is no bound.

        Text of n bytes has at least n / longest_token tokens, so a hopelessly long one is refused unseen.
        Some normalizers, and added tokens that take the white space around them along, can shorten any text.
        """
        shortens = _shortens(_state(self._inner.normalizer))
        if shortens is None or any(t.lstrip or t.rstrip for t in self._added.values()):
            return None
        spelled = map(self._spelling.longest, self._inner.get_vocab(with_added_tokens=False))
        added = (len(token.content.encode()) for token in self._added.values())
        longest = max((*spelled, *added), default=None)
        return None if longest is None else shortens * longest

    @classmethod
    def from_file(cls, path: Path, *, bos_id: int | None = None) -> Tokenizer:
        """Load a tokenizer.json.

        Raises:
            EngineError: it cannot be read.
        """
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), bos_id=bos_id)
        except Exception as error:  # the library raises bare Exception
            raise EngineError(f"cannot load {path}: {error}") from error

    def encode(self, text: str, *, bos: bool = False, mark: str = "") -> NDArray[np.int32]:
        """The ids of a text, int32 [n]; special tokens written in the text are recognised.

        Args:
            bos: begin with the BOS token, if the model wants one. A chat template writes its own.
            mark: from `quote`: what it interrupts is not recognised.

        Raises:
            BadRequest: the text holds a lone surrogate, which no UTF-8 text does.
        """
        try:
            text.encode()  # what tokenizers does with a surrogate differs from version to version
        except UnicodeEncodeError as error:
            raise BadRequest("the text is not valid Unicode: it holds a lone surrogate") from error
        inner = self._quotation.reader(mark) if mark else self._inner
        ids = inner.encode(text, add_special_tokens=False).ids
        return np.array(self._bos + ids if bos else ids, np.int32)

    def quote(self, texts: Sequence[str]) -> tuple[list[str], str]:
        """Texts in which special tokens are only quoted: `encode` with `mark` takes them for ordinary text.

        Returns:
            The texts, and the mark that was written into them; "" if none holds a special token, and all are
            as they were.

        Raises:
            BadRequest: there is no character left that could be the mark.
        """
        return self._quotation.quote(texts)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text: part of a character, or several; b"" for special and unknown ids."""
        if not 0 <= token < self.vocab_size:
            return b""
        known = self._cache.get(token)
        if known is None:
            known = self._cache[token] = self._spell(token)
        return known

    def piece(self, token: int) -> str:
        """How the vocabulary writes a token; "" for ids that it has not."""
        added = self._added.get(token)
        if added is not None:
            content: str = added.content
            return content
        return self._inner.id_to_token(token) or "" if token >= 0 else ""

    def is_special(self, token: int) -> bool:
        """Whether a token stands for no text."""
        added = self._added.get(token)
        return added is not None and added.special

    def _spell(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            if added.special:
                return b""
            content: str = added.content
            return (content.replace(SPACE, " ") if self._spelling.alphabet == "pieces" else content).encode()
        text = self._inner.id_to_token(token)
        return b"" if text is None else self._spelling.bytes_of(text)


def _state(part: Any) -> Any:
    """A part of a tokenizer, as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _shortens(normalizer: Any) -> int | None:
    """How many times shorter a text's UTF-8 may become; None: no bound."""
    match normalizer:
        case None | {"type": "Prepend"} | {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return 1
        case {"type": "NFC"}:
            return _NFC_SHORTENS
        case {"type": "Sequence", "normalizers": list(steps)}:
            product = 1
            for step in steps:
                times = _shortens(step)
                if times is None:
                    return None
                product *= times
            return product
    return None

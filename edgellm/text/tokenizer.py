"""Text to token ids, and one token id to its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edgellm.errors import BadRequest, EngineError


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (encoder.py, bytes_to_unicode): printable Latin-1 stands for itself, the other
    68 bytes are U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTES: Final = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer.

    Any thread may encode; the work happens without the interpreter's lock. `token_bytes` keeps what it has
    worked out and belongs to one thread.

    Args:
        inner: the loaded tokenizer.json.
        bos_id: the token that `encode(text, bos=True)` puts first, or None for none.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, bos_id: int | None = None) -> None:
        self._inner = inner
        self._bos = [] if bos_id is None else [bos_id]
        self._added = inner.get_added_tokens_decoder()
        self._cache: dict[int, bytes] = {}
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.longest_token: int | None = self._longest()

    def _longest(self) -> int | None:
        """Bytes of text that one token can stand for; None if there is no bound.

        Text of n bytes has at least n / longest_token tokens, so a hopelessly long one is refused unseen. A
        normalizer, or an added token that takes the white space around it along, can shorten any text.
        """
        if self._inner.normalizer is not None or any(t.lstrip or t.rstrip for t in self._added.values()):
            return None
        # In the byte alphabet a character is a byte; an added token is written as it is.
        spelled = map(len, self._inner.get_vocab(with_added_tokens=False))
        return max((*spelled, *(len(token.content.encode()) for token in self._added.values())), default=None)

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

    def encode(self, text: str, *, bos: bool = False) -> NDArray[np.int32]:
        """The ids of a text, int32 [n]; special tokens written in the text are recognised.

        Args:
            bos: begin with the BOS token, if the model wants one. A chat template writes its own.

        Raises:
            BadRequest: the text holds a lone surrogate, which no UTF-8 text does.
        """
        try:
            text.encode()  # what tokenizers does with a surrogate differs from version to version
        except UnicodeEncodeError as error:
            raise BadRequest("the text is not valid Unicode: it holds a lone surrogate") from error
        ids = self._inner.encode(text, add_special_tokens=False).ids
        return np.array(self._bos + ids if bos else ids, np.int32)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text: part of a character, or several; b"" for special and unknown ids."""
        if not 0 <= token < self.vocab_size:
            return b""
        known = self._cache.get(token)
        if known is None:
            known = self._cache[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        text = self._inner.id_to_token(token)
        if text is None:
            return b""
        try:
            return bytes(_BYTES[character] for character in text)
        except KeyError:  # not in the alphabet: a padding entry such as [PAD42]
            return b""

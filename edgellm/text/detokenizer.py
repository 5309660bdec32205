"""Token bytes to text, without ever splitting a character."""

from __future__ import annotations

import codecs


class Detokenizer:
    """Turns one answer's bytes into text as they come.

    Bytes that may be the beginning of a character wait for the rest. Together, all that `push` and `flush`
    return is `bytes.decode("utf-8", errors="replace")` of all that was pushed.

    Args:
        strip_space: leave out a space that is the very first byte: SentencePiece's tokenizers put one in
            front of a text, so what they decode is a text without it.
    """

    def __init__(self, *, strip_space: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = strip_space

    def push(self, data: bytes) -> str:
        """The text that is complete with these bytes."""
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD if the answer stopped inside a character."""
        return self._decoder.decode(b"", final=True)

"""Token bytes to text, without ever splitting a character."""

from __future__ import annotations

import codecs


class Detokenizer:
    """Turns one answer's bytes into text as they come.

    Bytes that may be the beginning of a character wait for the rest. Together, all that `push` and `flush`
    return is `bytes.decode("utf-8", errors="replace")` of all that was pushed.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The text that is complete with these bytes."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end of the text: U+FFFD if the answer stopped inside a character."""
        return self._decoder.decode(b"", final=True)

"""How a tokenizer's tokens spell bytes: what its decoder does, token by token.

An answer is sent as it is made, so each token must have bytes of its own. Two kinds of decoders are of that
kind: GPT-2's byte alphabet, and SentencePiece's pieces with byte fallback.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

SPACE: Final = "▁"
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (encoder.py, bytes_to_unicode): printable Latin-1 stands for itself, the other
    68 bytes are U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_ALPHABET: Final = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class Spelling:
    """How tokens are written.

    Attributes:
        alphabet: GPT-2's bytes, or SentencePiece's pieces.
        byte_fallback: of pieces, whether `<0xE5>` is a byte.
        strips_space: whether a text that was decoded has lost the space in front that encoding put there.
    """

    alphabet: Literal["bytes", "pieces"]
    byte_fallback: bool = False
    strips_space: bool = False

    @classmethod
    def of(cls, decoder: Any) -> Spelling | None:
        """What a `decoder` of tokenizer.json does; None: something that cannot be done token by token."""
        steps = [decoder]
        if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
            steps = decoder.get("decoders") or [None]
        kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
        if kinds == ["ByteLevel"]:
            return cls("bytes")
        writes_spaces = strips = False
        for kind, step in zip(kinds, steps, strict=True):
            match kind, step:
                case "Replace", {"pattern": {"String": "▁"}, "content": " "}:
                    writes_spaces = True
                case "Metaspace", {"replacement": "▁"}:
                    writes_spaces = True
                    strips = step.get("prepend_scheme", "always") != "never"
                case "Strip", {"content": " ", "start": 0 | 1 as start, "stop": 0}:
                    strips = strips or bool(start)
                case (("ByteFallback" | "Fuse"), _):
                    pass
                case _:
                    return None
        if not writes_spaces:
            return None
        return cls("pieces", byte_fallback="ByteFallback" in kinds, strips_space=strips)

    def bytes_of(self, token: str) -> bytes:
        """What a token of the vocabulary adds to a text; b"" for one that is none, such as [PAD42]."""
        if self.alphabet == "bytes":
            try:
                return bytes(BYTE_ALPHABET[character] for character in token)
            except KeyError:
                return b""
        if self.byte_fallback and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(SPACE, " ").encode()

    def longest(self, token: str) -> int:
        """Bytes of a text that become this token, at most: an underscore may have been a space."""
        return len(token) if self.alphabet == "bytes" else len(token.encode())

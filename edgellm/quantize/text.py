"""The text that a quantizer is given: read, cut into sequences, a part of it held out."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from edgellm.errors import UsageError
from edgellm.model.numpy_graph import Tokens
from edgellm.text.tokenizer import Tokenizer

SEQUENCE: Final = 256
"""Tokens that are seen together."""
CALIBRATION_TOKENS: Final = 4096
HELD_OUT_TOKENS: Final = 2048
"""At most so many are used, from all over the text."""
FEWEST_CALIBRATION: Final = 512
FEWEST_HELD_OUT: Final = 64
"""Fewer say nothing about a model."""
HELD_OUT_PART: Final = 0.2
"""Of a calibration text that is not given another text for comparing: its end."""
MOST_BYTES: Final = 1 << 24
"""Of a text file; what comes later is not read."""


def read_text(path: Path, flag: str) -> str:
    """The text of a file, or of its first MOST_BYTES.

    Raises:
        UsageError: it cannot be read, or is not UTF-8; the message names the flag.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror}") from error
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if error.start > MOST_BYTES - 4:  # cut within a character
            return raw[: error.start].decode()
        raise UsageError(f"{flag} {path} is not UTF-8 text, from byte {error.start} on") from error


def split_text(text: str) -> tuple[str, str]:
    """What to calibrate on, and the end that is held out."""
    border = round(len(text) * (1 - HELD_OUT_PART))
    return text[:border], text[border:]


def cut(
    text: str, tokenizer: Tokenizer, *, most: int, fewest: int, longest: int, bos: bool, what: str
) -> Tokens:
    """Sequences of equal length from all over a text, int32 [B, S].

    Args:
        most: tokens in all.
        fewest: tokens that the text must have.
        longest: tokens that the model can attend to.
        bos: whether each begins with the tokenizer's BOS token.
        what: names the text in messages.

    Raises:
        UsageError: the text has fewer tokens.
    """
    tokens = tokenizer.encode(text)
    opening = tokenizer.encode("", bos=True)[:1] if bos else tokens[:0]
    if len(tokens) < fewest:
        raise UsageError(f"{what} has {len(tokens)} tokens; at least {fewest} are needed")
    length = min(SEQUENCE - len(opening), longest - len(opening), len(tokens))
    count = max(1, min(most // length, len(tokens) // length))
    begins = np.linspace(0, len(tokens) - length, count).astype(int).tolist()
    return np.stack([np.concatenate([opening, tokens[begin : begin + length]]) for begin in begins])

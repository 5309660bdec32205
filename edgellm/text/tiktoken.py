"""`qwen.tiktoken`, the vocabulary of Qwen's first generation → `tokenizer.json`.

A line is a token's bytes in base64 and its rank, which is also its id. The special tokens, the pattern that
cuts a text and the normalization to NFC are not in the file but in the model's code (tokenization_qwen.py).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from pathlib import Path
from typing import Final

from edgellm.errors import CheckpointError
from edgellm.text.bpe import PRE_TOKENIZERS, added_token, byte_level_json
from edgellm.text.merges import merges_of
from edgellm.text.spelling import BYTE_ALPHABET

SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)
"""Their ids follow the last rank's."""

_PRE_TOKENIZER: Final = dataclasses.replace(PRE_TOKENIZERS["qwen2"], ignore_merges=True)

CHATML: Final = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What Qwen-7B-Chat was trained on (qwen_generation_utils.py, make_context), which has no chat template."""


def tiktoken_json(raw: bytes, source: Path) -> bytes:
    """The vocabulary as tokenizer.json, UTF-8.

    Args:
        raw: the file.
        source: its path, for messages.

    Raises:
        CheckpointError: a line is none, ranks are not 0, 1, 2, …, or a byte has no token.
    """
    letters = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
    vocabulary: dict[str, int] = {}
    for rank, token in enumerate(_tokens(raw, source)):
        if vocabulary.setdefault("".join(map(letters.__getitem__, token)), rank) != rank:
            raise CheckpointError(f"{source} has token {token!r} twice")
    for byte, letter in letters.items():
        if letter not in vocabulary:
            raise CheckpointError(f"{source} has no token for byte {byte}")
    merges = [f"{left} {right}" for left, right in merges_of(vocabulary, vocabulary)]
    added = [
        added_token(len(vocabulary) + index, token, special=True)
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    return byte_level_json(vocabulary, merges, added, _PRE_TOKENIZER)


def _tokens(raw: bytes, source: Path) -> list[bytes]:
    tokens = []
    for number, line in enumerate(raw.splitlines()):
        try:
            spelled, rank = line.split()
            token, place = base64.b64decode(spelled, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{source}: line {number + 1} is not a token in base64 and its rank"
            ) from error
        if place != number or not token:
            raise CheckpointError(f"{source}: line {number + 1} has rank {place}; ranks should be 0, 1, 2, …")
        tokens.append(token)
    return tokens

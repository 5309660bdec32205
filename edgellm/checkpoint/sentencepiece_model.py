"""`tokenizer.model`: a SentencePiece model, a protobuf message (sentencepiece_model.proto).

Three of its fields matter here, so they are read by hand: neither protobuf nor sentencepiece is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edgellm.checkpoint.safetensors import read_bytes
from edgellm.errors import CheckpointError
from edgellm.text.bpe import NORMAL, USER_DEFINED
from edgellm.text.sentencepiece import Prefix, SentencePieceVocabulary
from edgellm.text.spelling import SPACE

MAX_MODEL_BYTES: Final = 1 << 26

# ModelProto, ModelProto.SentencePiece, TrainerSpec, NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5

_MODEL_TYPES: Final = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_Value = int | bytes


def read_sentencepiece(path: Path, *, legacy: bool, add_bos: bool) -> SentencePieceVocabulary:
    """Read a tokenizer.model.

    Args:
        legacy: as in tokenizer_config.json: a space goes in front after every special token, too.
        add_bos: see `SentencePieceVocabulary`.

    Raises:
        CheckpointError: it is damaged, or not of type BPE, or it normalizes texts.
    """
    raw = read_bytes(path, MAX_MODEL_BYTES)
    try:
        message = list(_fields(raw))
        pieces = [dict(_fields(_bytes(value))) for number, value in message if number == _PIECES]
        tokens = [_bytes(piece.get(_PIECE, b"")).decode() for piece in pieces]
        scores = [_float(piece.get(_SCORE, b"\0\0\0\0")) for piece in pieces]
        types = [_integer(piece.get(_TYPE, NORMAL)) for piece in pieces]
        fields = dict(message)
        trainer = dict(_fields(_bytes(fields.get(_TRAINER, b""))))
        normalizer = dict(_fields(_bytes(fields.get(_NORMALIZER, b""))))
        _refuse(path, trainer, normalizer)
        prefixed = _integer(normalizer.get(_DUMMY_PREFIX, 1))
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}") from error
    if not tokens:
        raise CheckpointError(f"{path} is not a SentencePiece model: it has no pieces")
    for index, kind in enumerate(types):
        if kind == USER_DEFINED:  # matched against a text whose spaces are written as such
            tokens[index] = tokens[index].replace(SPACE, " ")
    prefix: Prefix = "none" if not prefixed else "every" if legacy else "first"
    return SentencePieceVocabulary(
        source=path, tokens=tokens, scores=scores, types=types, prefix=prefix, add_bos=add_bos
    )


def _refuse(path: Path, trainer: dict[int, _Value], normalizer: dict[int, _Value]) -> None:
    """Name what of the model edgellm does not do. Defaults are the .proto's."""
    kind = _integer(trainer.get(_MODEL_TYPE, 1))
    if kind != 2:
        raise CheckpointError(f"{path} is of type {_MODEL_TYPES.get(kind, kind)}; edgellm reads bpe")
    reasons = {
        "writes spaces behind words (treat_whitespace_as_suffix)": trainer.get(_WHITESPACE_AS_SUFFIX, 0),
        "normalizes texts (precompiled_charsmap)": normalizer.get(_CHARSMAP, b""),
        "removes spaces (remove_extra_whitespaces)": normalizer.get(_REMOVE_WHITESPACES, 1),
        "does not write spaces as pieces (escape_whitespaces off)": not normalizer.get(
            _ESCAPE_WHITESPACES, 1
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise CheckpointError(f"{path} {reason}, which edgellm does not support")


def _fields(message: bytes) -> Iterator[tuple[int, _Value]]:
    """(field number, value) of a protobuf message; values of four and eight bytes as they are."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        match key & 7:
            case 0:
                value: _Value
                value, at = _varint(message, at)
            case 1:
                value, at = _take(message, at, 8)
            case 2:
                size, at = _varint(message, at)
                value, at = _take(message, at, size)
            case 5:
                value, at = _take(message, at, 4)
            case wire:
                raise ValueError(f"wire type {wire} at byte {at}")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number without end at byte {at}")


def _take(message: bytes, at: int, size: int) -> tuple[bytes, int]:
    if at + size > len(message):
        raise ValueError(f"it ends inside a field at byte {at}")
    return message[at : at + size], at + size


def _bytes(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text should be")  # noqa: TRY004 - the file's fault
    return value


def _float(value: _Value) -> float:
    number: float = struct.unpack("<f", _bytes(value))[0]
    return number


def _integer(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number should be")  # noqa: TRY004 - the file's fault
    return value

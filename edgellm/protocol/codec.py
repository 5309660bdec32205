"""Bytes to requests, messages to bytes, and what is wrong with bytes that are no request."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgpack
import msgspec

from edgellm.complaint import complaint_of
from edgellm.errors import BadRequest
from edgellm.protocol.fields import VERSION, Id
from edgellm.protocol.replies import Reply
from edgellm.protocol.requests import OPS, Envelope, Generation, Limit, Request, Tokenize

KINDS: dict[str, type[Envelope]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Request)}
"""op → the type of its requests."""

_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_encoder = msgspec.msgpack.Encoder()


def decode_request(payload: bytes | memoryview) -> Request:
    """Decode and validate one request.

    Raises:
        BadRequest: with the field at fault wherever one can be named.
    """
    try:
        request = _decoder.decode(payload)
    except msgspec.ValidationError as error:
        raise _explain(payload, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadRequest(f"the message is not MessagePack: {error}") from None
    if request.v != VERSION:
        raise BadRequest(f"protocol version {request.v} is not spoken here: use {VERSION}", field="v")
    if isinstance(request, Generation):
        _check_finite(request)
    if isinstance(request, Tokenize) and (request.text is None) == (request.messages is None):
        raise BadRequest("give either text or messages", field="text")
    if isinstance(request, Limit) and request.batch_cap is None and request.duty is None:
        raise BadRequest("give batch_cap, duty, or both", field="batch_cap")
    return request


def encode(message: Reply | Request) -> bytes:
    """Encode a message."""
    return _encoder.encode(message)


def peek_id(payload: bytes | memoryview) -> str | int | None:
    """The id of a message that `decode_request` refused, or None if it has none that can be used.

    The map is read key by key and nothing but the id is built, so that neither a huge nor a truncated message
    costs more than a pass over its bytes.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=len(payload) or 1, strict_map_key=False)
    unpacker.feed(payload)
    try:
        for _ in range(unpacker.read_map_header()):
            if unpacker.unpack() == "id":
                id_: str | int = msgspec.convert(unpacker.unpack(), Id)
                return id_
            unpacker.skip()
    except (msgpack.UnpackException, msgspec.ValidationError, ValueError, TypeError, RecursionError):
        pass
    return None


def _lenient(payload: bytes | memoryview) -> dict[Any, Any]:
    try:
        fields = msgspec.msgpack.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, TypeError):
        return {}  # TypeError: of a map whose keys cannot be hashed, which the typed decoder refused sooner
    return fields if isinstance(fields, dict) else {}


def _explain(payload: bytes | memoryview, error: str) -> BadRequest:
    """Turn msgspec's complaint into ours: the field's path, and what would work."""
    op = _lenient(payload).get("op")
    complaint = complaint_of(error, KINDS.get(op, Envelope) if isinstance(op, str) else Envelope)
    path = complaint.path
    if path == "op" and complaint.kind == "value":
        return BadRequest(f"unknown op: use one of {', '.join(OPS)}", field="op")
    if complaint.kind == "unknown":
        near = f"; did you mean {complaint.near}?" if complaint.near else ""
        return BadRequest(f"{op or 'a message'} has no field {path}{near}", field=path)
    if complaint.kind == "missing":
        return BadRequest(f"{path} is missing", field=path)
    if not path:
        return BadRequest(f"a message is a map with v, id and op: {complaint.what}")
    return BadRequest(f"{path}: {complaint.what}", field=path)


def _check_finite(request: Generation) -> None:
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        if not math.isfinite(getattr(request, name)):
            raise BadRequest(f"{name} is not a finite number", field=name)
    for token, bias in request.logit_bias.items():
        if not math.isfinite(bias):
            raise BadRequest(f"logit_bias of token {token} is not a finite number", field="logit_bias")

"""The wire messages, version 1: MessagePack maps, typed and validated. No socket here.

docs/protocol.md is the specification. Requests are told apart by `op`, replies by `ev`. A request that cannot
be decoded raises `BadRequest` with the field at fault; `peek_id` recovers its id so that it can be answered.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

import msgpack
import msgspec
from msgspec import Meta, Struct

from edgellm.complaint import complaint_of
from edgellm.errors import BadRequest, RequestError
from edgellm.sampling import MAX_TOP_LOGPROBS

VERSION = 1
MAX_ID_LENGTH = 128

Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)] | Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Role = Literal["system", "user", "assistant", "tool"]
PriorityName = Literal["critical", "high", "normal", "background"]
Phase = Literal["loading", "ready", "draining"]
StateName = Literal["NORMAL", "THROTTLED", "SHED", "CRITICAL"]
Millis = Annotated[int, Meta(ge=1, le=86_400_000)]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Role
    content: str


class Envelope(Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """What every request has: the protocol version and an id, unique among the connection's open requests."""

    v: int
    id: Id


class Generation(Envelope, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """The fields that `chat` and `generate` share. Sampling fields: see `edgellm.sampling.SamplingParams`.

    Attributes:
        stream: false: exactly one reply. true: accepted, deltas, and one final done or error.
        max_tokens: absent: the configured default or what is left of the slot, whichever is less.
        stop: strings that end the answer; they are not part of it.
        ignore_eos: go on after the model's end-of-turn token.
        priority: a wish; the configuration caps it by uid and gid.
        deadline_ms: from arrival; afterwards the request ends with deadline_exceeded.
    """

    stream: bool = False
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=1024)] = {}
    seed: Annotated[int, Meta(ge=0)] | None = None
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=16)] = []
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    priority: PriorityName = "normal"
    deadline_ms: Millis | None = None


class Chat(Generation, frozen=True, kw_only=True, tag_field="op", tag="chat", forbid_unknown_fields=True):
    """Answer a conversation: the engine's chat template is applied."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]


class Generate(
    Generation, frozen=True, kw_only=True, tag_field="op", tag="generate", forbid_unknown_fields=True
):
    """Continue a text, or token ids as they are."""

    prompt: Annotated[str, Meta(min_length=1)] | Annotated[list[TokenId], Meta(min_length=1)]


class Cancel(Envelope, frozen=True, kw_only=True, tag_field="op", tag="cancel", forbid_unknown_fields=True):
    """End one of this connection's own requests; that one then ends with an error `cancelled`."""

    target: Id


class Tokenize(
    Envelope, frozen=True, kw_only=True, tag_field="op", tag="tokenize", forbid_unknown_fields=True
):
    """Text, or a conversation through the chat template, to token ids. Exactly one of the two."""

    text: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] | None = None


class Status(Envelope, frozen=True, kw_only=True, tag_field="op", tag="status", forbid_unknown_fields=True):
    """Ask for counters and the state of queue and slots."""


class Health(Envelope, frozen=True, kw_only=True, tag_field="op", tag="health", forbid_unknown_fields=True):
    """Ask whether the daemon serves; answered in every phase."""


class Model(Envelope, frozen=True, kw_only=True, tag_field="op", tag="model", forbid_unknown_fields=True):
    """Ask what is being served."""


class Limit(Envelope, frozen=True, kw_only=True, tag_field="op", tag="limit", forbid_unknown_fields=True):
    """Put a ceiling on what runs, in place of an earlier one of the same uid. At least one of cap and duty.

    Attributes:
        batch_cap: requests that advance at once; 0: none.
        duty: share of the time in which steps run; 0: never.
        ttl_ms: the ceiling ends by itself after this time; absent: when it is taken back.
    """

    batch_cap: Annotated[int, Meta(ge=0)] | None = None
    duty: Annotated[float, Meta(ge=0, le=1)] | None = None
    ttl_ms: Millis | None = None


class Suspend(Envelope, frozen=True, kw_only=True, tag_field="op", tag="suspend", forbid_unknown_fields=True):
    """Let nothing run: a limit of 0. What is open keeps its place and its computed tokens."""

    ttl_ms: Millis | None = None


class Resume(Envelope, frozen=True, kw_only=True, tag_field="op", tag="resume", forbid_unknown_fields=True):
    """Take back the limit of this uid, or those of all."""

    all: bool = False


Request = Chat | Generate | Cancel | Tokenize | Status | Health | Model | Limit | Suspend | Resume
OPS = (
    "chat",
    "generate",
    "cancel",
    "tokenize",
    "status",
    "health",
    "model",
    "limit",
    "suspend",
    "resume",
)


class Logprob(Struct, frozen=True):
    """A generated token with its log-probability and the most likely alternatives, [token, logprob] each."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class Usage(Struct, frozen=True):
    """Tokens of a request; cached_tokens of the prompt's were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Times(Struct, frozen=True):
    """Milliseconds: waiting for a slot, from arrival to the first token, from arrival to the end."""

    queue_ms: float | None
    first_token_ms: float | None
    total_ms: float


class Reply(Struct, frozen=True, kw_only=True, tag_field="ev"):
    """What every reply has. `id` is null where the request's id could not be read.

    A reply always has all its fields; what does not apply is null or empty.
    """

    v: int = VERSION
    id: str | int | None


class Accepted(Reply, frozen=True, kw_only=True, tag_field="ev", tag="accepted"):
    """A streaming request has entered the queue, in the class that its peer may have."""

    prompt_tokens: int
    priority: PriorityName


class Delta(Reply, frozen=True, kw_only=True, tag_field="ev", tag="delta"):
    """More of the answer: whole characters, with the ids and log-probabilities of the tokens behind them."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob] = []


class Done(Reply, frozen=True, kw_only=True, tag_field="ev", tag="done"):
    """The end of an answer. `text`, `tokens` and `logprobs` hold the whole answer, streamed or not."""

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Times
    logprobs: list[Logprob] = []
    stop: str | None = None


class Error(Reply, frozen=True, kw_only=True, tag_field="ev", tag="error"):
    """The end of a request that failed. `usage` is there if it had been accepted."""

    code: str
    message: str
    field: str | None = None
    retry_after_ms: int | None = None
    usage: Usage | None = None


class CancelReply(Reply, frozen=True, kw_only=True, tag_field="ev", tag="cancel"):
    """The target was open and is being ended; its own final message comes separately."""

    target: str | int


class TokenizeReply(Reply, frozen=True, kw_only=True, tag_field="ev", tag="tokenize"):
    """Token ids."""

    tokens: list[int]


class HealthReply(Reply, frozen=True, kw_only=True, tag_field="ev", tag="health"):
    """`status`: loading, ready, or draining; `phase` names the start-up phase, `progress` is 0…1 in it."""

    status: Phase
    phase: str
    progress: float


class StatusReply(Reply, frozen=True, kw_only=True, tag_field="ev", tag="status"):
    """Counters since the start, and how things are now. Times in seconds, memory in bytes."""

    status: Phase
    uptime_s: float
    running: int
    queued: int
    slots: int
    batch_cap: int
    clients: int
    requests: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    rss_bytes: int
    state: StateName | None
    reason: str | None
    detail: str | None
    duty: float
    transitions: dict[str, int]
    hottest_zone: str | None
    hottest_c: float | None
    watts: float | None
    available_bytes: int | None


class ModelReply(Reply, frozen=True, kw_only=True, tag_field="ev", tag="model"):
    """What is being served: the engine's name and shape, and the limits a request meets."""

    name: str
    architecture: str
    executor: str
    quantization: str
    vocab_size: int
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    eos_ids: list[int]
    chat_template: bool


class LimitReply(Reply, frozen=True, kw_only=True, tag_field="ev", tag="limit"):
    """What may run now, all limits and causes taken together. `until`, unix seconds: when the limit ends."""

    state: StateName
    reason: str
    detail: str
    batch_cap: int
    duty: float
    until: float | None


class SuspendReply(LimitReply, frozen=True, kw_only=True, tag_field="ev", tag="suspend"):
    """As LimitReply."""


class ResumeReply(LimitReply, frozen=True, kw_only=True, tag_field="ev", tag="resume"):
    """As LimitReply; `until` is null."""


class StateEvent(Reply, frozen=True, kw_only=True, tag_field="ev", tag="state"):
    """Published: the governor's state, or the reason for it, changed. `at`: unix seconds."""

    state: StateName
    previous: StateName
    reason: str
    detail: str
    batch_cap: int
    duty: float
    at: float


class StatsEvent(StatusReply, frozen=True, kw_only=True, tag_field="ev", tag="stats"):
    """Published once a second: what `status` would answer."""


Published = StateEvent | StatsEvent

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


def error_reply(id_: str | int | None, error: RequestError, usage: Usage | None = None) -> Error:
    """The wire form of an error."""
    return Error(
        id=id_,
        code=error.code,
        message=str(error),
        field=error.field,
        retry_after_ms=error.retry_after_ms,
        usage=usage,
    )


def _lenient(payload: bytes | memoryview) -> dict[Any, Any]:
    try:
        fields = msgspec.msgpack.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return {}
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

"""What a client may ask, told apart by `op`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from edgellm.protocol.fields import Id, Millis, PriorityName, Role, TokenId
from edgellm.sampling import MAX_TOP_LOGPROBS


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
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
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

"""What the daemon answers and publishes, told apart by `ev`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edgellm.errors import RequestError
from edgellm.protocol.fields import VERSION, Phase, PriorityName, StateName


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

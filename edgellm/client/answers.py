"""What the daemon answers, as the client's own types; docs/protocol.md has the fields' meanings.

Fields that a newer daemon adds are left out, so that an app need not be updated together with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; cached_tokens of the prompt's were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Milliseconds: waiting for a slot, from arrival to the first token, from arrival to the end."""

    queue_ms: float | None
    first_token_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Logprob:
    """A generated token with its log-probability and the most likely alternatives, (token, logprob) each."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """More of an answer."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob]


@dataclass(frozen=True)
class Answer:
    """A whole answer. `finish_reason` is stop or length; `stop` is the stop string that ended it, or None."""

    text: str
    tokens: list[int]
    finish_reason: str
    stop: str | None
    usage: Usage
    timings: Timings
    logprobs: list[Logprob]


@dataclass(frozen=True)
class Health:
    """`status`: loading, ready or draining; `phase` and `progress` (0…1) say how far loading is."""

    status: str
    phase: str
    progress: float

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        return self.status == "ready"


@dataclass(frozen=True)
class Status:
    """Counters since the daemon's start, and how things are now."""

    status: str
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
    state: str | None
    reason: str | None
    detail: str | None
    duty: float
    transitions: dict[str, int]
    hottest_zone: str | None
    hottest_c: float | None
    watts: float | None
    available_bytes: int | None


@dataclass(frozen=True)
class Statistics(Status):
    """Published once a second: what `status` would answer."""


@dataclass(frozen=True)
class StateChange:
    """Published when the governor's state, or the reason for it, changes; `at` is unix seconds."""

    state: str
    previous: str
    reason: str
    detail: str
    batch_cap: int
    duty: float
    at: float


@dataclass(frozen=True)
class Decision:
    """What may run now, everything taken together; `until`, unix seconds: when the limit ends by itself."""

    state: str
    reason: str
    detail: str
    batch_cap: int
    duty: float
    until: float | None


@dataclass(frozen=True)
class Model:
    """What is being served, and the limits a request meets."""

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


def read(kind: type[T], reply: Mapping[str, Any]) -> T:
    """A flat reply as its type. Raises KeyError where a field is missing."""
    return kind(**{f.name: reply[f.name] for f in fields(kind)})  # type: ignore[arg-type]


def read_delta(reply: Mapping[str, Any]) -> Delta:
    """A `delta`."""
    return Delta(reply["text"], reply["tokens"], _logprobs(reply))


def read_answer(reply: Mapping[str, Any]) -> Answer:
    """A `done`."""
    return Answer(
        text=reply["text"],
        tokens=reply["tokens"],
        finish_reason=reply["finish_reason"],
        stop=reply["stop"],
        usage=read(Usage, reply["usage"]),
        timings=read(Timings, reply["timings"]),
        logprobs=_logprobs(reply),
    )


def _logprobs(reply: Mapping[str, Any]) -> list[Logprob]:
    return [
        Logprob(entry["token"], entry["logprob"], tuple((token, logprob) for token, logprob in entry["top"]))
        for entry in reply["logprobs"]
    ]

"""A request as the scheduler sees it: tokens in, tokens out, one end."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgellm.sampling import SamplingParams


class Priority(enum.IntEnum):
    """Classes of admission, most urgent first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    BACKGROUND = 3


class Finish(enum.Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-turn token, or a stop string that the I/O thread found
    LENGTH = "length"  # max_tokens
    CANCELLED = "cancelled"  # by the client, or because it vanished
    DEADLINE = "deadline_exceeded"
    NOTHING_ALLOWED = "bad_request"  # no token is left that the request allows here
    SHUTDOWN = "shutting_down"
    FAULT = "internal"


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. Immutable: progress is the scheduler's.

    Attributes:
        key: unique among live requests; chosen by whoever adds it.
        prompt: int32 [n], n ≥ 1.
        sampling: see SamplingParams.
        max_tokens: ≥ 1; len(prompt) + max_tokens ≤ max_seq_len.
        stop_ids: tokens that end the request with Finish.STOP; they are reported like any other token.
            Empty with ignore_eos and no stop ids of its own.
        priority: admission order; equal priorities go by deadline, then by arrival.
        deadline: clock seconds after which the request ends with Finish.DEADLINE, or None.
        arrival: clock seconds when the daemon received it.
    """

    key: int
    prompt: NDArray[np.int32]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    arrival: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; log-probabilities only where the request asked for them."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Clock readings of a request's life, in seconds; None for what never happened."""

    arrival: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What happened to a request in one step: new tokens, or its end, or both.

    Every request that was added gets exactly one Update with `finish` set, and none after it.

    Attributes:
        cached_tokens: prompt tokens that were found in a slot and not computed again.
        timings: set with `finish`.
    """

    key: int
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    cached_tokens: int = 0
    timings: Timings | None = None

"""A request that was added and has not been reported as ended: its progress."""

from __future__ import annotations

import math

from edgellm.executor.base import Result
from edgellm.scheduler.request import Finish, Request, Timings, Token, Update
from edgellm.scheduler.slots import Slot


class Sequence:
    """What the scheduler knows of a live request.

    Attributes:
        request: what was asked for.
        rank: orders the queue: priority, deadline, arrival, order of adding.
        slot: None while it waits in the queue, and after its end.
        sampled: tokens whose sampling is scheduled; `completed` of them were collected.
        cached: prompt tokens that were not computed again.
        finish: why it ended, or None.
    """

    __slots__ = (
        "admitted",
        "cached",
        "completed",
        "finish",
        "first_token",
        "prompt_length",
        "rank",
        "request",
        "sampled",
        "slot",
    )

    def __init__(self, request: Request, order: int) -> None:
        deadline = math.inf if request.deadline is None else request.deadline
        self.request = request
        self.rank = (request.priority, deadline, request.arrival, order)
        self.prompt_length = len(request.prompt)
        self.slot: Slot | None = None
        self.sampled = 0
        self.completed = 0
        self.cached = 0
        self.finish: Finish | None = None
        self.admitted: float | None = None
        self.first_token: float | None = None

    def expired(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.request.deadline is not None and now >= self.request.deadline

    def token(self, id_: int, result: Result, index: int) -> Token:
        """The sampled token in row `index` of a result, with what the request wants to know of it."""
        sampling = self.request.sampling
        if not sampling.logprobs:
            return Token(id_)
        ids = result.top_ids[index, : sampling.top_logprobs].tolist()
        logprobs = result.top_logprobs[index, : sampling.top_logprobs].tolist()
        # Of a list: a tuple made of a generator comes from CPython's free list for one size and goes back to
        # that for another, so that thousands of empty ones pile up.
        top = tuple([(other, value) for other, value in zip(ids, logprobs, strict=True) if other >= 0])
        return Token(id_, float(result.logprob[index]), top)

    def update(self, tokens: list[Token], now: float | None) -> Update:
        """What to report: the tokens, and the end if there is one, which came at `now`."""
        if self.finish is None:
            return Update(self.request.key, tokens, None, self.cached)
        timings = Timings(self.request.arrival, self.admitted, self.first_token, now)
        return Update(self.request.key, tokens, self.finish, self.cached, timings)

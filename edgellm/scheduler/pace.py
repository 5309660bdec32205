"""How many tokens fit into a step of bounded time."""

from __future__ import annotations

FIRST_GUESS = 64
"""Tokens fed before anything was measured: some 0.2 s on the slowest machine the project was tried on."""

TELLING = 16
"""Steps that feed fewer tokens say nothing of a prompt token's cost: their fixed cost is most of it."""


class Pace:
    """Turns `max_step_ms` into a token budget, by what recent prefill steps took.

    A step costs about (fixed + tokens × cost). The estimate divides the whole step by its tokens, which
    charges the fixed part to the tokens as well: it errs towards steps that are too short.
    """

    def __init__(self, max_step_s: float, max_num_tokens: int) -> None:
        self._max_step_s = max_step_s
        self._max_num_tokens = max_num_tokens
        self._seconds_per_token: float | None = None

    def budget(self) -> int:
        """Tokens to feed in the next step, 0…max_num_tokens; the scheduler has its own floor."""
        if self._seconds_per_token is None:
            return min(FIRST_GUESS, self._max_num_tokens)
        return min(int(self._max_step_s / self._seconds_per_token), self._max_num_tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take note of a step that fed `tokens` in `seconds`; steps without much prefill say nothing."""
        if tokens < TELLING or seconds <= 0:
            return
        cost = seconds / tokens
        known = self._seconds_per_token
        self._seconds_per_token = cost if known is None else 0.7 * known + 0.3 * cost

"""Prompts of exact length, none like another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import UsageError

PASSAGE = """
The road out of the valley climbs past orchards, a disused quarry and two farms before it reaches the pass.
In winter the plough comes at five, and whoever lives above the bridge waits for its yellow light. Martha
kept a notebook of those mornings: temperature, wind, the first car, what the dog had found. She wrote that
silence has a colour, that snow makes every distance honest, and that machines ought to apologise when they
are wrong. Her brother laughed and repaired engines for a living; he trusted numbers, tools with worn
handles, and weather reports from the harbour. When the survey team arrived with cameras, maps and a small
robot on four wheels, both of them offered coffee. The robot asked nothing. It measured slope, gravel and
shadow, stopped before the ditch, turned twice and rolled back to its box, as careful as an old teacher
crossing ice.
"""
"""Everyday words in any tokenizer: answers to them are text, so that nearly every token makes a delta."""


class Prompts:
    """Draws prompts: words in random order, so that no prompt finds its beginning in a slot by design.

    Args:
        pool: token ids to draw from.
        length: tokens of a prompt.
        shared_prefix: how many of them, at the front, are the same in all prompts.
        seed: the same seed gives the same prompts, which a daemon may still hold from the last run.

    Raises:
        UsageError: the shared prefix leaves nothing that differs.
    """

    def __init__(self, pool: Sequence[int], *, length: int, shared_prefix: int = 0, seed: int) -> None:
        if shared_prefix >= length:
            raise UsageError(
                f"--shared-prefix {shared_prefix} must be shorter than --prompt-tokens {length}:"
                f" at most {length - 1}"
            )
        self._random = np.random.default_rng(seed)
        self._pool = np.unique(np.asarray(pool, dtype=np.int32))
        self._length = length
        self._prefix = self._random.choice(self._pool, shared_prefix)

    def take(self, count: int) -> list[NDArray[np.int32]]:
        """The next `count` prompts, int32 [length] each."""
        rest = self._length - len(self._prefix)
        return [
            np.concatenate((self._prefix, self._random.choice(self._pool, rest))).astype(np.int32)
            for _ in range(count)
        ]

"""The requests of memory_soak.py: all kinds that a daemon may meet, in the shares of a bad day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = {
    "short": 0.33,
    "sampled": 0.20,
    "chat": 0.10,
    "long": 0.01,
    "cancel": 0.08,
    "deadline": 0.03,
    "vanish": 0.05,
    "nonsense": 0.12,
    "too_long": 0.03,
    "ask": 0.05,
}
TABLE_STRIDE = 64
"""Rows of the embedding between two that `every_row` uses: closer than what one page fault brings in."""
OVERSIZED = 2 << 20
OPEN_END = 64
"""Tokens asked for by those who will not wait for them."""


@dataclass(slots=True)
class Wish:
    """A request and what is done with it.

    Attributes:
        kind: for the table.
        fields: of the message, without v and id; None: `raw` is sent as it is.
        cancel: cancel it after the first delta.
        vanish: close its connection at the first reply.
    """

    kind: str
    fields: dict[str, Any] | None = None
    raw: bytes = b""
    cancel: bool = False
    vanish: bool = False


class Mix:
    """Draws requests; the same seed draws the same.

    Args:
        slot: tokens that a slot holds.
        vocabulary: tokens that there are.
    """

    def __init__(self, *, seed: int, slot: int, vocabulary: int) -> None:
        self._chance = np.random.default_rng(seed)
        self._slot = slot
        self._vocabulary = vocabulary
        self._makers: dict[str, Callable[[], Wish]] = {kind: getattr(self, f"_{kind}") for kind in SHARES}

    def wish(self) -> Wish:
        """One request."""
        kind = self._chance.choice(list(SHARES), p=list(SHARES.values()))
        return self._makers[str(kind)]()

    def every_row(self) -> Iterator[Wish]:
        """Prompts that together use every page of the embedding."""
        ids = np.arange(0, self._vocabulary, TABLE_STRIDE)
        length = self._slot - 2
        for start in range(0, len(ids), length):
            yield Wish("row", _generate(ids[start : start + length].tolist(), 2, ignore_eos=True))

    def full_slot(self) -> Wish:
        """A request that takes its slot to the last token."""
        return Wish("full", _generate(self._ids(self._slot - 8), 8, ignore_eos=True))

    def _short(self) -> Wish:
        return Wish("short", _generate(self._ids(self._few(16)), self._few(5)))

    def _sampled(self) -> Wish:
        chance = self._chance
        options: dict[str, Any] = {
            "temperature": float(chance.uniform(0.1, 2)),
            "top_k": int(chance.integers(0, 100)),
            "top_p": float(chance.uniform(0.5, 1)),
            "min_p": float(chance.uniform(0, 0.2)),
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "logit_bias": {int(token): 1.0 for token in chance.integers(0, self._vocabulary, 8)},
            "seed": int(chance.integers(1 << 40)),
            "min_tokens": 1,
            "stream": True,
        }
        options = {name: value for name, value in options.items() if chance.integers(2)}
        return Wish(
            "sampled",
            _generate("Once upon", self._few(5), logprobs=True, top_logprobs=self._few(20), **options),
        )

    def _chat(self) -> Wish:
        words = " ".join(f"word{number}" for number in self._chance.integers(0, 1000, 4))
        fields = {"op": "chat", "messages": [{"role": "user", "content": words}], "max_tokens": self._few(5)}
        return Wish("chat", {**fields, "stream": bool(self._chance.integers(2)), "stop": ["\n", "the"]})

    def _long(self) -> Wish:
        return Wish(
            "long", _generate(self._ids(int(self._chance.integers(16, self._slot - 8))), self._few(5))
        )

    def _cancel(self) -> Wish:
        return Wish("cancel", self._endless(stream=True), cancel=True)

    def _deadline(self) -> Wish:
        return Wish("deadline", self._endless(deadline_ms=self._few(40)))

    def _vanish(self) -> Wish:
        return Wish("vanish", self._endless(stream=True), vanish=True)

    def _too_long(self) -> Wish:
        return Wish("too_long", _generate(self._ids(4), self._slot))

    def _ask(self) -> Wish:
        ops = ({"op": "status"}, {"op": "health"}, {"op": "model"}, {"op": "tokenize", "text": "a b"})
        return Wish("ask", dict(ops[self._chance.integers(len(ops))]))

    def _nonsense(self) -> Wish:
        chance = self._chance
        fields: tuple[dict[str, Any], ...] = (
            {"op": "generate", "prompt": ""},
            {"op": "generate", "prompt": "x", "temperature": -1},
            {"op": "generate", "prompt": "x", "max_tokenz": 1},
            {"op": "generate", "prompt": [self._vocabulary]},
            {"op": "generate", "prompt": "x" * OVERSIZED},
            {"op": "chat", "messages": "none"},
            {"op": f"op{chance.integers(1 << 30)}"},
            {"op": "cancel", "target": int(chance.integers(1 << 30))},
        )
        number = int(chance.integers(len(fields) + 1))
        if number == len(fields):
            return Wish("nonsense", raw=chance.bytes(self._few(4096)))
        return Wish("nonsense", fields[number])

    def _endless(self, **options: Any) -> dict[str, Any]:
        return _generate(self._ids(4), min(OPEN_END, self._slot // 2), ignore_eos=True, **options)

    def _ids(self, count: int) -> list[int]:
        ids: list[int] = self._chance.integers(0, self._vocabulary, count).tolist()
        return ids

    def _few(self, below: int) -> int:
        return int(self._chance.integers(1, below))


def _generate(prompt: str | list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
    return {"op": "generate", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **options}

"""What a benchmark of the bare executor runs, named as llama-bench names it.

pp512            feed a prompt of 512 tokens into an empty slot
pp512 @ d512     the same into a slot that already holds 512 tokens
tg128            generate 128 tokens, one a step, from an empty slot
tg128 @ d512     the same behind 512 tokens; at batch 8 in eight slots at once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edgellm.errors import UsageError

DEFAULT_PROMPT = 512
DEFAULT_GENERATE = 128
DEFAULT_DEPTHS = (0, 512)
DEFAULT_BATCHES = (1, 2, 4, 8)


class Shape(Protocol):
    """What bounds a workload: an engine's build_config, or a loaded executor's info."""

    @property
    def max_batch_size(self) -> int:
        """Rows that may advance in one step."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Tokens in a slot."""
        ...

    @property
    def max_num_tokens(self) -> int:
        """Tokens in a step."""
        ...


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table.

    Attributes:
        kind: `pp` feeds a prompt (prefill), `tg` generates (decode).
        tokens: how many of them in each row.
        depth: tokens that each slot holds before.
        batch: rows advanced together, or prompts fed one behind the other.
    """

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """llama-bench's name of the test."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def total_tokens(self) -> int:
        """Tokens of all rows together: what tokens per second counts."""
        return self.tokens * self.batch

    @property
    def seq_len(self) -> int:
        """Tokens that a slot holds at the end."""
        return self.depth + self.tokens


def parse_counts(text: str, flag: str, *, least: int = 0) -> tuple[int, ...]:
    """Read `1,2,4,8`: whole numbers of at least `least`, each once, in the order given.

    Raises:
        UsageError: naming the flag and the part that is not such a number.
    """
    counts: dict[int, None] = {}
    for part in text.split(","):
        # int() would also take signs, underscores and other scripts' digits.
        word = part.strip()
        if not (word.isascii() and word.isdigit()) or int(word) < least:
            raise UsageError(
                f"{flag} {text}: {word!r} is not a whole number ≥ {least}; write them as in {flag} 1,2,4"
            )
        counts[int(word)] = None
    return tuple(counts)


def compose(
    shape: Shape,
    *,
    prompts: Sequence[int] | None = None,
    generates: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
) -> list[Workload]:
    """Every prompt length at every depth, then every generated length at every depth and batch.

    A prompt is fed alone, as in llama-bench: a step is full with one prompt's chunk whatever else waits. Zero
    among `prompts` or `generates` stands for "none of these". What is None takes the defaults that the engine
    can hold; what was asked for must fit.

    Args:
        shape: what the engine holds.
        prompts: `-p`, tokens.
        generates: `-n`, tokens.
        depths: `-d`, tokens.
        batches: `-b`, rows.

    Raises:
        UsageError: naming the flag that asks for more than the engine holds, and what would fit.
    """
    most = min(shape.max_batch_size, shape.max_num_tokens)
    for batch in batches or ():
        if batch > most:
            raise UsageError(
                f"-b {batch}: the engine advances at most {most} rows at once"
                f" (it was built with --max-batch-size {shape.max_batch_size}"
                f" and --max-num-tokens {shape.max_num_tokens})"
            )
    if batches is None:
        batches = [batch for batch in DEFAULT_BATCHES if batch <= most]
    if depths is None:
        longest = max(*(prompts or (DEFAULT_PROMPT,)), *(generates or (DEFAULT_GENERATE,)))
        depths = [depth for depth in DEFAULT_DEPTHS if depth == 0 or depth + longest <= shape.max_seq_len]
    room = shape.max_seq_len - max(depths)
    if room < 1:
        raise UsageError(
            f"-d {max(depths)}: a slot holds {shape.max_seq_len} tokens, the last one to be measured:"
            f" -d {shape.max_seq_len - 1} is the most"
        )
    lengths = {
        "-p": _lengths("-p", prompts, DEFAULT_PROMPT, room, shape),
        "-n": _lengths("-n", generates, DEFAULT_GENERATE, room, shape),
    }
    prefill = [Workload("pp", tokens, depth) for depth in depths for tokens in lengths["-p"]]
    decode = [
        Workload("tg", tokens, depth, batch)
        for depth in depths
        for tokens in lengths["-n"]
        for batch in batches
    ]
    if not prefill and not decode:
        raise UsageError("-p 0 -n 0: nothing is left to measure")
    return prefill + decode


def _lengths(flag: str, asked: Sequence[int] | None, default: int, room: int, shape: Shape) -> list[int]:
    if asked is None:
        return [min(default, room)]
    for tokens in asked:
        if tokens > room:
            behind = f" behind -d {shape.max_seq_len - room}" if room < shape.max_seq_len else ""
            raise UsageError(
                f"{flag} {tokens}: a slot holds {shape.max_seq_len} tokens,"
                f" so {flag} {room} is the most{behind}"
            )
    return [tokens for tokens in asked if tokens > 0]

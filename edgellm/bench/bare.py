"""The executor by itself, driven as the engine thread drives it: no socket, no scheduler, no text.

Prefill feeds a prompt in chunks of max_num_tokens, several prompts one behind the other so that steps are
full; decode feeds back each sampled token, greedily, one step per token. As many steps are in flight as the
executor takes. Tokens are drawn at random, seeded: what they are does not change what they cost. Time runs
from before the first step is submitted until the last is collected.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.bench.report import Column
from edgellm.bench.statistics import summarize
from edgellm.bench.workloads import Workload
from edgellm.executor.base import FEEDBACK, Executor, Row, Step, Ticket, Want
from edgellm.sampling import SamplingParams

WARM_UP_TOKENS = 16
"""Decode steps before the measured ones; prefill is warmed with one whole prompt."""

GREEDY = SamplingParams(temperature=0.0)

COLUMNS = (
    Column("test", ("test",), right=False),
    Column("batch", ("batch",)),
    Column("tokens/s", ("tokens_per_s_mean", "tokens_per_s_sd"), "{:.2f} ± {:.2f}"),
    Column("median", ("tokens_per_s_median",), "{:.2f}"),
    Column("ms/step", ("step_ms_median",), "{:.2f}"),
)


class BareBench:
    """Runs workloads on a loaded executor.

    Args:
        executor: loaded, and used by nobody else meanwhile.
        clock: seconds, monotonic.
        seed: of the tokens that are fed.
    """

    def __init__(
        self, executor: Executor, *, clock: Callable[[], float] = time.perf_counter, seed: int = 0
    ) -> None:
        self._executor = executor
        self._clock = clock
        self._random = np.random.default_rng(seed)

    def run(self, workload: Workload, repetitions: int) -> list[float]:
        """Warm up, then measure.

        Returns:
            Seconds of each repetition.
        """
        self._fill(workload)
        self._once(workload, tokens=workload.tokens if workload.kind == "pp" else WARM_UP_TOKENS)
        return [self._once(workload) for _ in range(repetitions)]

    def _fill(self, workload: Workload) -> None:
        """Give every slot its `depth` tokens: computed once, copied to the others.

        A step says how many of a slot's tokens it keeps, so every repetition starts behind the same ones.
        """
        if workload.depth:
            self._bind(workload)
            self._pipeline(self._chunks(0, [self._draw(workload.depth)]))
            for slot in range(1, workload.batch):
                self._executor.copy_prefix(0, slot, workload.depth)

    def _once(self, workload: Workload, tokens: int | None = None) -> float:
        count = min(tokens or workload.tokens, workload.tokens)
        self._bind(workload)
        if workload.kind == "pp":
            prompts = [self._draw(count) for _ in range(workload.batch)]
            steps = list(self._chunks(workload.depth, prompts))
        else:
            steps = list(self._decode(workload, count))
        started = self._clock()
        self._pipeline(steps)
        return self._clock() - started

    def _bind(self, workload: Workload) -> None:
        for slot in range(workload.batch):
            self._executor.bind(slot, GREEDY, self._draw(1))

    def _chunks(self, past: int, prompts: Sequence[NDArray[np.int32]]) -> Iterator[Step]:
        """Steps that feed prompt i to slot i, behind `past` tokens."""
        room = self._executor.info.max_num_tokens
        rows: list[Row] = []
        for slot, tokens in enumerate(prompts):
            start = 0
            while start < len(tokens):
                chunk = tokens[start : start + room]
                last = start + len(chunk) == len(tokens)
                rows.append(Row(slot, past + start, chunk, Want.TOKEN if last else Want.NONE))
                start, room = start + len(chunk), room - len(chunk)
                if not room:
                    yield Step(rows)
                    rows, room = [], self._executor.info.max_num_tokens
        if rows:
            yield Step(rows)

    def _decode(self, workload: Workload, count: int) -> Iterator[Step]:
        slots = range(workload.batch)
        # Nothing was sampled for these slots yet that could be fed back.
        yield Step([Row(slot, workload.depth, self._draw(1), Want.TOKEN) for slot in slots])
        for index in range(1, count):
            yield Step([Row(slot, workload.depth + index, FEEDBACK, Want.TOKEN) for slot in slots])

    def _pipeline(self, steps: Iterable[Step]) -> None:
        in_flight: collections.deque[Ticket] = collections.deque()
        for step in steps:
            if len(in_flight) == self._executor.info.pipeline_depth:
                self._executor.collect(in_flight.popleft())
            in_flight.append(self._executor.submit(step))
        while in_flight:
            self._executor.collect(in_flight.popleft())

    def _draw(self, count: int) -> NDArray[np.int32]:
        return self._random.integers(0, self._executor.info.vocab_size, count, dtype=np.int32)


def row_of(workload: Workload, seconds: Sequence[float], max_num_tokens: int) -> dict[str, Any]:
    """The report's row: tokens per second over the repetitions, and how long a step took."""
    rates = summarize([workload.total_tokens / value for value in seconds])
    steps = workload.tokens if workload.kind == "tg" else -(-workload.total_tokens // max_num_tokens)
    return {
        "test": workload.name,
        "kind": workload.kind,
        "tokens": workload.tokens,
        "depth": workload.depth,
        "batch": workload.batch,
        "repetitions": rates.n,
        "tokens_per_s_mean": rates.mean,
        "tokens_per_s_sd": rates.sd,
        "tokens_per_s_median": rates.median,
        "tokens_per_s_min": rates.least,
        "tokens_per_s_max": rates.most,
        "step_ms_median": 1000 * summarize(seconds).median / steps,
    }

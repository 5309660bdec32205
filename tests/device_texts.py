"""Steps of texts, run two in flight, and what their tokens must be: the executors on a device share these."""

from __future__ import annotations

import numpy as np
from fake_device import logits_of
from numpy.typing import NDArray
from tiny_networks import NETWORKS

from edgellm.executor.base import FEEDBACK, NO_TOKEN, Executor, Feedback, Result, Row, Step, Ticket, Want
from edgellm.executor.sampler import Sampler
from edgellm.sampling import SamplingParams

VOCAB = NETWORKS["llama"].vocab_size
GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(temperature=1.3, top_k=60, seed=1234567890123)
BY_HOST = SamplingParams(temperature=1.0, seed=5, frequency_penalty=0.7, logprobs=True, top_logprobs=2)
PENALISED = SamplingParams(
    temperature=1.1,
    seed=77,
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    presence_penalty=0.2,
    logit_bias={3: 4.0, 200: -2.0},
    min_tokens=3,
    suppressed=(2, 9),
)
NOTHING = np.zeros(0, np.int32)


class Expected:
    """What a slot's tokens must be: the same model, and the host's sampler."""

    def __init__(self, params: list[SamplingParams]) -> None:
        self._sampler = Sampler(len(params), VOCAB)
        self.texts: list[list[int]] = [[] for _ in params]
        for slot, each in enumerate(params):
            self._sampler.bind(slot, each, NOTHING)

    def step(self, rows: list[Row], mask: NDArray[np.uint32] | None = None) -> list[int]:
        for row in rows:
            fed = row.tokens
            tokens = [self._sampler.last_token(row.slot)] if isinstance(fed, Feedback) else fed.tolist()
            self.texts[row.slot] = [*self.texts[row.slot][: row.past], *tokens]
        wanted = [row.slot for row in rows if row.want is not Want.NONE]
        if not wanted:
            return []
        logits = np.stack([logits_of(self.texts[slot], VOCAB) for slot in wanted])
        chosen: list[int] = self._sampler.sample(wanted, logits, mask).token.tolist()
        return chosen


def row(slot: int, past: int, tokens: list[int] | Feedback, want: Want = Want.TOKEN) -> Row:
    return Row(slot, past, tokens if isinstance(tokens, Feedback) else np.array(tokens, np.int32), want)


def run(executor: Executor, steps: list[Step]) -> list[Result]:
    """Two steps in flight, as the engine has them."""
    results: list[Result] = []
    tickets: list[Ticket] = []
    for step in steps:
        if len(tickets) == executor.info.pipeline_depth:
            results.append(executor.collect(tickets.pop(0)))
        tickets.append(executor.submit(step))
    return results + [executor.collect(ticket) for ticket in tickets]


def check_a_row_without_a_choice(executor: Executor) -> None:
    """A row that may choose nothing gets no token, which the step behind it feeds back; the others go on."""
    expected = bind(executor, [GREEDY, RANDOM, BY_HOST])
    mask = np.full((3, -(-VOCAB // 32)), 0xFFFFFFFF, np.uint32)
    mask[[0, 2]] = 0
    first = [row(slot, 0, [5 + slot, 6]) for slot in range(3)]
    again = [row(slot, 2, FEEDBACK) for slot in range(3)]
    alone = [row(1, 3, FEEDBACK)]
    results = run(executor, [Step(first, mask), Step(again), Step(alone)])
    assert results[0].token.tolist() == [NO_TOKEN, *expected.step(first[1:2]), NO_TOKEN]
    assert np.isnan(results[0].logprob[[0, 2]]).all()
    assert results[1].token[1:2].tolist() == expected.step(again[1:2])
    assert results[2].token.tolist() == expected.step(alone)


def bind(executor: Executor, params: list[SamplingParams]) -> Expected:
    for slot, each in enumerate(params):
        executor.bind(slot, each, NOTHING)
    return Expected(params)

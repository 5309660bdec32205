"""Steps on a device: tokens that it chose beside the host's sampler, and that steps take no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from figures import Figures
from limited import Say
from loaded import loaded
from numpy.typing import NDArray

from edgellm.checkpoint.random import RandomCheckpoint
from edgellm.checkpoint.random_models import SMALL
from edgellm.cuda.driver import Driver
from edgellm.doctor.static_memory import StaticMemory
from edgellm.executor.base import FEEDBACK, Row, Step, Want
from edgellm.memory.plan import Shape
from edgellm.model.spec import ModelSpec
from edgellm.sampling import SamplingParams

GREEDY: Final = SamplingParams(temperature=0.0)
NOTHING: Final = np.zeros(0, np.int32)
TOKENS: Final = 101
"""Sampled for each request."""

Tokens = NDArray[np.int32]


def check_sampling(
    seed: int,
    say: Say,
    *,
    spec: ModelSpec = SMALL["llama, 6/2 heads of 64, tied"],
    tokens: int = TOKENS,
    open_driver: Callable[[], Driver] = Driver,
) -> bool:
    """Tokens that the device chose beside the host's sampler on the same logits, and two steps in flight."""
    chance = np.random.default_rng(seed)
    checkpoint = RandomCheckpoint(spec, "small", "int4", seed % 1000, 3.0)
    params = [
        GREEDY,
        SamplingParams(temperature=1.0, seed=int(chance.integers(1 << 62))),
        SamplingParams(temperature=0.8, top_k=40, seed=int(chance.integers(1 << 62))),
        SamplingParams(temperature=1.2, top_p=0.9, seed=int(chance.integers(1 << 62))),
        SamplingParams(temperature=1.0, min_p=0.1, seed=int(chance.integers(1 << 62))),
        SamplingParams(
            temperature=0.9,
            seed=int(chance.integers(1 << 62)),
            repetition_penalty=1.2,
            frequency_penalty=0.4,
            presence_penalty=0.3,
            logit_bias={5: 3.0, 17: -4.0},
            min_tokens=8,
            suppressed=(1, 2),
        ),
    ]
    slots = range(len(params))
    with loaded(
        checkpoint, Shape(len(params), tokens + 2, 4 * len(params)), open_driver=open_driver
    ) as executor:

        def run(want: Want, fed: Tokens | None) -> Tokens:
            """So many tokens of each slot, two steps in flight; fed back, or as they are given."""
            for slot, each in enumerate(params):
                executor.bind(slot, each, NOTHING)
            steps = [Step([Row(slot, 0, np.array([slot + 5, 7], np.int32), want) for slot in slots])]
            for n in range(tokens - 1):
                given = [FEEDBACK if fed is None else fed[n, slot : slot + 1] for slot in slots]
                steps.append(Step([Row(slot, 2 + n, given[slot], want) for slot in slots]))
            found, flying = [], []
            for step in steps:
                flying.append(executor.submit(step))
                if len(flying) == 2:
                    found.append(executor.collect(flying.pop(0)).token)
            return np.stack(found + [executor.collect(ticket).token for ticket in flying])

        # Who wants logits has its token from the host.
        expected = run(Want.LOGITS, None)
        single = (run(Want.TOKEN, expected) == expected).mean(axis=0)
        chained = (run(Want.TOKEN, None) == expected).mean(axis=0)
    for slot, each in enumerate(params):
        say(
            f"- temperature {each.temperature}, top_k {each.top_k}, top_p {each.top_p}, min_p {each.min_p}"
            f"{', penalties and biases' if each.counts_tokens else ''}: "
            f"of {tokens} tokens {single[slot]:.1%} as the host's sampler, fed back {chained[slot]:.1%}"
        )
    # A token differs where u is within rounding of a border between two.
    return bool((single > 0.97).all() and chained[0] == 1)


def check_memory(
    seed: int, say: Say, figures: Figures, *, open_driver: Callable[[], Driver] = Driver
) -> bool:
    """Device memory after READY: nothing is allocated by steps of any kind."""
    checkpoint = RandomCheckpoint(SMALL["qwen3, 8/2 heads of 128, head norms"], "small", "int4", seed % 1000)
    with loaded(checkpoint, Shape(8, 512, 256), open_driver=open_driver) as executor:
        memory = StaticMemory(executor.driver)
        for slot in range(8):
            executor.bind(slot, GREEDY, NOTHING)
        for count in (1, 3, 8):
            for length in (1, 2, 17, 60, 128):
                rows = [
                    Row(slot, 0, np.ones(length, np.int32), Want.LOGITS if slot % 2 else Want.TOKEN)
                    for slot in range(min(count, 256 // length))
                ]
                executor.collect(executor.submit(Step(rows)))
                executor.copy_prefix(0, 7, length)
        taken = memory.taken()
    say(f"- 15 kinds of steps and copies: {taken}")
    figures.add("bytes taken after READY", max(taken.asked, taken.gone or 0))
    return taken.nothing

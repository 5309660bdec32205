"""What gpu_check compares with: its reference is the network, however its texts come in."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edgellm.checkpoint.random import RandomCheckpoint
from edgellm.checkpoint.random_models import SMALL
from edgellm.doctor.proof import prove
from edgellm.doctor.reference import compute_reference
from edgellm.executor.base import ExecutorInfo, Row, Step, Want
from edgellm.model.weights import Dense, Weight

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from network_checks import MAX_MEAN_KL
from reference import NumpyExecutor
from reference_decoder import reference_logits


def small(name: str) -> RandomCheckpoint:
    spec = msgspec.structs.replace(SMALL[name], num_hidden_layers=1, vocab_size=99)
    return RandomCheckpoint(spec, name, "int4", 7, 2.0)


def info_of(checkpoint: RandomCheckpoint) -> ExecutorInfo:
    return ExecutorInfo("numpy", 3, 40, 40, checkpoint.spec.vocab_size, 0)


def run(executor: NumpyExecutor, *rows: Row) -> NDArray[np.float32]:
    logits = executor.collect(executor.submit(Step(rows))).logits
    assert logits is not None
    return logits


def row(slot: int, past: int, tokens: list[int], want: Want = Want.LOGITS) -> Row:
    return Row(slot, past, np.array(tokens, np.int32), want)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("announced", [False, True])
def test_the_reference_is_the_network(name: str, announced: bool) -> None:
    checkpoint = small(name)
    executor = NumpyExecutor(checkpoint, info_of(checkpoint))
    text = [5, 17, 98, 0, 3, 3, 44]
    expected = reference_logits(checkpoint, text)
    if announced:
        executor.announce([np.array(text, np.int32)])
    run(executor, row(1, 0, text[:3], Want.LOGITS))
    executor.copy_prefix(1, 0, 3)
    first = run(executor, row(0, 3, text[3:5]), row(1, 3, text[3:4]))
    np.testing.assert_allclose(first, expected[[4, 3]], rtol=0, atol=2e-4)
    np.testing.assert_allclose(run(executor, row(0, 5, text[5:]))[0], expected[6], rtol=0, atol=2e-4)
    # A slot that goes back keeps what it is told to keep.
    np.testing.assert_allclose(run(executor, row(0, 2, text[2:4]))[0], expected[3], rtol=0, atol=2e-4)


class Wrong(RandomCheckpoint):
    """The same network, but for one weight of one matrix in the last layer."""

    def tensor(self, name: str) -> Weight:
        weight = super().tensor(name)
        if not name.endswith("mlp.up_proj"):
            return weight

        def read(begin: int, end: int) -> NDArray[np.float32]:
            values: NDArray[np.float32] = weight.dequantize(begin, end).copy()
            if begin <= 4 < end:
                values[4 - begin] += 0.5
            return values

        return Dense(name, weight.shape, "f32", read)


def test_the_threshold_tells_a_single_wrong_row_from_rounding() -> None:
    right = small("llama, 6/2 heads of 64, tied")
    wrong = Wrong(right.spec, right.name, right.quant, right.seed, right.sharpness)
    chance = np.random.default_rng(3)
    prompts = [chance.integers(0, 99, 24, dtype=np.int32) for _ in range(3)]
    for tested, passes in ((right, True), (wrong, False)):
        executors = [NumpyExecutor(each, info_of(each)) for each in (tested, right)]
        cases = []
        for case in prove(executors[0], compute_reference(executors[1], prompts)):
            cases.append(case)
            if case.name == "ragged batches":
                break  # what follows feeds back tokens that the reference does not sample
        assert all(case.mean_kl <= MAX_MEAN_KL for case in cases) == passes

"""Sampling on a device: the host's sampler chooses the same tokens, or u falls on a border.

python tools/gpu/sample_checks.py [--bench]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from runner import Runner

from edgellm.cuda.launch import At, Launch
from edgellm.executor.philox import uniform
from edgellm.executor.sampler import Sampler
from edgellm.kernels.adjust import AdjustmentsShape, adjustments_state
from edgellm.kernels.rows import ROW, WANTS_TOKEN
from edgellm.kernels.sample import (
    CHOSEN,
    FOR_HOST,
    NONE,
    NOT_FINITE,
    NOTHING_LEFT,
    SAMPLED,
    SAMPLING,
    sample,
    sample_workspace,
    sampling_state,
)
from edgellm.sampling import SamplingParams

Array = NDArray[Any]

VOCABULARIES: Final = (50, 1000, 4099, 49152, 151936)
BORDER: Final = 2e-5
"""How near to a border u must be where the two differ, as a share of all probability that is kept."""

PARAMS: Final = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": True},
    {"temperature": 1.0},
    {"temperature": 1.0, "logprobs": True},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 3000, "top_p": 0.99, "min_p": 1e-4},
    {"temperature": 4.0, "top_p": 0.8},
    {"temperature": 50.0, "top_p": 0.5},
    {"temperature": 1e-6, "top_p": 0.9},
    {"temperature": 1e-40},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 2.0, "top_k": 100000},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "logprobs": True},
)


def logits_of(rng: np.random.Generator, kind: str, rows: int, vocab: int) -> NDArray[np.float32]:
    """Rows of logits: as a model's, with many equal ones, with few that can be."""
    x: NDArray[np.float32] = rng.standard_normal((rows, vocab), np.float32) * np.float32(2.5)
    if kind == "peaked":
        x[np.arange(rows)[:, None], rng.integers(0, vocab, (rows, 8))] += np.float32(12)
    elif kind == "equal":
        x = np.round(x)
    elif kind == "few":
        x[rng.random((rows, vocab)) < 0.97] = -np.inf
        x[:, vocab // 2] = 0.5
    return x


class Batch:
    """Rows with their slots' state, run on the device."""

    def __init__(
        self, runner: Runner, params: list[SamplingParams], vocab: int, *, adjusting: bool = False
    ) -> None:
        self._runner, self._vocab = runner, vocab
        self.rows = np.zeros(len(params), ROW)
        # Slots are not in the rows' order.
        self.rows["slot"], self.rows["flags"] = np.arange(len(params))[::-1], WANTS_TOKEN
        self.sampling = np.zeros(len(params), SAMPLING)
        for row, each in zip(self.rows, params, strict=True):
            self.sampling[row["slot"]] = sampling_state(each, adjusting=adjusting)
        self.last = np.full(len(params), -7, "<i4")
        self._workspace = np.full(sample_workspace(vocab, rows=len(params)), 0xFF, np.uint8)
        self._workspace[: sample_workspace(vocab, rows=0)] = 0

    def arrays(self, logits: NDArray[np.float32]) -> dict[str, Array]:
        """Buffers by name."""
        count = len(self.rows)
        return {
            "rows": self.rows,
            "sampling": self.sampling,
            "logits": logits,
            "last": self.last,
            "results": np.full(count, -1, SAMPLED),
            "workspace": self._workspace,
        }

    def launches(self, adjusted: AdjustmentsShape | None = None) -> list[Launch]:
        """Sampling over buffers of these names, and of `adjustments` of a shape, if there are any."""
        return sample(
            adjusted or AdjustmentsShape(self._vocab, 64),
            rows=len(self.rows),
            device=self._runner.device,
            rows_at=At("rows"),
            sampling=At("sampling"),
            adjustments=At("adjustments") if adjusted else None,
            logits=At("logits"),
            last_token=At("last"),
            results=At("results"),
            workspace=At("workspace"),
        )

    def take(self, after: dict[str, Array]) -> dict[str, Array]:
        """Go on from what a step left, counters among it."""
        self._workspace = after["workspace"]
        self.sampling, self.last = after["sampling"], after["last"]
        return after

    def run(self, logits: NDArray[np.float32]) -> Array:
        """One step; gives the rows' results and advances the slots."""
        return self.take(self._runner.run(self.launches(), self.arrays(logits)))["results"]


def distance_to_border(
    logits: NDArray[np.float32], params: SamplingParams, index: int, tokens: set[int]
) -> float:
    """How far u, or a threshold, is from the border between two tokens: by float64's arithmetic.

    The kept set of float64 is made; tokens of which one is not in it differ by a threshold, which is then
    compared with the sum or the weight that it is about.
    """
    x = logits.astype(np.float64)
    s = (x - x.max()) / max(params.temperature, 1e-30)
    w = np.exp(s)
    order = np.lexsort((np.arange(len(x)), -s))
    nearest = np.inf
    if 0 < params.top_k < len(x):
        order = order[: params.top_k]
    if params.top_p < 1:
        ends = w[order].cumsum()
        ends /= ends[-1]
        size = int(ends.searchsorted(params.top_p)) + 1
        nearest = min(nearest, float(np.abs(ends - params.top_p).min()))
        order = order[:size]
    if params.min_p > 0:
        nearest = min(nearest, float(np.abs(w[order] - params.min_p).min()))
        order = order[w[order] >= params.min_p]
    kept = np.sort(order)
    ends = w[kept].cumsum()
    ends /= ends[-1]
    if tokens <= set(kept.tolist()):
        nearest = min(nearest, float(np.abs(ends - uniform(params.seed, index)).min()))
    return nearest


def check_against_host(
    runner: Runner,
    rng: np.random.Generator,
    vocabularies: Sequence[int] = VOCABULARIES,
    kinds: Sequence[str] = ("model", "peaked", "equal", "few"),
) -> Iterator[tuple[str, bool]]:
    """Four steps of every kind of request over every kind of row."""
    for vocab in vocabularies:
        for kind in kinds:
            params = [
                SamplingParams(seed=int(rng.integers(0, 2**64, dtype=np.uint64)), **each)  # type: ignore[arg-type]
                for each in PARAMS
            ]
            batch, host = Batch(runner, params, vocab), Sampler(len(params), vocab)
            for slot, each in enumerate(params):
                host.bind(slot, each, np.zeros(1, np.int32))
            same = differ = 0
            worst = off = 0.0
            good = True
            for step in range(4):
                logits = logits_of(rng, kind, len(params), vocab)
                got, wanted = batch.run(logits), host.sample(range(len(params)), logits)
                good &= bool((got["status"] == CHOSEN).all() and (got["index"] == step).all())
                good &= bool((batch.last[batch.rows["slot"]] == got["token"]).all())
                for i, each in enumerate(params):
                    a, b = int(got["token"][i]), int(wanted.token[i])
                    same += a == b
                    if a != b:
                        differ += 1
                        worst = max(worst, distance_to_border(logits[i], each, step, {a, b}))
                    elif each.logprobs:
                        off = max(off, abs(float(got["logprob"][i]) - float(wanted.logprob[i])))
                    good &= bool(np.isnan(got["logprob"][i])) != each.logprobs
            good &= worst <= BORDER and off <= 1e-4 and differ <= 2
            line = f"sample {kind:6s} of {vocab:6d}: {same} the same, {differ} differ by {worst:.1e}, "
            yield line + f"log {off:.1e} {'ok' if good else 'FAIL'}", good


ADJUSTED_VOCABULARIES: Final = ((50, 0.0), (4099, 9.0), (151936, 9.0))
"""And how much likelier some tokens are."""
ADJUSTED: Final = (
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "repetition_penalty": 0.7, "presence_penalty": 0.5, "top_p": 0.9},
    {"temperature": 1.0, "frequency_penalty": 0.9, "top_k": 20},
    {"temperature": 0.0, "frequency_penalty": 3.0, "presence_penalty": -1.0},
    {"temperature": 1.0, "logit_bias": {3: 9.0, 7: -1e38, 11: 4.0}},
    {"temperature": 0.0, "logit_bias": {2: 1.0, 5: 1e38}, "min_tokens": 3, "suppressed": (5, 9)},
    {"temperature": 1.0, "min_tokens": 2, "suppressed": (1, 2, 3), "presence_penalty": 2.0},
    {"temperature": 0.7, "top_p": 0.9},
)


def check_adjusted(
    runner: Runner,
    rng: np.random.Generator,
    vocabularies: Sequence[tuple[int, float]] = ADJUSTED_VOCABULARIES,
) -> Iterator[tuple[str, bool]]:
    """Biases, tokens that may not come yet and penalties over a dozen steps, beside the host's sampler."""
    for vocab, peak in vocabularies:
        params = [
            SamplingParams(seed=int(rng.integers(0, 2**64, dtype=np.uint64)), **each) for each in ADJUSTED
        ]
        count, shape = len(params), AdjustmentsShape(vocab, 64)
        batch, host = Batch(runner, params, vocab, adjusting=True), Sampler(count, vocab, max_seq_len=64)
        adjustments = np.zeros(count, shape.dtype)
        for row, each in enumerate(params):
            prompt = rng.integers(0, min(vocab, 60), 30).astype(np.int32)
            host.bind(row, each, prompt)
            adjustments[batch.rows["slot"][row]] = adjustments_state(shape, each, prompt)
        differ, worst, good = 0, 0.0, True
        for step in range(12):
            logits = logits_of(rng, "model", count, vocab)
            # The same few tokens are likely, so that they come again.
            logits[:, : min(vocab, 40)] += np.float32(peak)
            arrays = batch.arrays(logits) | {"adjustments": adjustments}
            after = batch.take(runner.run(batch.launches(shape), arrays))
            adjustments, got = after["adjustments"], after["results"]
            wanted = host.sample(range(count), logits)
            good &= bool((got["status"] == CHOSEN).all() and (got["index"] == step).all())
            for row, each in enumerate(params):
                a, b = int(got["token"][row]), int(wanted.token[row])
                if a != b:
                    differ += 1
                    worst = max(worst, distance_to_border(after["logits"][row], each, step, {a, b}))
                    good &= worst <= BORDER and each.temperature > 0
            if differ:  # from here on the two have seen different tokens
                break
        yield f"adjusted of {vocab}: {differ} differ by {worst:.1e} {'ok' if good else 'FAIL'}", good


def check_emptied(runner: Runner, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    """Where a request holds back all that there is, its row alone says so, and nothing has changed."""
    vocab, held = 300, (7, 290)
    shape = AdjustmentsShape(vocab, 64)
    for temperature in (0.0, 1.0):
        emptied = SamplingParams(temperature=temperature, seed=3, min_tokens=2, suppressed=held)
        params = [emptied, SamplingParams(temperature=temperature, seed=4, presence_penalty=1.0)]
        batch = Batch(runner, params, vocab, adjusting=True)
        adjustments = np.zeros(2, shape.dtype)
        for row, each in enumerate(params):
            state = adjustments_state(shape, each, np.zeros(0, np.int32))
            adjustments[batch.rows["slot"][row]] = state
        logits = logits_of(rng, "model", 2, vocab)
        logits[0, [token for token in range(vocab) if token not in held]] = -np.inf
        arrays = batch.arrays(logits) | {"adjustments": adjustments}
        after = runner.run(batch.launches(shape), arrays)
        got, slot = after["results"], batch.rows["slot"][0]
        good = got["status"].tolist() == [NOTHING_LEFT, CHOSEN] and got["token"][0] == -1
        good = bool(good and after["last"][slot] == -7 and after["sampling"][slot] == batch.sampling[slot])
        yield (
            f"emptied at temperature {temperature}: {got['status'].tolist()} {'ok' if good else 'FAIL'}",
            good,
        )


def check_distribution(
    runner: Runner, rng: np.random.Generator, steps: int = 40
) -> Iterator[tuple[str, bool]]:
    """Many seeds on one row: a chi-squared test of how often each token comes."""
    vocab, rows = 300, 512
    logits = np.repeat(logits_of(rng, "model", 1, vocab), rows, 0)
    for temperature in (1.0, 3.0):
        params = [
            SamplingParams(temperature=temperature, seed=int(rng.integers(0, 2**64, dtype=np.uint64)))
            for _ in range(rows)
        ]
        batch = Batch(runner, params, vocab)
        counts = np.zeros(vocab)
        for _ in range(steps):
            counts += np.bincount(batch.run(logits)["token"], minlength=vocab)
        p = np.exp(logits[0].astype(np.float64) / temperature)
        p *= rows * steps / p.sum()
        order = np.argsort(-p)
        counts, p = counts[order], p[order]
        # Rare tokens are one class.
        common = p >= 10
        counts = np.append(counts[common], counts[~common].sum())
        p = np.append(p[common], max(p[~common].sum(), 1e-9))
        chi, freedom = float(((counts - p) ** 2 / p).sum()), len(p) - 1
        z = (chi - freedom) / np.sqrt(2 * freedom)
        yield (
            f"distribution at temperature {temperature}: z {z:.2f} {'ok' if abs(z) < 5 else 'FAIL'}",
            abs(z) < 5,
        )


def check_status(runner: Runner, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    """What is not finite is told, wherever it is; what nobody wants is left alone; the host's rows, too."""
    vocab = 4099
    kinds = (np.nan, np.inf, -np.inf)
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature, seed=5, logprobs=True)] * 6
        params[5] = SamplingParams(temperature=temperature, presence_penalty=1.0)
        batch = Batch(runner, params, vocab)
        batch.rows["slot"][3], batch.rows["flags"][4] = -1, 0
        before = batch.sampling.copy()
        logits = logits_of(rng, "model", 6, vocab)
        for row, value in enumerate(kinds):
            logits[row, slice(None) if value == -np.inf else int(rng.integers(vocab))] = value
        got = batch.run(logits)
        wanted = [NOT_FINITE, NOT_FINITE, NOT_FINITE, NONE, NONE, FOR_HOST]
        good = got["status"].tolist() == wanted and (got["token"] == -1).all() and (batch.last == -7).all()
        good = bool(good and (batch.sampling == before).all())
        yield (
            f"status at temperature {temperature}: {got['status'].tolist()} {'ok' if good else 'FAIL'}",
            good,
        )


def bench(runner: Runner) -> Iterator[str]:
    """µs over 151,936 logits."""
    rng = np.random.default_rng(0)
    vocab = 151936
    for rows in (1, 16):
        for each in (PARAMS[0], PARAMS[2], PARAMS[4], PARAMS[5], PARAMS[7], PARAMS[8], PARAMS[9], PARAMS[10]):
            params = [SamplingParams(seed=i, **each) for i in range(rows)]  # type: ignore[arg-type]
            batch = Batch(runner, params, vocab)
            arrays, launches = batch.arrays(logits_of(rng, "peaked", rows, vocab)), batch.launches()
            with runner.buffers(arrays):
                # One in a graph; an empty one's time is in it.
                us = runner.time(launches * 10, early=False) / 10
            yield f"sample rows {rows:2d} {each}: {us:7.2f} µs"


def main() -> int:
    """Print a line for each check, then the benchmark if asked for; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", action="store_true", help="also measure")
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    runner = Runner()
    rng = np.random.default_rng(arguments.seed)
    failed = checked = 0
    for check in (check_status, check_against_host, check_adjusted, check_emptied, check_distribution):
        for line, good in check(runner, rng):
            print(line, flush=True)
            checked += 1
            failed += not good
    print(f"{checked} checks, {failed} failed", flush=True)
    if arguments.bench:
        for line in bench(runner):
            print(line, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

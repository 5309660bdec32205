"""A group of kernels at the smallest shapes that take every way through them: what a sanitizer is run on.

python tools/gpu/sanitized.py GROUP [--seed N]

Each kernel is named once it has run, so that what a run that was cut off covered is known. Results are
compared where that costs nothing; that they are right on real shapes is for the other programs here to show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import attention_checks as attention
import feed_checks as feed
import linear_checks as linear
import moe_checks as moe
import msgspec
import numpy as np
import sample_checks as sampling
from loaded import loaded
from runner import Arrays, Runner, poisoned

from edgellm.checkpoint.random import RandomCheckpoint
from edgellm.checkpoint.random_models import SMALL
from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Device, Kernel, Launch
from edgellm.executor.base import FEEDBACK, Row, Step, Want
from edgellm.kernels.adjust import AdjustmentsShape, adjustments_state
from edgellm.kernels.attention_decode import decode_workspace
from edgellm.kernels.attention_prefill import prefill_attention_workspace
from edgellm.kernels.attention_shape import COUNTERS_BYTES
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.kernels.sample import CHOSEN
from edgellm.memory.plan import Shape
from edgellm.sampling import SamplingParams

RAN: Final = "ran: "
"""In front of a kernel's name."""
FEW: Final = 4
"""Multiprocessors that launches are cut for: fewer blocks, and several pieces of work for each."""

LINEARS: Final = (
    linear.Case("small qkv", 48, 192, 4, 32, "offset", "store", True),
    linear.Case("small o", 32, 256, 4, 64, "zero_point", "residual", False, True),
    linear.Case("small gate-up", 32, 256, 4, 128, "centred", "swiglu", True),
    linear.Case("small head", 67, 128, 8, 32, "none", "logits", True),
    linear.Case("small dense", 48, 128, 16, 64, "none", "store", True, True),
)
MIXTURES: Final = (
    moe.Layer("small, 4 bits", 6, 2, True, 128, 64, 4, 32, "zero_point"),
    moe.Layer("small, 8 bits", 3, 3, False, 64, 64, 8, 16, "none"),
)


class Naming(Runner):
    """A device cut small, which names each kernel once it has run."""

    def __init__(self, driver: Driver | None = None, compiler: Any = None) -> None:
        super().__init__(driver, compiler)
        self.device: Device = replace(self.device, multiprocessors=FEW)
        self._named: set[Kernel] = set()

    def run(self, launches: Sequence[Launch], arrays: Arrays, *, early: bool = True) -> dict[str, Any]:
        """As `Runner.run`."""
        after = super().run(launches, arrays, early=early)
        for launch in launches:
            if launch.kernel not in self._named:
                self._named.add(launch.kernel)
                print(f"{RAN}{launch.kernel.expression}", flush=True)
        return after


def run_linear(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Decode linears: every epilogue, kind of weights, and way to part the columns."""
    for case in LINEARS:
        matrix = linear.make_matrix(rng, case)
        for rows in (1, 8):
            for cut in linear.cuts(matrix.shape, rows, runner.device):
                yield from linear.check(runner, rng, case, matrix, rows=rows, cut=cut)


def run_gemm(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Prefill linears: every epilogue, a chunk that is nearly full and one that is nearly empty."""
    for case in LINEARS:
        if case.epilogue == "logits":
            continue
        matrix = linear.make_matrix(rng, case)
        for tokens, count in ((32, 3), (64, 60)):
            yield from linear.check_prefill(runner, rng, case, matrix, tokens=tokens, count=count, tile=None)


def _attention_layers(rng: np.random.Generator) -> Iterator[attention.Layer]:
    for int8, norm in ((False, True), (True, False)):
        yield attention.Layer(rng, attention.shape(4, 2, 64, 256, int8=int8, norm=norm), 3)


def run_attention_decode(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Dealt, and in clusters where the device has them; long rows, short ones and nobody's."""
    for layer in _attention_layers(rng):
        table = np.zeros(3, ROW)
        table["slot"], table["past"] = (1, -1, 0), (layer.shape.max_seq - 1, 0, 5)
        qkv = rng.standard_normal((3, layer.shape.qkv_width), np.float32).astype("<f2")
        for sm in dict.fromkeys((87, runner.device.sm)):
            device = replace(runner.device, sm=sm, multiprocessors=132 if sm >= 90 else FEW)
            workspace = np.full(decode_workspace(layer.shape, rows=3, device=device), 0xFF, np.uint8)
            workspace[:COUNTERS_BYTES] = 0
            arrays = layer.arrays() | {"rows": table, "qkv": qkv, "workspace": workspace}
            arrays["out"] = poisoned((3, layer.shape.heads * layer.shape.head_size), "<f2")
            after = runner.run(attention.decode_launches(layer.shape, layer, 3, device), arrays)
            if not np.isfinite(after["out"][[0, 2]]).all():
                yield f"{attention.describe(layer.shape)}, cut for sm_{sm}: not finite"


def run_attention_prefill(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Chunks at the start and in the middle of a slot."""
    for layer in _attention_layers(rng):
        for tokens, count, past in ((16, 9, 0), (32, 32, 70)):
            chunk = np.zeros(1, CHUNK)
            chunk["slot"], chunk["past"], chunk["count"] = 1, past, count
            qkv = rng.standard_normal((tokens, layer.shape.qkv_width), np.float32).astype("<f2")
            arrays = layer.arrays() | {"chunk": chunk, "qkv": qkv}
            arrays["out"] = poisoned((tokens, layer.shape.heads * layer.shape.head_size), "<f2")
            size = prefill_attention_workspace(layer.shape, tokens=tokens, device=runner.device)
            arrays["workspace"] = np.zeros(max(size, COUNTERS_BYTES), np.uint8)
            launches = attention.prefill_launches(layer.shape, layer, tokens, runner.device)
            after = runner.run(launches, arrays)
            if not np.isfinite(after["out"][:count]).all():
                yield f"{attention.describe(layer.shape)}, {count} tokens at {past}: not finite"


def run_elementwise(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Embeddings, norms, permutations, the last row; a plan's inputs."""
    for check in (attention.check_elementwise, feed.check_rows, feed.check_chunk):
        for line, good in check(runner, rng):
            if not good:
                yield line


def run_sample(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Sampling by sorting and by histogram; biases and penalties."""
    vocabulary = 1000
    params = [SamplingParams(seed=i, **each) for i, each in enumerate(sampling.PARAMS[:12])]  # type: ignore[arg-type]
    for kind in ("model", "equal"):
        batch = sampling.Batch(runner, params, vocabulary)
        got = batch.run(sampling.logits_of(rng, kind, len(params), vocabulary))
        if (got["status"] != CHOSEN).any():
            yield f"sample {kind}: {got['status'].tolist()}"
    yield from _run_adjusted(runner, rng)


def _run_adjusted(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Twice, so that tokens come again."""
    vocabulary = 300
    params = [SamplingParams(seed=i, **each) for i, each in enumerate(sampling.ADJUSTED)]  # type: ignore[arg-type]
    shape = AdjustmentsShape(vocabulary, 64)
    batch = sampling.Batch(runner, params, vocabulary, adjusting=True)
    adjustments = np.zeros(len(params), shape.dtype)
    for row, each in enumerate(params):
        prompt = rng.integers(0, 60, 30).astype(np.int32)
        adjustments[batch.rows["slot"][row]] = adjustments_state(shape, each, prompt)
    for _ in range(2):
        logits = sampling.logits_of(rng, "model", len(params), vocabulary)
        arrays = batch.arrays(logits) | {"adjustments": adjustments}
        after = runner.run(batch.launches(shape), arrays)
        adjustments = batch.take(after)["adjustments"]
        if (after["results"]["status"] != CHOSEN).any():
            yield f"adjust: {after['results']['status'].tolist()}"


def run_moe(runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """Mixtures of experts: rows, and a chunk."""
    for layer in MIXTURES:
        weights = moe.Experts(rng, layer)
        for tokens, chunk in ((1, False), (8, False), (32, True)):
            yield from moe.check(runner, rng, weights, moe.Step(layer, tokens, chunk, None))


def run_steps(_runner: Runner, rng: np.random.Generator) -> Iterator[str]:
    """A whole network of one layer: graphs, two steps in flight, copies."""
    spec = msgspec.structs.replace(SMALL["qwen3, 8/2 heads of 128, head norms"], num_hidden_layers=1)
    checkpoint = RandomCheckpoint(spec, "small", "int4", int(rng.integers(1000)))
    with loaded(checkpoint, Shape(2, 64, 32)) as executor:
        for slot in range(2):
            executor.bind(slot, SamplingParams(temperature=1.0, seed=slot), np.zeros(0, np.int32))
        prompts = [
            Row(slot, 0, rng.integers(0, 100, 9 + slot, dtype=np.int32), Want.TOKEN) for slot in (0, 1)
        ]
        flying = [executor.submit(Step(prompts))]
        for n in range(4):
            flying.append(
                executor.submit(Step([Row(slot, 9 + slot + n, FEEDBACK, Want.TOKEN) for slot in (0, 1)]))
            )
            executor.collect(flying.pop(0))
        token = executor.collect(flying.pop()).token
        executor.copy_prefix(0, 1, 5)
    print(f"{RAN}every kernel of a step", flush=True)
    if not ((token >= 0) & (token < spec.vocab_size)).all():
        yield f"steps: tokens {token.tolist()}"


GROUPS: Final[Mapping[str, Callable[[Runner, np.random.Generator], Iterator[str]]]] = {
    "linear": run_linear,
    "gemm": run_gemm,
    "attention_decode": run_attention_decode,
    "attention_prefill": run_attention_prefill,
    "elementwise": run_elementwise,
    "sample": run_sample,
    "moe": run_moe,
    "steps": run_steps,
}
"""By the file that the kernels are in; last, all of them together."""


def main() -> int:
    """Run a group; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", choices=tuple(GROUPS))
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    wrong = list(GROUPS[args.group](Naming(), np.random.default_rng(args.seed)))
    for line in wrong:
        print(f"wrong: {line}", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""How fast linears are, each among others of its kind and all of a step in their order; µs, GB/s, TFLOP/s.

python tools/gpu/linear_bench.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from runner import Runner

from edgellm.cuda.launch import At, Launch
from edgellm.kernels.gemm import Tile, prefill_linear
from edgellm.kernels.linear import Epilogue, decode_linear
from edgellm.kernels.linear_cut import Tuning
from edgellm.kernels.norm import Norm, NormAhead
from edgellm.kernels.packing import PackedShape, Zero

NORM: Final = Norm(1e-6, At("squares_in"), At("scales"), At("next_scales"))
AHEAD: Final = NormAhead(At("next_gain"), At("scales"), At("scaled"), At("squares"))


@dataclass(frozen=True, slots=True)
class BenchLinear:
    """A linear of a model: its shape, what becomes of its results, whether a norm is in front."""

    shape: PackedShape
    epilogue: Epilogue
    normed: bool


@dataclass(frozen=True, slots=True)
class BenchModel:
    """Linears of a decode step: those of a layer in their order, `layers` times, then the head."""

    name: str
    layers: int
    linears: Mapping[str, BenchLinear] = field(hash=False)


def _model(
    name: str, layers: int, sizes: tuple[int, int, int, int, int], group: int, zero: Zero
) -> BenchModel:
    """Of hidden size, heads' width, qkv's width, inner size and vocabulary, in 4 bits."""
    hidden, heads, qkv, inner, vocab = sizes

    def shape(n: int, k: int, *, swiglu: bool = False) -> PackedShape:
        # Wider groups where they fit, as builds have them.
        return PackedShape(n, k, 4, 128 if k % 128 == 0 else group, zero, swiglu)

    return BenchModel(
        name,
        layers,
        {
            "qkv": BenchLinear(shape(qkv, hidden), "store", True),
            "o": BenchLinear(shape(hidden, heads), "residual", False),
            "gate-up": BenchLinear(shape(2 * inner, hidden, swiglu=True), "swiglu", True),
            "down": BenchLinear(shape(hidden, inner), "residual", False),
            "head": BenchLinear(shape(vocab, hidden), "logits", True),
        },
    )


QWEN3_8B: Final = _model("Qwen3-8B", 36, (4096, 4096, 6144, 12288, 151936), 128, "zero_point")
SMOLLM2: Final = _model("SmolLM2-135M", 30, (576, 576, 960, 1536, 49152), 64, "zero_point")
ROTATED_BYTES: Final = 200 << 20
"""Of different weights in one measurement, where a model has as many: more than any L2 holds."""


class LinearBench:
    """Linears of one model's shapes over random weights."""

    def __init__(self, runner: Runner, model: BenchModel = QWEN3_8B) -> None:
        self.runner = runner
        self.model = model
        widest = max(each.shape.outputs for each in model.linears.values())
        longest = max(each.shape.k for each in model.linears.values())
        for name in ("x", "out", "squares_in", "scales", "next_scales", "next_gain", "scaled", "squares"):
            size = 16 * (widest if name == "out" else longest) * 4
            runner.allocate(name, size)
            self._zeros(name, size)
        runner.allocate("workspace", 64 << 20)
        self._zeros("workspace", 64 << 20)
        self.copies: dict[str, int] = {}

    def _zeros(self, name: str, size: int) -> None:
        self.runner.driver.call("cuMemsetD8", self.runner.address(At(name)), 0, size)

    def fill(self, name: str, copies: int | None = None) -> int:
        """Weights of a linear, several different ones; how many."""
        shape = self.model.linears[name].shape
        count = copies or min(self.model.layers, -(-ROTATED_BYTES // shape.nbytes))
        self.copies[name] = count
        base = self.runner.allocate(name, shape.nbytes * count)
        rng = np.random.default_rng(1)
        panels = min(shape.row_blocks * shape.panels, 8192)
        block = rng.integers(0, 256, (panels, shape.panel_bytes), np.uint8)
        block[:, shape.number_bytes :] = np.array([0x211F], "<u2").view(np.uint8)[0]
        self.runner.driver.call("cuMemcpyHtoD", base, block.ctypes.data, block.nbytes)
        done, total = block.nbytes, shape.nbytes * count
        while done < total:
            size = min(done, total - done)
            self.runner.driver.call("cuMemcpyDtoD", base + done, base, size)
            done += size
        return count

    def launches(self, name: str, rows: int, copy: int, cut: Tuning | None = None) -> list[Launch]:
        """One linear of the model."""
        linear = self.model.linears[name]
        return decode_linear(
            linear.shape,
            rows=rows,
            device=self.runner.device,
            x=At("x"),
            norm=NORM if linear.normed else None,
            weights=At(name, copy * linear.shape.nbytes),
            bias=None,
            epilogue=linear.epilogue,
            out=At("out"),
            workspace=At("workspace"),
            ahead=AHEAD if linear.epilogue == "residual" else None,
            tuning=cut,
        )

    def time(self, name: str, rows: int, cut: Tuning | None = None, *, early: bool = True) -> float:
        """µs of one linear among others of its kind."""
        count = self.copies[name]
        launches = [launch for i in range(count) for launch in self.launches(name, rows, i, cut)]
        return self.runner.time(launches, early=early) / count

    def step(
        self, rows: int, cuts: Mapping[str, Tuning] | None = None, *, early: bool = True, repeats: int = 10
    ) -> float:
        """µs of all linears of a step, in their order, without what is between them."""
        cuts = cuts or {}
        launches: list[Launch] = []
        for layer in range(self.model.layers):
            for name in self.model.linears:
                if name != "head":
                    launches += self.launches(name, rows, layer % self.copies[name], cuts.get(name))
        launches += self.launches("head", rows, 0, cuts.get("head"))
        return self.runner.time(launches, early=early, repeats=repeats)

    @property
    def step_bytes(self) -> int:
        """Weights of a step."""
        layer = sum(each.shape.nbytes for name, each in self.model.linears.items() if name != "head")
        return self.model.layers * layer + self.model.linears["head"].shape.nbytes

    def prompt_launches(self, name: str, tokens: int, tile: Tile | None = None) -> list[Launch]:
        """One linear of a chunk for each copy of its weights; buffers `chunk`, `prompt` and `result` are the
        caller's."""
        linear = self.model.linears[name]
        assert linear.epilogue != "logits"
        return [
            launch
            for copy in range(self.copies[name])
            for launch in prefill_linear(
                linear.shape,
                tokens=tokens,
                device=self.runner.device,
                chunk=At("chunk"),
                x=At("prompt"),
                weights=At(name, copy * linear.shape.nbytes),
                bias=None,
                epilogue=linear.epilogue,
                out=At("result"),
                workspace=At("workspace"),
                tile=tile,
            )
        ]

    def time_prompt(self, name: str, tokens: int, tile: Tile | None = None) -> float:
        """µs of one linear of a chunk that fills its bucket."""
        launches = self.prompt_launches(name, tokens, tile)
        return self.runner.time(launches, repeats=5) / self.copies[name]


def tables(runner: Runner) -> Iterator[str]:
    """µs and GB/s of Qwen3-8B's linears, a step's linears in a row, and linears of a chunk."""
    memory = runner.memory_gb_per_s()
    measured = LinearBench(runner)
    for name in measured.model.linears:
        measured.fill(name)
    yield f"4 bits in groups of 128 with zero points; memory {memory:.0f} GB/s"
    yield "| linear | MB | " + " | ".join(f"{rows} rows µs | GB/s" for rows in (1, 8, 16)) + " |"
    yield "|---|---|" + "---|---|" * 3
    for name, linear in measured.model.linears.items():
        times = [measured.time(name, rows) for rows in (1, 8, 16)]
        cells = " | ".join(f"{us:.1f} | {linear.shape.nbytes / us / 1e3:.0f}" for us in times)
        yield f"| {name} | {linear.shape.nbytes / 1e6:.1f} | {cells} |"
    for rows in (1, 8, 16):
        early, late = (measured.step(rows, early=early) for early in (True, False))
        rate = measured.step_bytes / early / 1e3
        found = f"{early:.0f} µs, {rate:.0f} GB/s; without PDL {late:.0f} µs"
        yield f"all linears of a step, {rows} rows: {found}"
    runner.release()
    yield from _prompts(runner)


def _prompts(runner: Runner) -> Iterator[str]:
    measured = LinearBench(runner)
    linears = measured.model.linears
    runner.allocate("prompt", 2048 * 12288 * 2)
    runner.allocate("result", 2048 * 24576 * 4)
    runner.allocate("chunk", 16)
    rng = np.random.default_rng(2)
    runner.upload("prompt", rng.standard_normal(2048 * 12288, np.float32).astype(np.float16))
    for name in linears:
        if name != "head":
            measured.fill(name, 4)
    yield "| tokens | " + " | ".join(f"{name} µs | TFLOP/s" for name in measured.copies) + " | tok/s |"
    yield "|---|" + "---|---|" * len(measured.copies) + "---|"
    for tokens in (64, 128, 512, 2048):
        runner.upload("chunk", np.array([0, 0, tokens, 0], np.int32))
        times = [measured.time_prompt(name, tokens) for name in measured.copies]
        rates = [
            2 * linears[name].shape.n * linears[name].shape.k * tokens / us / 1e6
            for name, us in zip(measured.copies, times, strict=True)
        ]
        cells = " | ".join(f"{us:.1f} | {rate:.0f}" for us, rate in zip(times, rates, strict=True))
        yield f"| {tokens} | {cells} | {tokens / sum(times) / measured.model.layers * 1e6:.0f} |"
    runner.release()


def main() -> int:
    """Command line."""
    for line in tables(Runner()):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

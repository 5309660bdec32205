"""Linears on a device: every kind against float64, and how fast they are beside what memory can give.

python tools/gpu/linear_checks.py [--bench]
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import norms
import numpy as np
from numpy.typing import NDArray
from runner import Runner, poisoned

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels.gemm import TILES, Tile, prefill_linear, prefill_workspace
from edgellm.kernels.gemm import shared_bytes as gemm_shared_bytes
from edgellm.kernels.linear import (
    BUCKETS,
    COUNTERS_BYTES,
    Epilogue,
    Join,
    Tuning,
    decode_linear,
    held_registers,
    shared_bytes,
    tuned,
)
from edgellm.kernels.norm import Norm, NormAhead
from edgellm.kernels.packing import ROW_BLOCK, PackedShape, Zero, pack, pack_bias, packed_shape
from edgellm.model.weights import Dense, Grouped, Groups, Weight

TOLERANCE: Final = 1.5e-3
"""Relative to the norm of the result: x rounds to float16 once, sums are float32."""
EPSILON: Final = 1e-6
NORM: Final = Norm(EPSILON, At("squares_in"), At("scales"), At("next_scales"))
AHEAD: Final = NormAhead(At("next_gain"), At("scales"), At("scaled"), At("squares"))

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One linear to check.

    Attributes:
        name: of the matrix it is taken from.
        n, k: out and in features (n of each part with SwiGLU).
        bits, group, zero: of its weights.
        epilogue, normed, biased: what is around the product.
    """

    name: str
    n: int
    k: int
    bits: int
    group: int
    zero: Zero
    epilogue: Epilogue
    normed: bool
    biased: bool = False

    def __str__(self) -> str:
        norm, bias = " norm" * self.normed, " bias" * self.biased
        kind = f"{self.bits} bits in groups of {self.group}, {self.zero}"
        return f"{self.name} {self.n} × {self.k}, {kind}, {self.epilogue}{norm}{bias}"


CASES: Final = (
    Case("SmolLM2 qkv", 960, 576, 4, 32, "offset", "store", True),
    Case("SmolLM2 o", 576, 576, 4, 32, "offset", "residual", False),
    Case("SmolLM2 gate-up", 1536, 576, 4, 32, "offset", "swiglu", True),
    Case("SmolLM2 down", 576, 1536, 4, 32, "offset", "residual", False),
    Case("SmolLM2 head", 4099, 576, 8, 32, "none", "logits", True),
    Case("Qwen2.5-0.5B qkv", 1152, 896, 4, 64, "zero_point", "store", True, True),
    Case("Qwen2.5-0.5B down", 896, 4864, 4, 128, "zero_point", "residual", False),
    Case("Qwen2.5-0.5B gate-up", 4864, 896, 4, 128, "centred", "swiglu", True, True),
    Case("Qwen2.5-7B down", 1024, 18944, 4, 128, "offset", "residual", False),
    Case("Qwen2.5-7B gate-up", 2048, 3584, 8, 64, "offset", "swiglu", True),
    Case("Qwen3 qkv", 6144, 4096, 4, 128, "centred", "store", True),
    Case("Qwen3 o", 4096, 4096, 4, 128, "offset", "residual", False),
    Case("Qwen3 gate-up", 3072, 4096, 4, 128, "centred", "swiglu", True),
    Case("Qwen3 down", 4096, 12288, 4, 128, "centred", "residual", False),
    Case("Qwen-7B down", 1024, 11008, 8, 128, "zero_point", "residual", False, True),
    Case("head Q6_K", 3000, 4096, 8, 16, "none", "logits", True),
    Case("MoE down", 2048, 768, 4, 16, "offset", "store", False),
    Case("dense", 1000, 2048, 16, 64, "none", "store", True, True),
    Case("dense o", 576, 576, 16, 64, "none", "residual", False),
)


def random_weight(rng: np.random.Generator, case: Case, name: str) -> Weight:
    """A weight of a case's kind, about as large as a model's."""
    n, k, group = case.n, case.k, case.group
    if case.bits == 16:
        values = (rng.standard_normal((n, k), np.float32) * 0.02).astype(np.float16).astype(np.float32)
        return Dense(name, (n, k), "f16", lambda begin, end: values[begin:end])
    q: Array
    if case.bits == 4:
        q = rng.integers(0, 16, (n, k), np.uint8)
    else:
        q = rng.integers(-128, 128, (n, k), np.int8)
    spread = 0.02 / (4.6 if case.bits == 4 else 74)
    scale = (rng.uniform(0.5, 1.5, (n, k // group)) * spread).astype(np.float16).astype(np.float32)
    offset = zero = None
    if case.zero == "offset":
        middle = 7.5 if case.bits == 4 else 0.0
        halves = (-middle * scale + 0.02 * rng.standard_normal(scale.shape)).astype(np.float16)
        offset = halves.astype(np.float32)
    elif case.zero == "centred":
        zero = np.full(scale.shape, 8, np.uint8)
    elif case.zero == "zero_point":
        zero = rng.integers(-1, 17, scale.shape).astype(np.int16)
    groups = Groups(q, scale, offset, zero)
    bits: Any = case.bits
    return Grouped(
        name,
        (n, k),
        bits,
        group,
        case.zero != "none",
        groups.rows,
        centred=case.zero == "centred",
    )


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights of a case: as packed, and dequantized in float64."""

    shape: PackedShape
    packed: Array
    bias: Array | None
    values: Array
    bias_values: Array


def make_matrix(rng: np.random.Generator, case: Case) -> Matrix:
    """Fresh random weights."""
    count = 2 if case.epilogue == "swiglu" else 1
    parts = [random_weight(rng, case, f"part {i}") for i in range(count)]
    shape = packed_shape(parts, swiglu=count == 2)
    assert (shape.bits, shape.zero) == (case.bits, case.zero), shape
    biases: list[Weight | None] = [None] * count
    bias_values = np.zeros(count * case.n)
    if case.biased:
        bias_values = rng.standard_normal(count * case.n).astype(np.float32).astype(np.float64)
        for i in range(count):
            part = bias_values[i * case.n : (i + 1) * case.n].astype(np.float32)
            biases[i] = Dense("bias", (case.n,), "f32", lambda begin, end, v=part: v[begin:end])  # type: ignore[misc]
    return Matrix(
        shape,
        np.concatenate(list(pack(parts, shape))),
        pack_bias(biases, parts, shape),
        np.concatenate([part.dequantize() for part in parts]).astype(np.float64),
        bias_values,
    )


def expected(case: Case, matrix: Matrix, x: Array, gain: Array, old: Array) -> Array:
    """The linear in float64; with a norm x is the residual."""
    x = x.astype(np.float64)
    if case.normed:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gain
    y: Array = x @ matrix.values.T + matrix.bias_values
    if case.epilogue == "swiglu":
        gate, up = y[:, : case.n], y[:, case.n :]
        y = gate / (1 + np.exp(-gate)) * up
    return y + old if case.epilogue == "residual" else y


def check(
    runner: Runner, rng: np.random.Generator, case: Case, matrix: Matrix, *, rows: int, cut: Tuning
) -> list[str]:
    """What is wrong with one linear; nothing, if all is well."""
    shape = matrix.shape
    # One residual in 500 is a hundred times as large: real models have such.
    x = rng.standard_normal((rows, case.k), np.float32)
    if case.normed:
        x *= np.where(rng.random(x.shape) < 0.002, 300.0, 1.0).astype(np.float32) * 30
    else:
        x = x.astype(np.float16)
    gain = (1 + 0.1 * rng.standard_normal(case.k)).astype(np.float32)
    next_gain = (1 + 0.1 * rng.standard_normal(shape.outputs)).astype(np.float32)
    # The layer in between changed every row's size.
    grown = 10 ** rng.uniform(-1.5, 2, rows)
    scales = (norms.inverse_rms(x, EPSILON) * grown / norms.ROOM).astype(np.float32)
    residual = case.epilogue == "residual"
    out_type = np.float32 if case.epilogue in ("residual", "logits") else np.float16
    old = rng.standard_normal((rows, shape.outputs)).astype(np.float32)
    workspace = COUNTERS_BYTES + cut.slabs * shape.row_blocks * rows * ROW_BLOCK * 4
    arrays: dict[str, Array] = {
        "weights": matrix.packed,
        "x": norms.scaled(x, gain, scales) if case.normed else x,
        "squares_in": norms.squares(x),
        "scales": scales,
        "next_scales": poisoned((rows,), np.float32),
        "next_gain": next_gain,
        "scaled": poisoned((rows, shape.outputs), np.float16),
        "out": old if residual else poisoned((rows, shape.outputs), out_type),
        "squares": poisoned((rows, shape.row_blocks), np.float32),
        "workspace": np.zeros(workspace, np.uint8),
        "bias": np.zeros(1, np.float32) if matrix.bias is None else matrix.bias,
    }
    launches = decode_linear(
        shape,
        rows=rows,
        device=runner.device,
        x=At("x"),
        norm=NORM if case.normed else None,
        weights=At("weights"),
        bias=None if matrix.bias is None else At("bias"),
        epilogue=case.epilogue,
        out=At("out"),
        workspace=At("workspace"),
        ahead=AHEAD if residual else None,
        tuning=cut,
    )
    # Twice over: the second finds the counters as the first left them.
    got = runner.run(launches if residual else launches * 2, arrays)
    want = expected(case, matrix, x, gain, old)
    out = got["out"].astype(np.float64)
    error = float(np.linalg.norm(out - want) / np.linalg.norm(want - old * residual))
    wrong = []
    if not error <= TOLERANCE:
        wrong.append(f"{case}, {rows} rows, {cut}: error {error:.2e}")
    if got["workspace"][:COUNTERS_BYTES].any():
        wrong.append(f"{case}, {rows} rows: counters are left at other values than 0")
    if case.normed and not np.allclose(got["next_scales"] * norms.ROOM, norms.inverse_rms(x, EPSILON), 1e-5):
        wrong.append(f"{case}, {rows} rows: the scales for the norm behind differ")
    if residual and shape.outputs % ROW_BLOCK == 0:
        left = norms.wrong_ahead(got, got["out"], next_gain, scales)
        wrong += [f"{case}, {rows} rows, {cut}: {each}" for each in left]
    ERRORS.append(error)
    return wrong


def check_prefill(
    runner: Runner,
    rng: np.random.Generator,
    case: Case,
    matrix: Matrix,
    *,
    tokens: int,
    count: int,
    tile: Tile | None,
) -> list[str]:
    """What is wrong with one linear of a chunk; nothing, if all is well."""
    shape = matrix.shape
    x = rng.standard_normal((tokens, case.k), np.float32).astype(np.float16)
    residual = case.epilogue == "residual"
    old = rng.standard_normal((tokens, shape.outputs)).astype(np.float32)
    workspace = prefill_workspace(shape, tokens, runner.device)
    arrays: dict[str, Array] = {
        "weights": matrix.packed,
        "chunk": np.array([0, 0, count, 0], np.int32),
        "x": x,
        "out": old if residual else poisoned((tokens, shape.outputs), np.float16),
        "workspace": np.zeros(max(16, workspace), np.uint8),
        "bias": np.zeros(1, np.float32) if matrix.bias is None else matrix.bias,
    }
    got = runner.run(prefill_launches(runner, case, matrix, tokens, tile), arrays)
    want = expected(replace(case, normed=False), matrix, x, np.ones(1), old)[:count]
    out = got["out"][:count].astype(np.float64)
    error = float(np.linalg.norm(out - want) / np.linalg.norm(want - old[:count] * residual))
    ERRORS.append(error)
    if error <= TOLERANCE:
        return []
    return [f"{case}, {count} of {tokens} tokens, {tile}: error {error:.2e}"]


def prefill_launches(
    runner: Runner, case: Case, matrix: Matrix, tokens: int, tile: Tile | None
) -> list[Launch]:
    """A chunk's linear over the buffers that `check_prefill` makes."""
    return prefill_linear(
        matrix.shape,
        tokens=tokens,
        device=runner.device,
        chunk=At("chunk"),
        x=At("x"),
        weights=At("weights"),
        bias=None if matrix.bias is None else At("bias"),
        epilogue=case.epilogue,
        out=At("out"),
        workspace=At("workspace"),
        tile=tile,
    )


CHUNKS: Final = ((16, 11), (32, 32), (64, 33), (256, 200))
"""Buckets, and how many of their tokens are there."""


ERRORS: list[float] = []


def cuts(shape: PackedShape, rows: int, runner: Runner) -> Iterator[Tuning]:
    """What the device takes, and other ways that other devices would take."""
    device = runner.device
    best = tuned(shape, rows=rows, device=device)
    yield best
    common = replace(best, warps=8, warps_k=4, stages=4, early=2, abreast=2, sets=1, blocks_per_sm=1)
    few = max(1, min(best.blocks, 7))
    others = [
        replace(common, slabs=1, join="whole", blocks=few, held=not best.held),
        replace(common, slabs=1, join="whole", blocks=few, warps_k=2, abreast=1, sets=2, early=3, held=False),
    ]
    joins: list[Join] = ["last_block", *(("cluster",) if device.has_dependent_launch else ())]
    if shape.panels > 2:
        parted = replace(common, slabs=2, blocks=few)
        others += [replace(parted, join=join, held=held) for join in joins for held in (True, False)]
    for other in others:
        registers = held_registers(shape, rows, other) if other.held else 0
        if registers <= HELD_MOST and shared_bytes(shape, rows, other) <= device.shared_per_block:
            yield other


HELD_MOST: Final = 128
"""Registers for x that the eight warps of other cuts have."""


def checks(
    runner: Runner,
    seed: int,
    cases: Sequence[Case] = CASES,
    *,
    buckets: Sequence[int] = BUCKETS,
    chunks: Sequence[tuple[int, int]] = CHUNKS,
) -> list[str]:
    """Every case in every bucket of rows, and in chunks (tokens, how many are there); what is wrong."""
    rng = np.random.default_rng(seed)
    wrong: list[str] = []
    made = [(case, make_matrix(rng, case)) for case in cases]
    todo = [
        (case, matrix, rows, cut)
        for case, matrix in made
        for rows in buckets
        for cut in cuts(matrix.shape, rows, runner)
    ]
    runner.prepare(launch for item in todo for launch in _launches(runner, *item))
    for case, matrix, rows, cut in todo:
        wrong += check(runner, rng, case, matrix, rows=rows, cut=cut)

    prompts = [
        (case, matrix, tokens, count, tile)
        for case, matrix in made
        if case.epilogue != "logits"
        for tokens, count in chunks
        for tile in _tiles(matrix.shape, runner, every=tokens == chunks[-1][0])
    ]
    runner.prepare(
        launch
        for case, matrix, tokens, _, tile in prompts
        for launch in prefill_launches(runner, case, matrix, tokens, tile)
    )
    for case, matrix, tokens, count, tile in prompts:
        wrong += check_prefill(runner, rng, case, matrix, tokens=tokens, count=count, tile=tile)
    return wrong


def _tiles(shape: PackedShape, runner: Runner, *, every: bool) -> list[Tile | None]:
    """What the device takes; `every`: and some of the tiles that fit."""
    fitting = [tile for tile in TILES if gemm_shared_bytes(shape, tile) <= runner.device.shared_per_block]
    return [None, *(fitting[:: max(1, len(fitting) // 3)] if every else [])]


def _launches(runner: Runner, case: Case, matrix: Matrix, rows: int, cut: Tuning) -> list[Launch]:
    return decode_linear(
        matrix.shape,
        rows=rows,
        device=runner.device,
        x=At("x"),
        norm=NORM if case.normed else None,
        weights=At("weights"),
        bias=None,
        epilogue=case.epilogue,
        out=At("out"),
        workspace=At("workspace"),
        tuning=cut,
    )


QWEN3_8B: Final = {
    "qkv": ((6144, 4096), "store", True),
    "o": ((4096, 4096), "residual", False),
    "gate-up": ((24576, 4096), "swiglu", True),
    "down": ((4096, 12288), "residual", False),
    "head": ((151936, 4096), "logits", True),
}
"""Its linears: (n, k), epilogue, whether a norm is in front."""
ROTATED_BYTES: Final = 200 << 20
"""Of different weights in one measurement: more than any L2 holds."""


class LinearBench:
    """Linears of one model's shapes over random weights."""

    def __init__(self, runner: Runner, zero: Zero = "offset", group: int = 128) -> None:
        self.runner = runner
        self.shapes = {
            name: PackedShape(n, k, 4, group, zero, epilogue == "swiglu")
            for name, ((n, k), epilogue, _) in QWEN3_8B.items()
        }
        widest = 16 * 151936 * 4
        for name in ("x", "out", "squares_in", "scales", "next_scales", "next_gain", "scaled", "squares"):
            runner.allocate(name, widest if name == "out" else 16 * 12288 * 4)
            self._zeros(name, widest if name == "out" else 16 * 12288 * 4)
        runner.allocate("workspace", 64 << 20)
        self._zeros("workspace", 64 << 20)
        self.copies: dict[str, int] = {}

    def _zeros(self, name: str, size: int) -> None:
        self.runner.driver.call("cuMemsetD8", self.runner.address(At(name)), 0, size)

    def fill(self, name: str, copies: int | None = None) -> int:
        """Weights of a linear, several different ones; how many."""
        shape = self.shapes[name]
        count = copies or -(-ROTATED_BYTES // shape.nbytes)
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
        shape = self.shapes[name]
        _, epilogue, normed = QWEN3_8B[name]
        return decode_linear(
            shape,
            rows=rows,
            device=self.runner.device,
            x=At("x"),
            norm=NORM if normed else None,
            weights=At(name, copy * shape.nbytes),
            bias=None,
            epilogue=epilogue,  # type: ignore[arg-type]
            out=At("out"),
            workspace=At("workspace"),
            ahead=AHEAD if epilogue == "residual" else None,
            tuning=cut,
        )

    def time(self, name: str, rows: int, cut: Tuning | None = None, *, early: bool = True) -> float:
        """µs of one linear among others of its kind."""
        count = self.copies[name]
        launches = [launch for i in range(count) for launch in self.launches(name, rows, i, cut)]
        return self.runner.time(launches, early=early) / count

    def step(self, rows: int, *, early: bool = True) -> float:
        """µs of all linears of a step, in their order, without what is between them."""
        launches: list[Launch] = []
        for layer in range(36):
            for name in ("qkv", "o", "gate-up", "down"):
                launches += self.launches(name, rows, layer % self.copies[name])
        return self.runner.time(launches + self.launches("head", rows, 0), early=early)

    def time_prompt(self, name: str, tokens: int) -> float:
        """µs of one linear of a chunk that fills its bucket."""
        shape, count = self.shapes[name], self.copies[name]
        launches = [
            launch
            for copy in range(count)
            for launch in prefill_linear(
                shape,
                tokens=tokens,
                device=self.runner.device,
                chunk=At("chunk"),
                x=At("prompt"),
                weights=At(name, copy * shape.nbytes),
                bias=None,
                epilogue=QWEN3_8B[name][1],  # type: ignore[arg-type]
                out=At("result"),
                workspace=At("workspace"),
            )
        ]
        return self.runner.time(launches, repeats=5) / count


ORINS: Final = {"AGX Orin": (16, 1.3, 204.8), "Orin NX": (8, 0.918, 102.4)}
"""SMs, GHz, GB/s of its memory."""


def bench(runner: Runner) -> Iterator[str]:
    """Tables: µs and GB/s of Qwen3-8B's linears, a step's linears in a row, and linears on an Orin's SMs."""
    memory = runner.memory_gb_per_s()
    measured = LinearBench(runner)
    for name in QWEN3_8B:
        measured.fill(name)
    yield f"4 bits in groups of 128 with offsets; memory {memory:.0f} GB/s"
    yield "| linear | MB | " + " | ".join(f"{rows} rows µs | GB/s" for rows in (1, 8, 16)) + " |"
    yield "|---|---|" + "---|---|" * 3
    for name, shape in measured.shapes.items():
        times = [measured.time(name, rows) for rows in (1, 8, 16)]
        cells = " | ".join(f"{us:.1f} | {shape.nbytes / us / 1e3:.0f}" for us in times)
        yield f"| {name} | {shape.nbytes / 1e6:.1f} | {cells} |"
    step = 36 * sum(shape.nbytes for name, shape in measured.shapes.items() if name != "head")
    step += measured.shapes["head"].nbytes
    for rows in (1, 8, 16):
        early, late = (measured.step(rows, early=early) for early in (True, False))
        rate = step / early / 1e3
        found = f"{early:.0f} µs, {rate:.0f} GB/s; without PDL {late:.0f} µs"
        yield f"all linears of a step, {rows} rows: {found}"

    clock = runner.driver.facts.clock_khz / 1e6
    yield "| as | SMs | linear | rows | GB/s here | at its clock | × its memory |"
    yield "|---|---|---|---|---|---|---|"
    for orin, (blocks, orin_clock, bandwidth) in ORINS.items():
        device = Device(87, blocks, 163 << 10)
        for name in ("gate-up", "down"):
            for rows in (1, 4, 8):
                cut = tuned(measured.shapes[name], rows=rows, device=device)
                rate = measured.shapes[name].nbytes / measured.time(name, rows, cut, early=False) / 1e3
                scaled = rate * orin_clock / clock
                yield (
                    f"| {orin} | {blocks} | {name} | {rows} | {rate:.0f} | {scaled:.0f} "
                    f"| {scaled / bandwidth:.2f} |"
                )
    runner.release()
    yield from _bench_prefill(runner)


def _bench_prefill(runner: Runner) -> Iterator[str]:
    measured = LinearBench(runner)
    runner.allocate("prompt", 2048 * 12288 * 2)
    runner.allocate("result", 2048 * 24576 * 4)
    runner.allocate("chunk", 16)
    rng = np.random.default_rng(2)
    runner.upload("prompt", rng.standard_normal(2048 * 12288, np.float32).astype(np.float16))
    for name in QWEN3_8B:
        if name != "head":
            measured.fill(name, 4)
    yield "| tokens | " + " | ".join(f"{name} µs | TFLOP/s" for name in measured.copies) + " | tok/s |"
    yield "|---|" + "---|---|" * len(measured.copies) + "---|"
    for tokens in (64, 128, 512, 2048):
        runner.upload("chunk", np.array([0, 0, tokens, 0], np.int32))
        times = [measured.time_prompt(name, tokens) for name in measured.copies]
        rates = [
            2 * measured.shapes[name].n * measured.shapes[name].k * tokens / us / 1e6
            for name, us in zip(measured.copies, times, strict=True)
        ]
        cells = " | ".join(f"{us:.1f} | {rate:.0f}" for us, rate in zip(times, rates, strict=True))
        yield f"| {tokens} | {cells} | {tokens / sum(times) / 36 * 1e6:.0f} |"
    runner.release()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--bench", action="store_true")
    options = parser.parse_args()
    runner = Runner()
    if options.bench:
        for line in bench(runner):
            print(line, flush=True)
        return 0
    seed = secrets.randbits(32) if options.seed is None else options.seed
    wrong = checks(runner, seed)
    for line in wrong:
        print(line)
    print(f"linears: {len(ERRORS)} checked, largest error {max(ERRORS):.1e}, {len(wrong)} wrong, seed {seed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

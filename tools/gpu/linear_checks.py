"""Linears on a device: every kind, in every way to cut it, against float64.

python tools/gpu/linear_checks.py
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
from linear_bench import AHEAD, NORM
from numpy.typing import NDArray
from runner import Runner, poisoned

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels.gemm import (
    TILES,
    Tile,
    has_counters,
    prefill_linear,
    prefill_workspace,
    tile_workspace,
)
from edgellm.kernels.gemm import shared_bytes as gemm_shared_bytes
from edgellm.kernels.linear import BUCKETS, COUNTERS_BYTES, Epilogue, decode_linear
from edgellm.kernels.linear_cut import Join, Tuning, held_registers, shared_bytes
from edgellm.kernels.linear_tuned import tuned
from edgellm.kernels.packing import ROW_BLOCK, PackedShape, Zero, pack, pack_bias, packed_shape
from edgellm.model.weights import Dense, Grouped, Groups, Weight

TOLERANCE: Final = 1.5e-3
"""Relative to the norm of the result: x rounds to float16 once, sums are float32."""
EPSILON: Final = NORM.epsilon

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

    @property
    def shape(self) -> PackedShape:
        """Its weights', without them."""
        swiglu = self.epilogue == "swiglu"
        return PackedShape(self.n * (1 + swiglu), self.k, self.bits, self.group, self.zero, swiglu)

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
    assert shape == case.shape, shape
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
    if tile is not None:
        workspace = tile_workspace(shape, tokens, tile)
    arrays: dict[str, Array] = {
        "weights": matrix.packed,
        "chunk": np.array([0, 0, count, 0], np.int32),
        "x": x,
        "out": old if residual else poisoned((tokens, shape.outputs), np.float16),
        "workspace": np.zeros(max(16, workspace), np.uint8),
        "bias": np.zeros(1, np.float32) if matrix.bias is None else matrix.bias,
    }
    got = runner.run(prefill_launches(runner.device, case, tokens, tile), arrays)
    want = expected(replace(case, normed=False), matrix, x, np.ones(1), old)[:count]
    out = got["out"][:count].astype(np.float64)
    error = float(np.linalg.norm(out - want) / np.linalg.norm(want - old[:count] * residual))
    ERRORS.append(error)
    wrong = []
    if not error <= TOLERANCE:
        wrong.append(f"{case}, {count} of {tokens} tokens, {tile}: error {error:.2e}")
    if workspace and got["workspace"][:COUNTERS_BYTES].any():
        wrong.append(f"{case}, {count} of {tokens} tokens, {tile}: counters are left at other values than 0")
    return wrong


def prefill_launches(device: Device, case: Case, tokens: int, tile: Tile | None) -> list[Launch]:
    """A chunk's linear over the buffers that `check_prefill` makes."""
    return prefill_linear(
        case.shape,
        tokens=tokens,
        device=device,
        chunk=At("chunk"),
        x=At("x"),
        weights=At("weights"),
        bias=At("bias") if case.biased else None,
        epilogue=case.epilogue,
        out=At("out"),
        workspace=At("workspace"),
        tile=tile,
    )


CHUNKS: Final = ((16, 11), (32, 32), (64, 33), (256, 200))
"""Buckets, and how many of their tokens are there."""


ERRORS: list[float] = []


def cuts(shape: PackedShape, rows: int, device: Device) -> Iterator[Tuning]:
    """What the device takes, and other ways that other devices would take."""
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
    made = {case: make_matrix(rng, case) for case in cases}
    device = runner.device
    todo = list(steps(device, cases, buckets=buckets))
    runner.prepare(launch for item in todo for launch in decode_launches(device, *item))
    for case, rows, cut in todo:
        wrong += check(runner, rng, case, made[case], rows=rows, cut=cut)

    prompts = list(prompts_of(device, cases, chunks=chunks))
    runner.prepare(
        launch for case, tokens, _, tile in prompts for launch in prefill_launches(device, case, tokens, tile)
    )
    for case, tokens, count, tile in prompts:
        wrong += check_prefill(runner, rng, case, made[case], tokens=tokens, count=count, tile=tile)
    return wrong


def steps(
    device: Device, cases: Sequence[Case] = CASES, *, buckets: Sequence[int] = BUCKETS
) -> Iterator[tuple[Case, int, Tuning]]:
    """Every case in every bucket of rows, in every way to cut it."""
    for case in cases:
        for rows in buckets:
            for cut in cuts(case.shape, rows, device):
                yield case, rows, cut


def prompts_of(
    device: Device, cases: Sequence[Case] = CASES, *, chunks: Sequence[tuple[int, int]] = CHUNKS
) -> Iterator[tuple[Case, int, int, Tile | None]]:
    """Every case of a chunk: its bucket, how many tokens are there, and a tile; None: the device's."""
    for case in cases:
        if case.epilogue == "logits":
            continue
        for tokens, count in chunks:
            for tile in _tiles(case.shape, tokens, device, every=tokens == chunks[-1][0]):
                yield case, tokens, count, tile


def _tiles(shape: PackedShape, tokens: int, device: Device, *, every: bool) -> list[Tile | None]:
    """What the device takes; `every`: and some of the tiles that fit, those of several teams among them, the
    last one in two splits, too, where it can have them."""
    fitting = [tile for tile in TILES if gemm_shared_bytes(shape, tile) <= device.shared_per_block]
    some = [*fitting[:: max(1, len(fitting) // 3)], *(tile for tile in fitting if tile.warps_k > 1)]
    parted = replace(fitting[-1], splits=2)
    if shape.k // 64 >= 2 * parted.warps_k and has_counters(shape, tokens, parted):
        some.append(parted)
    return [None, *(dict.fromkeys(some) if every else [])]


def decode_launches(device: Device, case: Case, rows: int, cut: Tuning) -> list[Launch]:
    """A step's linear, of the kernels that `check` runs."""
    return decode_linear(
        case.shape,
        rows=rows,
        device=device,
        x=At("x"),
        norm=NORM if case.normed else None,
        weights=At("weights"),
        bias=None,
        epilogue=case.epilogue,
        out=At("out"),
        workspace=At("workspace"),
        tuning=cut,
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    runner = Runner()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    wrong = checks(runner, seed)
    for line in wrong:
        print(line)
    print(f"linears: {len(ERRORS)} checked, largest error {max(ERRORS):.1e}, {len(wrong)} wrong, seed {seed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

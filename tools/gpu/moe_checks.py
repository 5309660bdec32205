"""Mixtures of experts on a device, against float64.

python tools/gpu/moe_checks.py
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
from linear_checks import Case, random_weight
from numpy.typing import NDArray
from runner import Runner, poisoned

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels.gemm import Tile
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.moe import (
    chunk_mixture,
    longest_piece,
    mixture_workspace,
    places_of,
    router_workspace,
    row_mixture,
)
from edgellm.kernels.moe_cuts import Cuts, Held, Tuning, tiled, tuned
from edgellm.kernels.moe_shape import MixtureShape, MixtureWeights, Tokens
from edgellm.kernels.norm import NormAhead
from edgellm.kernels.packing import PackedShape, Zero, pack, packed_shape
from edgellm.kernels.rows import CHUNK, ROW

TOLERANCE: Final = 2e-3
"""Relative to the norm of what the mixture adds: x and what is between the linears round to float16."""
NEAR: Final = 1e-3
"""Between two scores: which of them is chosen may depend on rounding."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """A mixture to check.

    Attributes:
        name: of the model it is like.
        experts, top_k, normalize: of its router.
        hidden, inner: widths.
        bits, group, zero: of its experts.
    """

    name: str
    experts: int
    top_k: int
    normalize: bool
    hidden: int
    inner: int
    bits: int
    group: int
    zero: Zero

    @property
    def mixture(self) -> MixtureShape:
        """Its shape, without weights."""
        kind = (self.bits, self.group, self.zero)
        return MixtureShape(
            self.top_k,
            self.normalize,
            PackedShape(self.experts, self.hidden, 16, 64, "none"),
            PackedShape(2 * self.inner, self.hidden, *kind, swiglu=True),
            PackedShape(self.hidden, self.inner, *kind),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What is checked of a layer.

    Attributes:
        layer: whose.
        tokens: its bucket.
        chunk: whether they are a chunk; rows of a decode step otherwise.
        cuts: instead of what the device takes.
    """

    layer: Layer
    tokens: int
    chunk: bool
    cuts: Cuts | None

    def launches(self, device: Device) -> list[Launch]:
        """Over the buffers that `check` makes."""
        return launches_of(self.layer.mixture, device, self.tokens, chunk=self.chunk, cuts=self.cuts)


CHUNKS: Final = (16, 128, 512, 2200)
"""Buckets of tokens."""

LAYERS: Final = (
    Layer("Qwen3-30B-A3B, 16 experts", 16, 8, True, 2048, 768, 4, 128, "zero_point"),
    Layer("128 narrow experts", 128, 8, True, 256, 128, 4, 64, "offset"),
    Layer("Qwen1.5-MoE", 60, 4, False, 512, 192, 4, 32, "centred"),
    Layer("Q6_K", 8, 2, True, 256, 64, 8, 16, "none"),
    Layer("8 bits", 32, 6, True, 448, 320, 8, 64, "zero_point"),
    Layer("dense", 9, 3, False, 192, 128, 16, 64, "none"),
    Layer("one of two", 2, 1, True, 128, 64, 4, 16, "offset"),
    Layer("500 experts", 500, 10, True, 128, 64, 4, 64, "zero_point"),
)


class Experts:
    """A layer's weights: packed, and in float64."""

    def __init__(self, rng: np.random.Generator, layer: Layer) -> None:
        case = Case(layer.name, 0, 0, layer.bits, layer.group, layer.zero, "store", False)
        wide = replace(case, n=layer.inner, k=layer.hidden)
        dense = replace(case, n=layer.experts, k=layer.hidden, bits=16)
        router = random_weight(rng, dense, "router")
        self.router = router.dequantize().astype(np.float64)
        self.gate: list[Array] = []
        self.up: list[Array] = []
        self.down: list[Array] = []
        packed_up, packed_down = [], []
        for _ in range(layer.experts):
            gate, up = random_weight(rng, wide, "gate"), random_weight(rng, wide, "up")
            down = random_weight(rng, replace(case, n=layer.hidden, k=layer.inner), "down")
            shapes = packed_shape([gate, up], swiglu=True), packed_shape([down])
            packed_up += list(pack([gate, up], shapes[0]))
            packed_down += list(pack([down], shapes[1]))
            for values, part in ((self.gate, gate), (self.up, up), (self.down, down)):
                values.append(part.dequantize().astype(np.float64))
        router_shape = packed_shape([router])
        self.mixture = layer.mixture
        assert (router_shape, *shapes) == (self.mixture.router, self.mixture.gate_up, self.mixture.down)
        self.arrays = {
            "router": np.concatenate(list(pack([router], router_shape))),
            "gate_up": np.concatenate(packed_up),
            "down": np.concatenate(packed_down),
        }

    def expected(self, x: Array, chosen: Array) -> Array:
        """What the mixture adds, in float64, for experts [rows, top_k]."""
        x = x.astype(np.float64)
        scores = x @ self.router.T
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        shares = np.take_along_axis(p, chosen, -1)
        if self.mixture.normalize:
            shares /= shares.sum(-1, keepdims=True)
        y = np.zeros_like(x)
        for expert in np.unique(chosen):
            row, place = np.nonzero(chosen == expert)
            gate, up = x[row] @ self.gate[expert].T, x[row] @ self.up[expert].T
            y[row] += shares[row, place, None] * ((gate / (1 + np.exp(-gate)) * up) @ self.down[expert].T)
        return y


WEIGHTS: Final = MixtureWeights(At("router"), At("gate_up"), At("down"))


def chosen_by(
    got: dict[str, Any], mixture: MixtureShape, rows: int, device: Device, cuts: Cuts | None
) -> Array:
    """Experts [rows, top_k] as the groups have them; −1 where a row has none."""
    places = places_of(mixture, rows, device, cuts)
    raw = got["workspace"]
    groups = raw[places.groups : places.pair_rows].view("<i4").reshape(-1, 4)
    pairs = rows * mixture.top_k
    positions = raw[places.positions :][: pairs * 4].view("<i4").reshape(rows, -1)
    experts = np.full(pairs, -1)
    count = int(groups[0, 2])
    for expert, begin, size, _ in groups[1 : 1 + int(groups[0, 0])]:
        assert (experts[begin : begin + size] == -1).all(), "groups overlap"
        experts[begin : begin + size] = expert
    assert (experts[:count] >= 0).all() and (experts[count:] < 0).all(), "groups leave pairs out"
    inside = (positions >= 0) & (positions < count)
    found: Array = np.where(inside, experts[np.where(inside, positions, 0)], -1)
    return found


def check(
    runner: Runner,
    rng: np.random.Generator,
    weights: Experts,
    step: Step,
) -> list[str]:
    """What is wrong with one step of a layer; nothing, if all is well."""
    mixture, device = weights.mixture, runner.device
    layer, tokens, chunk, cuts = step.layer, step.tokens, step.chunk, step.cuts
    what = f"{layer.name}, {'chunk of' if chunk else 'rows'} {tokens}, {cuts or 'as the device takes it'}"
    count = int(rng.integers(1, tokens + 1)) if chunk else tokens
    there = np.arange(tokens) < count if chunk else rng.random(tokens) < 0.75
    if not chunk and not there.any():
        there[0] = True
    rows = np.zeros(tokens, ROW)
    rows["slot"] = np.where(there, np.arange(tokens), -1)
    x = rng.standard_normal((tokens, layer.hidden)).astype(np.float16)
    x[~there] = np.nan
    old = rng.standard_normal((tokens, layer.hidden)).astype(np.float32)
    gain = rng.normal(1, 0.3, layer.hidden).astype(np.float32)
    scales = rng.uniform(0.1, 10, tokens).astype(np.float32)
    arrays: dict[str, Array] = {
        **weights.arrays,
        "gain": gain,
        "scales": scales,
        "scaled": poisoned((tokens, layer.hidden), np.float16),
        "x": x,
        "rows": rows,
        "chunk": np.array([(0, 0, count, 0)], CHUNK),
        "residual": old,
        "squares": poisoned((tokens, layer.hidden // 16), np.float32),
        "workspace": poisoned((mixture_workspace(mixture, tokens, device, cuts),), np.uint8),
        "linear_workspace": np.zeros(router_workspace(mixture, tokens, device, chunk=chunk), np.uint8),
    }
    got = runner.run(step.launches(device), arrays)
    out = got["residual"]
    wrong = []
    if not np.array_equal(out[~there], old[~there]):
        wrong.append(f"{what}: rows that do not exist were written")
    if tokens <= longest_piece(mixture):
        chosen = chosen_by(got, mixture, tokens, device, cuts)
        if (chosen[~there] >= 0).any():
            wrong.append(f"{what}: rows that do not exist have experts")
        chosen = chosen[there]
        if (chosen < 0).any() or any(len(set(row)) < mixture.top_k for row in chosen):
            return [*wrong, f"{what}: a row has fewer than {mixture.top_k} experts"]
        scores = x[there].astype(np.float64) @ weights.router.T
        mine = np.sort(np.take_along_axis(scores, chosen, -1))
        best = np.sort(scores)[:, -mixture.top_k :]
        if not np.allclose(mine, best, atol=NEAR, rtol=0):
            wrong.append(f"{what}: other experts are better")
    else:  # In pieces: groups of the last one only are left.
        chosen = _best(weights, x[there])
    want = weights.expected(x[there], chosen)
    added = out[there].astype(np.float64) - old[there]
    error = float(np.linalg.norm(added - want) / np.linalg.norm(want))
    ERRORS.append(error)
    if not error <= TOLERANCE:
        wrong.append(f"{what}: error {error:.2e}")
    if not chunk:
        left = {name: got[name][there] for name in ("scaled", "squares")}
        wrong += [f"{what}: {each}" for each in norms.wrong_ahead(left, out[there], gain, scales[there])]
    again = runner.run(step.launches(device), arrays)
    if not np.array_equal(again["residual"], out):
        wrong.append(f"{what}: not the same a second time")
    return wrong


ERRORS: list[float] = []


def _best(weights: Experts, x: Array) -> Array:
    scores = x.astype(np.float64) @ weights.router.T
    best: Array = np.argsort(-scores, axis=-1, kind="stable")[:, : weights.mixture.top_k]
    return best


def launches_of(
    mixture: MixtureShape,
    device: Device,
    tokens: int,
    *,
    chunk: bool,
    copy: str = "",
    cuts: Cuts | None = None,
) -> list[Launch]:
    """A step of a layer over buffers of these names.

    Args:
        copy: behind the names of `x` and `workspace`.
        cuts: instead of what the device takes.
    """
    x, residual, workspace = At(f"x{copy}"), At("residual"), At(f"workspace{copy}")
    linear = At("linear_workspace")
    if chunk:
        return chunk_mixture(
            mixture,
            tokens,
            device=device,
            chunk=At("chunk"),
            x=x,
            weights=WEIGHTS,
            residual=residual,
            workspace=workspace,
            linear_workspace=linear,
            cuts=cuts,
        )
    return row_mixture(
        mixture,
        Tokens(tokens, rows_at=At("rows")),
        device=device,
        x=x,
        weights=WEIGHTS,
        residual=residual,
        ahead=NormAhead(At("gain"), At("scales"), At("scaled"), At("squares")),
        workspace=workspace,
        linear_workspace=linear,
        cuts=cuts,
    )


def steps(
    device: Device,
    layers: Sequence[Layer] = LAYERS,
    *,
    buckets: Sequence[int] = BUCKETS,
    chunks: Sequence[int] = CHUNKS,
) -> Iterator[Step]:
    """Every layer in every bucket of rows and in some of tokens, cut in every way that can be."""
    for layer in layers:
        for chunk, counts in ((False, buckets), (True, chunks)):
            for tokens in counts:
                if tokens <= 512 or layer.hidden < 1024:  # the reference takes long
                    for cuts in _cuts(layer.mixture, tokens, device):
                        yield Step(layer, tokens, chunk, cuts)


def checks(
    runner: Runner,
    seed: int,
    layers: Sequence[Layer] = LAYERS,
    *,
    buckets: Sequence[int] = BUCKETS,
    chunks: Sequence[int] = CHUNKS,
) -> list[str]:
    """All steps; what is wrong."""
    rng = np.random.default_rng(seed)
    made = {layer: Experts(rng, layer) for layer in layers}
    todo = list(steps(runner.device, layers, buckets=buckets, chunks=chunks))
    runner.prepare(launch for step in todo for launch in step.launches(runner.device))
    wrong: list[str] = []
    for step in todo:
        wrong += check(runner, rng, made[step.layer], step)
    return wrong


def _cuts(mixture: MixtureShape, tokens: int, device: Device) -> list[Cuts | None]:
    """What the device takes, and other ways: few rows by few blocks; more by teams and by tiles."""
    rows = min(tokens, longest_piece(mixture))
    if rows <= BUCKETS[-1]:
        return [None, *_others(mixture, rows, device)]
    taken = tuned(mixture, rows=rows, device=device)
    others = (tuned(mixture, rows=rows, device=device, tiles=False), tiled(mixture, rows=rows, device=device))
    return [None, *(cuts for cuts in others if cuts not in (None, taken))]


def _others(mixture: MixtureShape, rows: int, device: Device) -> list[Cuts]:
    """Cut as no device would: few blocks, each with items of several groups; rings as short as can be."""
    teams, held = (tuned(mixture, rows=rows, device=device, held=each) for each in (False, True))
    return [
        Cuts(_other(teams.gate_up), _other(teams.down)),
        Cuts(_other(held.gate_up), _other(held.down)),
    ]


def _other(cut: Held | Tuning | Tile) -> Held | Tuning | Tile:
    assert not isinstance(cut, Tile)
    if isinstance(cut, Held):
        return replace(cut, blocks=3, stages=3 if cut.abreast == 1 else 2)
    return replace(cut, blocks=3, warps_k=4 if cut.warps_k == 1 else 1, stages=3)


def main() -> int:
    """Run checks, and the benchmark if asked for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = secrets.randbits(31) if args.seed is None else args.seed
    runner = Runner()
    wrong = checks(runner, seed)
    print(
        f"mixtures of experts: {len(ERRORS)} checks, largest error {max(ERRORS):.2e}, seed {seed}", flush=True
    )
    for line in wrong[:40]:
        print(line, flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

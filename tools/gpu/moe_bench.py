"""How fast a layer of Qwen3-30B-A3B is beside what memory can give: its mixture, by rows and by tokens.

python tools/gpu/moe_bench.py [--variants]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
from moe_checks import launches_of
from numpy.typing import NDArray
from runner import Runner

from edgellm.cuda.launch import Device, Launch
from edgellm.kernels.gemm import Tile
from edgellm.kernels.moe import longest_piece, mixture_workspace, places_of, router_workspace
from edgellm.kernels.moe_cuts import Cuts, Held, Tuning, held_bytes, tiled, tuned
from edgellm.kernels.moe_shape import MixtureShape
from edgellm.kernels.packing import PackedShape
from edgellm.kernels.rows import CHUNK, ROW

COPIES: Final = 12
"""Of a step over one layer's 128 experts, each with rows of its own: more bytes than any L2 holds."""
ROWS: Final = (1, 4, 8, 16)
CHUNKS: Final = (64, 128, 256, 512, 1024, 2048)
"""Tokens."""


def qwen3_30b(group: int = 128) -> MixtureShape:
    """A layer of Qwen3-30B-A3B in 4 bits."""
    return MixtureShape(
        8,
        True,
        PackedShape(128, 2048, 16, 64, "none"),
        PackedShape(1536, 2048, 4, group, "zero_point", swiglu=True),
        PackedShape(2048, 768, 4, group, "zero_point"),
    )


def tables(runner: Runner, *, variants: bool = False) -> Iterator[str]:
    """µs of one layer, by rows and by tokens, and of its launches.

    Args:
        variants: rows with other cuts, too.
    """
    mixture = qwen3_30b()
    arrays = _arrays(mixture, runner.device)
    expert_bytes = mixture.gate_up.nbytes + mixture.down.nbytes
    yield f"int4, groups of {mixture.down.group}; an expert has {expert_bytes / 1e6:.2f} MB"
    yield "| rows | cut | active | MB | all µs | route µs | gate, up µs | down µs | combine µs | GB/s |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    with runner.buffers(arrays):
        for rows in ROWS:
            for cuts in _variants(mixture, rows, runner.device, variants=variants):
                yield _row_line(runner, mixture, arrays, rows, cuts)
        for tokens in CHUNKS:
            runner.upload("chunk", np.array([(0, 0, tokens, 0)], CHUNK))
            for cuts in (
                None,
                tiled(mixture, rows=min(tokens, longest_piece(mixture)), device=runner.device),
            ):
                yield from _chunk_lines(runner, mixture, tokens, cuts)


def _arrays(mixture: MixtureShape, device: Device) -> dict[str, NDArray[Any]]:
    """Buffers of random weights, rows for COPIES steps, and a chunk of the most tokens."""
    rng, most, hidden = np.random.default_rng(0), CHUNKS[-1], mixture.hidden
    router = rng.standard_normal((1, mixture.experts * hidden)) * 0.02
    arrays: dict[str, NDArray[Any]] = {"router": router.astype(np.float16)}
    for name, shape in (("gate_up", mixture.gate_up), ("down", mixture.down)):
        panels = rng.integers(0, 256, (shape.row_blocks * shape.panels, shape.panel_bytes), np.uint8)
        # Scales and zero points that overflow nowhere.
        panels[:, shape.number_bytes :].view("<u2")[:] = 0x1400
        arrays[name] = np.tile(panels.reshape(-1), mixture.experts)
    routers = [router_workspace(mixture, rows, device, chunk=False) for rows in ROWS]
    routers += [router_workspace(mixture, tokens, device, chunk=True) for tokens in CHUNKS]
    arrays |= {
        "residual": np.zeros((most, hidden), np.float32),
        "squares": np.zeros((ROWS[-1], hidden // 16), np.float32),
        "gain": np.ones(hidden, np.float32),
        "scales": np.ones(ROWS[-1], np.float32),
        "scaled": np.zeros((ROWS[-1], hidden), np.float16),
        "linear_workspace": np.zeros(max(routers), np.uint8),
        "rows": np.zeros(ROWS[-1], ROW),
        "chunk": np.zeros(1, CHUNK),
    }
    for copy in range(COPIES):
        counts = [*ROWS, *CHUNKS] if copy == 0 else ROWS
        arrays[f"x{copy}"] = rng.standard_normal((max(counts), hidden)).astype(np.float16)
        size = max(mixture_workspace(mixture, rows, device) for rows in counts)
        arrays[f"workspace{copy}"] = np.zeros(size, np.uint8)
    return arrays


def _row_line(
    runner: Runner, mixture: MixtureShape, arrays: dict[str, NDArray[Any]], rows: int, cuts: Cuts | None
) -> str:
    device = runner.device
    steps = [
        launches_of(mixture, device, rows, chunk=False, copy=str(copy), cuts=cuts) for copy in range(COPIES)
    ]
    whole = runner.time([launch for step in steps for launch in step]) / COPIES
    parts = [runner.time([step[i] for step in steps]) / COPIES for i in range(1, 5)]
    active = 0
    for copy in range(COPIES):
        got = runner.download(f"workspace{copy}", arrays[f"workspace{copy}"])
        active += int(got[places_of(mixture, rows, device, cuts).groups :][:4].view("<i4")[0])
    read = active / COPIES * (mixture.gate_up.nbytes + mixture.down.nbytes) / 1e6
    taken = cuts or tuned(mixture, rows=rows, device=device)
    how = ", ".join(_shown(cut) for cut in (taken.gate_up, taken.down))
    shown = " | ".join(f"{part:.1f}" for part in parts)
    speed = read / (parts[1] + parts[2]) * 1e3
    return f"| {rows} | {how} | {active / COPIES:.1f} | {read:.1f} | {whole:.1f} | {shown} | {speed:.0f} |"


def _shown(cut: Held | Tuning | Tile) -> str:
    if isinstance(cut, Held):
        return f"held {cut.warps_k}/{cut.warps} × {cut.abreast}, {cut.stages} stages, {cut.sets}"
    return "tiles" if isinstance(cut, Tile) else f"teams {cut.warps_k}/{cut.warps}, {cut.stages} stages"


def _chunk_lines(runner: Runner, mixture: MixtureShape, tokens: int, cuts: Cuts | None) -> Iterator[str]:
    launches = launches_of(mixture, runner.device, tokens, chunk=True, copy="0", cuts=cuts)
    took = runner.time(launches, repeats=5)
    flop = tokens * mixture.top_k * 2 * 3 * mixture.hidden * mixture.down.k
    how = "in tiles" if cuts else "as the device takes it"
    yield f"chunk of {tokens} {how}: {took:.0f} µs, {flop / took / 1e6:.1f} TFLOP/s"
    count = len(launches) // -(-tokens // longest_piece(mixture))
    first: list[list[Launch]] = [[launch] for launch in launches[:count]]
    parts = ", ".join(f"{runner.time(each, repeats=5):.1f}" for each in first)
    yield f"router, choose, route, gate and up, down, combine by themselves: {parts}"


def _variants(mixture: MixtureShape, rows: int, device: Device, *, variants: bool) -> list[Cuts | None]:
    """None: as the device takes it; other ways to cut."""
    found: list[Cuts | None] = [None]
    best = tuned(mixture, rows=rows, device=device)
    if not variants or not isinstance(best.gate_up, Held) or not isinstance(best.down, Held):
        return found
    found.append(tuned(mixture, rows=rows, device=device, held=False))
    for abreast in (1, 2, 3):
        for sets in (1, 2):
            cuts = []
            for shape, cut in ((mixture.gate_up, best.gate_up), (mixture.down, best.down)):
                bare = replace(cut, abreast=abreast, sets=sets, stages=0)
                available = device.shared_per_block - held_bytes(shape, bare)
                stages = min(available // (cut.warps * abreast * shape.panel_bytes), 9)
                cuts.append(replace(bare, stages=stages))
            if all(cut.stages >= 2 for cut in cuts):
                found.append(Cuts(*cuts))
    return found


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", action="store_true", help="rows with other cuts, too")
    for line in tables(Runner(), variants=parser.parse_args().variants):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

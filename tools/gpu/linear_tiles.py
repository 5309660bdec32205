"""Which tile suits a chunk's linears: µs and TFLOP/s of the best, and of the one that is taken.

python tools/gpu/linear_tiles.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from linear_bench import QWEN3_8B, BenchModel, LinearBench
from runner import Runner

from edgellm.cuda.launch import Launch
from edgellm.kernels.gemm import TILES, Tile, has_counters, shared_bytes, tile_for, tile_workspace
from edgellm.kernels.packing import PackedShape

COPIES = 4
SHOWN = 5


def tiles(shape: PackedShape, tokens: int, runner: Runner, room: int) -> Iterator[Tile]:
    """Those that fit, in up to 8 splits whose sums fit into `room` bytes."""
    for tile in TILES:
        for splits in (1, 2, 4, 8):
            cut = replace(tile, splits=splits)
            steps = shape.k // 64 // splits // tile.warps_k
            # A warp of 64 × 64 has no registers left for adding, see gemm.py.
            large = tile.row_blocks * 16 * tile.tokens // (tile.warps_r * tile.warps_t * 32) > 64
            if splits > 1 and (large or steps < tile.stages or not has_counters(shape, tokens, cut)):
                continue
            if shared_bytes(shape, cut) > runner.device.shared_per_block or tile.tokens > max(tokens, 32):
                continue
            if tile_workspace(shape, tokens, cut) <= room:
                yield cut


def tables(runner: Runner, buckets: Sequence[int], model: BenchModel = QWEN3_8B) -> Iterator[str]:
    """For each linear and each bucket the fastest tiles, fastest first, then what `tile_for` takes."""
    room = 64 << 20
    bench = LinearBench(runner, model)
    linears = {name: linear for name, linear in model.linears.items() if linear.epilogue != "logits"}
    widest = max(linear.shape.k for linear in linears.values())
    longest = max(linear.shape.outputs for linear in linears.values())
    runner.allocate("prompt", max(buckets) * widest * 2)
    runner.allocate("result", max(buckets) * longest * 4)
    runner.allocate("chunk", 16)
    x = np.random.default_rng(2).standard_normal(max(buckets) * widest, np.float32)
    runner.upload("prompt", x.astype(np.float16))
    for name in linears:
        bench.fill(name, COPIES)
    todo = {
        (name, tokens): list(tiles(linear.shape, tokens, runner, room))
        for tokens in buckets
        for name, linear in linears.items()
    }
    launches: list[Launch] = []
    for (name, tokens), cuts in todo.items():
        for cut in cuts:
            launches += bench.prompt_launches(name, tokens, cut)
    runner.prepare(launches)
    yield "| linear | tokens | tile | µs | TFLOP/s |"
    yield "|---|---|---|---|---|"
    for (name, tokens), cuts in todo.items():
        shape = linears[name].shape
        runner.upload("chunk", np.array([0, 0, tokens, 0], np.int32))
        times = {cut: bench.time_prompt(name, tokens, cut) for cut in cuts}
        taken = tile_for(shape, tokens=tokens, device=runner.device)
        if taken not in times:
            times[taken] = bench.time_prompt(name, tokens, taken)
        for cut in [*sorted(times, key=lambda cut: times[cut])[:SHOWN], taken]:
            rate = 2 * shape.n * shape.k * tokens / times[cut] / 1e6
            parts = (
                f"{cut.row_blocks * 16} × {cut.tokens}, warps {cut.warps_r} × {cut.warps_t} × {cut.warps_k}"
            )
            kind = f"{parts}, {cut.stages} stages, {cut.splits} splits" + " (taken)" * (cut == taken)
            yield f"| {name} | {tokens} | {kind} | {times[cut]:.1f} | {rate:.0f} |"
    runner.release()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 2048])
    options = parser.parse_args()
    for line in tables(Runner(), options.tokens):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

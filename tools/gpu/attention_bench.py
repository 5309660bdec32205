"""How long attention takes: decode beside what reading its caches does, on few multiprocessors, and prefill.

python tools/gpu/attention_bench.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Final

import numpy as np
from attention_checks import Layer, decode_launches, prefill_launches, shape
from runner import Runner, poisoned

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels.attention_prefill import prefill_attention_workspace
from edgellm.kernels.attention_shape import COUNTERS_BYTES, AttentionShape, Cache, rope_table
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.model.rotary import make_rotary

QWEN3_8B: Final = shape(32, 8, 128, 16, norm=True)
SMOLLM2: Final = shape(9, 3, 64, 16)


class Chain:
    """Decode attention of a model, layer after layer, each with caches of its own; of Qwen3-8B by default."""

    def __init__(
        self,
        runner: Runner,
        rng: np.random.Generator,
        rows: int,
        length: int,
        *,
        int8: bool,
        model: AttentionShape = QWEN3_8B,
    ) -> None:
        self._runner, self._rows = runner, rows
        self.shape = kind = replace(model, max_seq=length, kv="int8" if int8 else "fp16")
        self.layers = 36 if length < 5000 else 8
        self.read = rows * 2 * kind.kv_heads * length * (kind.row_bytes + 2 * int8)
        self._layer = Layer(rng, replace(kind, max_seq=16), 1)
        table = np.zeros(rows, ROW)
        table["slot"], table["past"] = np.arange(rows), length - 1
        small = self._layer.arrays() | {
            "rows": table,
            "qkv": rng.standard_normal((rows, kind.qkv_width), np.float32).astype("<f2"),
            "rope": rope_table(make_rotary(kind.head_size, 1e6), length),
        }
        self.small = {name: array for name, array in small.items() if name not in ("held", "scales")}
        held, scales = kind.cache_bytes(rows), kind.scale_bytes(rows)
        self.large = {"held": held * self.layers, "scales": max(16, scales * self.layers)}
        self.large |= {"out": rows * kind.heads * kind.head_size * 2, "workspace": 16 << 20}
        self._caches = [
            Cache(At("held", i * held), At("scales", i * scales) if scales else None)
            for i in range(self.layers)
        ]

    def allocate(self) -> None:
        """The buffers that are too large to be made in numpy."""
        for name, size in self.large.items():
            value = 0 if name == "workspace" else 0x11
            self._runner.driver.call("cuMemsetD8", self._runner.allocate(name, size), value, size)

    def launches(self, device: Device) -> list[Launch]:
        """Of all layers, cut for this device."""
        return [
            launch
            for cache in self._caches
            for launch in decode_launches(self.shape, self._layer, self._rows, device, cache)
        ]

    def time(self, device: Device, *, early: bool) -> float:
        """µs of one layer, cut for this device."""
        return self._runner.time(self.launches(device), early=early) / self.layers


DECODE: Final = (
    *((QWEN3_8B, rows, 640) for rows in (1, 2, 4, 8, 16)),
    *((QWEN3_8B, 1, length) for length in (4096, 32704)),
    *((SMOLLM2, rows, 640) for rows in (1, 8, 16)),
)
FEW: Final = ((1, 640), (1, 4096), (4, 640), (8, 640), (8, 4096))
FEW_MULTIPROCESSORS: Final = (16, 14, 8)
PREFILL: Final = ((64, 0), (512, 0), (2048, 0), (512, 3584), (16, 4080), (64, 4032), (256, 3840), (16, 512))


def chains(runner: Runner, model: AttentionShape, rows: int, length: int) -> list[Chain]:
    """With a cache of float16 and one of int8."""
    rng = np.random.default_rng(0)
    return [Chain(runner, rng, rows, length, int8=int8, model=model) for int8 in (False, True)]


def prepare(runner: Runner) -> None:
    """Compile side by side what the benchmark measures."""
    launches: list[Launch] = []
    for model, rows, length in DECODE:
        for chain in chains(runner, model, rows, length):
            for sm in (runner.device.sm, 87):
                launches += chain.launches(replace(runner.device, sm=sm))
    for rows, length in FEW:
        for chain in chains(runner, QWEN3_8B, rows, length):
            for multiprocessors in FEW_MULTIPROCESSORS:
                launches += chain.launches(few(multiprocessors))
    for kind, tokens in product(("fp16", "int8"), {tokens for tokens, _ in PREFILL}):
        model = shape(32, 8, 128, 16, int8=kind == "int8", norm=True)
        launches += prefill_launches(
            replace(model, max_seq=4096), Layer(np.random.default_rng(0), model, 1), tokens, runner.device
        )
    runner.prepare(launches)


def few(multiprocessors: int) -> Device:
    """As on Orin: so many SMs, neither clusters nor early starts."""
    return Device(87, multiprocessors, 163 << 10)


def bench_decode(runner: Runner) -> Iterator[str]:
    """µs of decode attention for a layer, beside what reading its cache takes."""
    kinds = "{} | after | no clusters | after"
    yield f"| heads | rows × tokens | {kinds.format('fp16')} | read alone | {kinds.format('int8')} |"
    yield "|---" * 11 + "|"
    for model, rows, length in DECODE:
        cells = []
        for chain in chains(runner, model, rows, length):
            with runner.buffers(chain.small):
                chain.allocate()
                for device in (runner.device, replace(runner.device, sm=87)):
                    cells += [f"{chain.time(device, early=early):.1f}" for early in (True, False)]
            if chain.shape.kv == "fp16":
                cells.append(f"{chain.read / 3.11e6:.1f}")
        heads = f"{model.heads}/{model.kv_heads} × {model.head_size}"
        yield f"| {heads} | {rows} × {length:,} | " + " | ".join(cells) + " |"


def bench_few(runner: Runner) -> Iterator[str]:
    """What decode attention reads a second, GB, and its µs on few multiprocessors: as many blocks."""
    counts = " | ".join(
        f"{kind}: {multiprocessors}" for kind in ("fp16", "int8") for multiprocessors in FEW_MULTIPROCESSORS
    )
    yield f"| rows × tokens, GB/s (µs) | {counts} |"
    yield "|---" * 7 + "|"
    for rows, length in FEW:
        cells = []
        for chain in chains(runner, QWEN3_8B, rows, length):
            with runner.buffers(chain.small):
                chain.allocate()
                for multiprocessors in FEW_MULTIPROCESSORS:
                    us = chain.time(few(multiprocessors), early=False)
                    cells.append(f"{chain.read / us / 1e3:.0f} ({us:.1f})")
        yield f"| {rows} × {length:,} | " + " | ".join(cells) + " |"


def bench_prefill(runner: Runner) -> Iterator[str]:
    """µs of a layer's attention in prefill at Qwen3-8B's shape, keys in as many parts as fit and in one."""
    yield "| tokens, after | append | attend | parts | in one part | TFLOP/s | int8 attend | in one part |"
    yield "|---" * 8 + "|"
    rng = np.random.default_rng(0)
    for count, past in PREFILL:
        chunk = np.zeros(1, CHUNK)
        chunk["past"], chunk["count"] = past, count
        pairs = count * past + count * (count + 1) // 2
        cells = []
        for int8 in (False, True):
            kind = shape(32, 8, 128, 4096, int8=int8, norm=True)
            layer = Layer(rng, kind, 1)
            qkv = rng.standard_normal((count, kind.qkv_width), np.float32).astype("<f2")
            arrays = layer.arrays() | {"chunk": chunk, "qkv": qkv, "out": poisoned((count, 4096), "<f2")}
            size = prefill_attention_workspace(kind, tokens=count, device=runner.device)
            arrays["workspace"] = np.zeros(max(size, COUNTERS_BYTES), np.uint8)
            with runner.buffers(arrays):
                append, attend = prefill_launches(kind, layer, count, runner.device)
                whole = prefill_launches(kind, layer, count, replace(runner.device, multiprocessors=1))[1]
                appended, attended, alone = (
                    runner.time([launch] * 10) / 10 for launch in (append, attend, whole)
                )
            if int8:
                cells += [f"{attended:.1f}", f"{alone:.1f}"]
            else:
                cells += [f"{appended:.1f}", f"{attended:.1f}", f"{attend.grid[2]}", f"{alone:.1f}"]
                cells.append(f"{4 * pairs * 4096 / attended / 1e6:.0f}")
        yield f"| {count:,}, {past:,} | " + " | ".join(cells) + " |"


def main() -> int:
    """Print the tables of docs/kernels.md."""
    runner = Runner()
    prepare(runner)
    for bench in (bench_decode, bench_few, bench_prefill):
        print("", *bench(runner), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

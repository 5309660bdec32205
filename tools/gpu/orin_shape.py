"""How fast an Orin's multiprocessors would be, seen on a larger GPU: the decode path on as many of them.

    python tools/gpu/orin_shape.py [--engine ENGINE]

Kernels are cut for Orin (no clusters, no dependent launches) and run on 16, 14 or 8 multiprocessors, on those
alone where the driver has green contexts. What they read a second is scaled by the ratio of the clocks and
stands beside what the Orin's memory gives: × 1.5 says that its multiprocessors could read half as much again.
Then whole decode steps of an engine, whose time at the Orin's clock stands beside what its memory takes to
read the weights: the longer one is what such a step takes at least.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from attention_bench import Chain
from few_sms import FewMultiprocessors
from figures import Figures
from limited import Say
from linear_bench import LinearBench
from loaded import opened
from runner import Runner

from edgellm.bench.bare import BareBench
from edgellm.bench.workloads import Workload
from edgellm.enginedir import EngineDir, open_engine
from edgellm.errors import EdgellmError
from edgellm.memory.plan import Shape
from edgellm.model.weights_file import WEIGHTS_FILE, read_weights_header


@dataclass(frozen=True, slots=True)
class Orin:
    """A module, from NVIDIA's data sheets.

    Attributes:
        multiprocessors: of its GPU.
        ghz: of them, at most.
        gb_per_s: of its memory.
        bounded: whether a bound of `figures.H100` is for it.
    """

    name: str
    multiprocessors: int
    ghz: float
    gb_per_s: float
    bounded: bool = True


ORINS: Final = (
    Orin("AGX Orin 64 GB", 16, 1.3, 204.8),
    Orin("AGX Orin 32 GB", 14, 0.93, 204.8, bounded=False),
    Orin("Orin NX 16 GB", 8, 0.918, 102.4),
)
LINEAR_ROWS: Final = (1, 4, 8)
ATTENTION: Final = ((1, 640), (1, 4096), (4, 640), (8, 640), (8, 4096))
"""Rows, and tokens of each."""
LEAST_TOKENS: Final = 4096
"""Of all rows, from which a kernel's time says what it can read; with fewer it is that of a launch."""
STEP_ROWS: Final = (1, 4, 8)
STEP_DEPTH: Final = 512
HEADING: Final = (
    "| as | SMs | kernel | rows | µs | GB/s here | at its clock | × its memory |\n"
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """A kernel on part of the device.

    Attributes:
        kind: `linear` or `attention`.
        name: which, for a person.
        rows: of the step.
        us: that it took.
        read: bytes that it reads.
        bounded: whether that is so much that the time says what it can read.
    """

    kind: str
    name: str
    rows: int
    us: float
    read: int
    bounded: bool = True


def headroom(measured: Measured, orin: Orin, clock_ghz: float) -> tuple[float, float, float]:
    """GB/s here, at the Orin's clock, and the latter over its memory's."""
    here = measured.read / measured.us / 1e3
    scaled = here * orin.ghz / clock_ghz
    return here, scaled, scaled / orin.gb_per_s


def linears(runner: Runner) -> Iterator[Measured]:
    """Qwen3-8B's, each among others of its kind, larger than any L2."""
    bench = LinearBench(runner)
    # Side by side: one after the other they would take minutes.
    runner.prepare(
        launch
        for name in bench.model.linears
        for rows in LINEAR_ROWS
        for launch in bench.launches(name, rows, 0)
    )
    for name, linear in bench.model.linears.items():
        bench.fill(name)
        for rows in LINEAR_ROWS:
            us = bench.time(name, rows, early=False)
            yield Measured("linear", name, rows, us, linear.shape.nbytes)
    runner.release()


def attention(runner: Runner) -> Iterator[Measured]:
    """Of Qwen3-8B's shape, each layer with caches of its own."""
    rng = np.random.default_rng(0)
    todo = [(int8, rows, length) for int8 in (False, True) for rows, length in ATTENTION]
    chains = [Chain(runner, rng, rows, length, int8=int8) for int8, rows, length in todo]
    runner.prepare(launch for chain in chains for launch in chain.launches(runner.device))
    for (int8, rows, length), chain in zip(todo, chains, strict=True):
        with runner.buffers(chain.small):
            chain.allocate()
            us = chain.time(runner.device, early=False)
        kind = "attention" if not int8 else "attention int8"
        name = f"{kind}, {length} tokens"
        yield Measured(kind, name, rows, us, chain.read, rows * length >= LEAST_TOKENS)


def run(say: Say, figures: Figures) -> None:
    """Print the table, each line when it is known; the smallest headroom of each kind is a figure."""
    least: dict[str, float] = {}
    clock = None
    for orin in ORINS:
        driver = FewMultiprocessors(orin.multiprocessors)
        if clock is None:
            clock = driver.facts.clock_khz / 1e6
            held = f"held to {driver.partition}" if driver.partition else "not held to any: no green contexts"
            say(f"- {driver.facts.name} at {clock:.2f} GHz; multiprocessors: {held}\n\n{HEADING}")
        runner = Runner(driver, driver.compiler())
        for measured in (*linears(runner), *attention(runner)):
            here, scaled, share = headroom(measured, orin, clock)
            say(
                f"| {orin.name} | {orin.multiprocessors} | {measured.name} | {measured.rows} | "
                f"{measured.us:.1f} | {here:.0f} | {scaled:.0f} | {share:.2f} |"
            )
            if orin.bounded and measured.bounded:
                least[measured.kind] = min(share, least.get(measured.kind, share))
                figures.add(f"Orin's shape {measured.kind} least × its memory", least[measured.kind])
        driver.close()


def run_steps(engine: EngineDir, say: Say) -> None:
    """Whole decode steps on each Orin's multiprocessors, without dependent launches."""
    weights = read_weights_header(engine.path / WEIGHTS_FILE)
    read = weights.bytes - weights.offsets["layers.0.attention_norm"]  # all but the embedding
    say(
        f"\n{engine.model_name}, {STEP_DEPTH} tokens in front\n\n"
        "| as | SMs | rows | ms/step here | at its clock | its memory's, weights alone | tok/s at most |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    shape = Shape(max(STEP_ROWS), 1024, max(STEP_ROWS))
    for orin in ORINS:
        driver = FewMultiprocessors(orin.multiprocessors)
        clock = driver.facts.clock_khz / 1e6
        with (
            driver.compiles(),
            opened(engine.path, engine.spec, shape, open_driver=lambda: driver) as executor,  # noqa: B023
        ):
            bench = BareBench(executor)
            for rows in STEP_ROWS:
                workload = Workload("tg", 64, STEP_DEPTH, rows)
                step = float(np.median(bench.run(workload, 3))) / workload.tokens
                computing, reading = step * clock / orin.ghz, read / orin.gb_per_s / 1e9
                say(
                    f"| {orin.name} | {orin.multiprocessors} | {rows} | {1e3 * step:.2f} | "
                    f"{1e3 * computing:.1f} | {1e3 * reading:.1f} | {rows / max(computing, reading):.0f} |"
                )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, metavar="ENGINE", help="whole steps of it, too")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="add figures there, as lines of JSON")
    args = parser.parse_args()
    try:
        run(_say, Figures(args.figures))
        if args.engine is not None:
            run_steps(open_engine(args.engine), _say)
    except EdgellmError as error:
        print(f"orin_shape: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

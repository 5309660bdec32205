"""The best cuts of a model's decode linears, found within whole steps: a table to bring `tuned`'s rule to.

    python tools/gpu/linear_sweep.py [--models qwen3-8b,smollm2-135m] [--rows 1,2,4,8,16] [--seconds 55]

A linear alone says little: what a cut costs shows in the kernel behind it. So every candidate is measured in
a step of the model's linears, in their order, the others as they are best so far. First for each linear ways
that differ in kind (joins, registers or shared memory for x, row blocks abreast, warps), then the stages and
what is asked for early of the best one. Lines come as they are found; what is best so far holds when time is
up, of which each bucket has its share.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from linear_bench import QWEN3_8B, SMOLLM2, BenchModel, LinearBench
from runner import Runner

from edgellm.cuda.launch import Device
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.linear_cut import Tuning, shared_bytes
from edgellm.kernels.linear_measured import Measured
from edgellm.kernels.linear_tuned import candidates, tuned
from edgellm.kernels.packing import PackedShape

MODELS: Final = {model.name.lower(): model for model in (QWEN3_8B, SMOLLM2)}
ROWS: Final = (8, 16, 1, 4, 2)
"""What is worth most first."""
ORDER: Final = ("gate-up", "down", "qkv", "o", "head")
"""Of linears: those with the most bytes first."""
KINDS: Final = 12
"""Candidates of different kinds for each linear."""
REPEATS: Final = 9


def kinds(shape: PackedShape, rows: int, device: Device, cut: Tuning) -> list[Tuning]:
    """The expected best of each kind of cut, the best of all, `cut`, first."""
    found: dict[tuple[object, ...], Tuning] = {_kind(cut): cut}
    for other in candidates(shape, rows=rows, device=device):
        if len(found) < KINDS:
            found.setdefault(_kind(other), other)
    return list(found.values())


def _kind(cut: Tuning) -> tuple[object, ...]:
    return cut.slabs, cut.held, cut.abreast, cut.warps > 8, cut.warps // cut.warps_k


def variations(shape: PackedShape, rows: int, device: Device, cut: Tuning) -> list[Tuning]:
    """The same with other stages, and more or less that is asked for early; those that fit."""
    found = []
    for stages in (cut.stages, cut.stages + 1, cut.stages - 1, 3):
        for early in (1, 2, stages - 1):
            other = replace(cut, stages=stages, early=early)
            fits = shared_bytes(shape, rows, other) <= device.shared_per_block
            if stages >= 2 and 1 <= early < stages and fits and other != cut:
                found.append(other)
    return list(dict.fromkeys(found))


def named(cut: Tuning) -> str:
    """A cut in a line."""
    x = "registers" if cut.held else "shared"
    parted = cut.join if cut.slabs == 1 else f"{cut.join} {cut.slabs}"
    return (
        f"{cut.blocks} blocks, {parted}, {cut.warps_k} of {cut.warps} warps, {cut.abreast} abreast, "
        f"x in {x}, {cut.stages} stages, {cut.early} early, {cut.sets} sets, {cut.blocks_per_sm} on an SM"
    )


@dataclass(slots=True)
class Sweep:
    """The search for one model and bucket.

    Attributes:
        cuts: the best so far, by linear.
        us: of a step with them.
    """

    bench: LinearBench
    rows: int
    until: float
    cuts: dict[str, Tuning] = field(default_factory=dict)
    us: float = 0.0

    def run(self) -> Iterator[str]:
        """Lines of a table."""
        device, linears = self.bench.runner.device, self.bench.model.linears
        shapes = {name: each.shape for name, each in linears.items()}
        self.cuts = {name: tuned(shape, rows=self.rows, device=device) for name, shape in shapes.items()}
        self._prepare(self.cuts.items())
        self.us = first = self.bench.step(self.rows, self.cuts, repeats=REPEATS)
        yield self._line("all", f"{first:.0f}", "as `tuned` has them")
        for others in (kinds, variations):
            if time.monotonic() > self.until:
                break
            todo = {name: others(shapes[name], self.rows, device, self.cuts[name]) for name in ORDER}
            self._prepare((name, cut) for name, cuts in todo.items() for cut in cuts)
            for name, cuts in todo.items():
                yield from self._try(name, cuts)
        for name, cut in self.cuts.items():
            yield self._line(name, "best", named(cut))
        yield self._line("all", f"{self.us:.0f}", f"× {first / self.us:.3f} as fast as `tuned` has them")

    def _prepare(self, cuts: Iterable[tuple[str, Tuning]]) -> None:
        self.bench.runner.prepare(
            launch for name, cut in cuts for launch in self.bench.launches(name, self.rows, 0, cut)
        )

    def _try(self, name: str, cuts: Sequence[Tuning]) -> Iterator[str]:
        before = self.cuts[name]
        for cut in cuts:
            if cut == before or time.monotonic() > self.until:
                continue
            us = self.bench.step(self.rows, {**self.cuts, name: cut}, repeats=REPEATS)
            yield self._line(name, f"{us:.0f}", named(cut))
            if us < self.us:
                self.us, self.cuts[name] = us, cut

    def _line(self, name: str, us: str, cut: str) -> str:
        return f"| {self.bench.model.name} | {self.rows} | {name} | {us} | {cut} |"


def sweep(
    runner: Runner, models: Sequence[BenchModel], buckets: Sequence[int], seconds: float
) -> Iterator[str]:
    """The tables of all, each bucket with its share of the time; then what was best, to be pasted."""
    started = time.monotonic()
    best: dict[Measured, Tuning] = {}
    yield "| model | rows | linear | µs of a step's linears | cut |"
    yield "| --- | ---: | --- | ---: | --- |"
    parts = len(models) * len(buckets)
    done = 0
    for model in models:
        bench = LinearBench(runner, model)
        for name in model.linears:
            bench.fill(name)
        for rows in buckets:
            done += 1
            search = Sweep(bench, rows, started + seconds * done / parts)
            yield from search.run()
            sm, multiprocessors = runner.device.sm, runner.device.multiprocessors
            for name, cut in search.cuts.items():
                best[Measured(sm, multiprocessors, model.linears[name].shape, rows)] = cut
        runner.release()
    yield "\nFor `edgellm/kernels/linear_measured.py`:\n"
    for measured, cut in best.items():
        yield f"    {measured}: {cut},"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="of: %(default)s")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=55, help="default: %(default)s")
    options = parser.parse_args()
    models = [MODELS[name] for name in options.models.split(",")]
    rows = [int(each) for each in options.rows.split(",")]
    if not set(rows) <= set(BUCKETS):
        parser.error(f"rows are among {', '.join(map(str, BUCKETS))}")
    for line in sweep(Runner(), models, rows, options.seconds):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

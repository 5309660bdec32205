"""Everything that a GPU can tell about edgellm, in the order of its worth, each step with a time limit.

    python tools/measure_gpu.py --output DIR [--checkpoint M.gguf] [--wheels DIR] [--budget 1500]

Whoever has a board or a card runs this to publish figures. Each step's output goes to a file of its own in
DIR while it runs; `summary.md` has the steps with their verdicts, and what was measured beside what it is to
reach, and is there from the first step on. A step that fails, or runs out of time, ends no other.

Needs the driver, Python 3.10 or newer, and edgellm's `test` extra with CUDA's: installed, or as wheels in a
directory, without a network. What needs no GPU, such as building engines, goes on beside the first steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

# Only what needs nothing but Python: wheels may yet have to be unpacked.
from figures import gates_table, read_figures
from limited import Outcome, Say, run_limited

TOOLS: Final = Path(__file__).resolve().parent
LARGE: Final = "qwen3-8b"
MODELS: Final = (LARGE, "smollm2-135m")
TINY: Final = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe")
BUILDING_S: Final = 900.0
SHORTEST_S: Final = 10.0
"""What is left of a budget for a step to be begun."""

Run = Callable[..., Outcome]


@dataclass(frozen=True, slots=True)
class Step:
    """Something to run.

    Attributes:
        name: of its file.
        command: behind Python.
        limit_s: that it may take.
        engines: whether it needs them built.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    engines: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for.

    Attributes:
        output: directory of all that comes out.
        engines: directory of engines.
        checkpoint: a real model, or None.
        large: whether the large shape is measured, too.
        seed: of everything that is random, or None.
        references: directory of what `edgellm doctor --record` wrote of models, or None.
    """

    output: Path
    engines: Path
    checkpoint: Path | None = None
    large: bool = True
    seed: int | None = None
    references: Path | None = None

    @property
    def figures(self) -> Path:
        """Where every step adds its figures."""
        return self.output / "figures.jsonl"


def steps_of(options: Options) -> list[Step]:
    """All of them, in the order of their worth: right, fast, whole, then everything else."""
    engines, figures = str(options.engines), ("--figures", str(options.figures))
    seed = () if options.seed is None else ("--seed", str(options.seed))
    models = ",".join(MODELS if options.large else MODELS[1:])
    model = LARGE if options.large else MODELS[1]
    real = () if options.checkpoint is None else ("--checkpoint", str(options.checkpoint))
    proved = [*TINY, str(options.checkpoint) if options.checkpoint else MODELS[1]]
    recorded = () if options.references is None else ("--references", str(options.references))
    check = (str(TOOLS / "gpu_check.py"), *figures, *seed, "--parts")
    kept = ("--engines", engines, "--models", models)

    def tool(name: str, *flags: str) -> tuple[str, ...]:
        return (str(TOOLS / "gpu" / name), *flags)

    found = [
        Step("kernels", (*check, "kernels", "--kernel-limit", "120"), 240),
        Step("memory", (*check, "sampling,memory"), 60),
        Step("benchmark", (*check, "benchmark", *kept, "--profile", "1,8,16,t512"), 240, engines=True),
        Step("networks", (*check, "networks", *real), 180),
        Step("daemon", (*check, "daemon", *kept), 150, engines=True),
        Step("proofs", tool("proofs.py", "--engines", engines, *recorded, *seed, *proved), 150, engines=True),
        Step("linears", tool("linear_bench.py"), 120),
        Step("linear_sweep", tool("linear_sweep.py"), 120),
        Step(
            "orin_shape",
            tool("orin_shape.py", *figures, "--engine", str(options.engines / model)),
            150,
            engines=True,
        ),
        Step(
            "corun",
            tool("corun.py", str(options.engines / model), *figures, "--seconds", "8"),
            120,
            engines=True,
        ),
        Step("attention", tool("attention_bench.py"), 90),
        Step("mixtures", tool("moe_bench.py"), 120),
        Step("sampling", tool("sample_checks.py", "--bench"), 90),
        Step("sanitizer", (*check, "sanitizer", "--sanitizer-limit", "60"), 600),
    ]
    if options.large:
        proof = ("--engines", engines, *recorded, "--length", "16", *seed, LARGE)
        found.insert(9, Step("proof_large", tool("proofs.py", *proof), 240, engines=True))
    return found


class Engines:
    """Engines being built beside what needs none.

    Args:
        command: that builds them.
        environment: of it.
        log: gets its output.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, run: Run) -> None:
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(
            target=self._build, args=(command, environment, log, run), name="engines", daemon=True
        )
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether they are there, at most so many seconds from now."""
        self._thread.join(timeout_s)
        return self.outcome is not None and self.outcome.passed

    def _build(self, command: Sequence[str], environment: Mapping[str, str], log: Path, run: Run) -> None:
        with log.open("w", encoding="utf-8") as file:
            self.outcome = run(command, limit_s=BUILDING_S, say=_into(file), environment=environment)


class Measurement:
    """Runs steps and keeps the summary.

    Args:
        options: what is asked for.
        environment: variables that every step gets.
        budget_s: for all of them.
        say: gets a line for each step.
        run: runs a command with a limit.
    """

    def __init__(
        self,
        options: Options,
        environment: Mapping[str, str],
        *,
        budget_s: float,
        say: Say = print,
        run: Run = run_limited,
    ) -> None:
        self._options = options
        self._environment = environment
        self._end = time.monotonic() + budget_s
        self._say = say
        self._run = run
        self._rows: list[str] = []

    def run(self, steps: Sequence[Step]) -> bool:
        """All steps, one after the other; whether all passed."""
        self._options.output.mkdir(parents=True, exist_ok=True)
        engines = self._building() if any(step.engines for step in steps) else None
        good = True
        self._write_summary()
        for step in steps:
            if step.engines and engines is not None and not engines.wait(max(0.0, self._left)):
                verdict, seconds = "not run: its engines could not be built, see engines.txt", 0.0
            elif self._left < SHORTEST_S:
                verdict, seconds = "not run: no time was left", 0.0
            else:
                outcome = self._step(step)
                verdict, seconds = outcome.verdict, outcome.seconds
            good &= verdict == "passed"
            self._rows.append(f"| {step.name} | {verdict} | {seconds:.0f} |")
            self._say(f"{step.name}: {verdict}, {seconds:.0f} s")
            self._write_summary()
        return good

    def summary(self) -> str:
        """Markdown: the steps so far, and the figures beside what they are to reach."""
        return "\n".join(
            [
                "# measure_gpu",
                "",
                "| step | | s |",
                "| --- | --- | ---: |",
                *self._rows,
                "",
                "What the figures are to reach is for one NVIDIA H100.",
                "",
                gates_table(read_figures(self._options.figures)),
                "",
            ]
        )

    @property
    def _left(self) -> float:
        return self._end - time.monotonic()

    def _step(self, step: Step) -> Outcome:
        limit = min(step.limit_s, self._left)
        with (self._options.output / f"{step.name}.txt").open("w", encoding="utf-8") as file:
            return self._run(
                [sys.executable, *step.command],
                limit_s=limit,
                say=_into(file),
                environment=self._environment,
            )

    def _building(self) -> Engines:
        names = MODELS if self._options.large else MODELS[1:]
        command = [sys.executable, str(TOOLS / "gpu" / "random_engines.py"), "--engines"]
        command += [str(self._options.engines), *reversed(names)]
        return Engines(command, self._environment, self._options.output / "engines.txt", self._run)

    def _write_summary(self) -> None:
        (self._options.output / "summary.md").write_text(self.summary(), encoding="utf-8")


def environment_with(
    wheels: Path | None, output: Path, install: Callable[..., object] = subprocess.run
) -> dict[str, str]:
    """Variables with which Python finds edgellm, and what it needs; wheels are unpacked into the output.

    Args:
        install: runs pip.

    Raises:
        CalledProcessError: pip does not take them.
    """
    places = [str(TOOLS.parent)]
    if wheels is not None:
        site = output / "site"
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        install([*pip, "--upgrade", "--target", str(site), *files], check=True)
        places.insert(0, str(site))
    places += filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(places)}


def main() -> int:
    """Measure; 1 if a step did not pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="of engines (default: in the output)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a real model to compare, too")
    parser.add_argument(
        "--references", type=Path, metavar="DIR", help="what `edgellm doctor --record` wrote, as NAME.npz"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="what is not installed, as wheels")
    parser.add_argument("--steps", metavar="STEP,…", help="not all of them, in this order")
    parser.add_argument("--small", action="store_true", help="without the 8B shape: for a board of 8 GB")
    parser.add_argument("--budget", type=float, default=3600, metavar="S", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, help="of everything random; default: another one each run")
    parser.add_argument("--list", action="store_true", help="print the steps and their limits, and end")
    args = parser.parse_args()
    output = args.output.resolve()
    engines = (args.engines or output / "engines").resolve()
    checkpoint = args.checkpoint and args.checkpoint.resolve()
    references = args.references and args.references.resolve()
    options = Options(output, engines, checkpoint, not args.small, args.seed, references)
    steps = steps_of(options)
    if args.steps is not None:
        known = {step.name: step for step in steps}
        if unknown := [name for name in args.steps.split(",") if name not in known]:
            parser.error(f"--steps {', '.join(unknown)}: there are {', '.join(known)}")
        steps = [known[name] for name in args.steps.split(",")]
    if args.list:
        for step in steps:
            print(f"{step.name:12} {step.limit_s:4.0f} s  python {' '.join(step.command)}")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    environment = environment_with(args.wheels, output)
    measurement = Measurement(options, environment, budget_s=args.budget, say=_print)
    good = measurement.run(steps)
    print(f"\n{measurement.summary()}")
    return int(not good)


def _print(line: str) -> None:
    print(line, flush=True)


def _into(file: TextIO) -> Say:
    """What writes lines to a file at once."""

    def say(line: str) -> None:
        print(line, file=file, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())

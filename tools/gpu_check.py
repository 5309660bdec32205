"""Does edgellm compute on this GPU, and how fast: what a board's owner runs first.

    python tools/gpu_check.py                       everything below, built with random weights
    python tools/gpu_check.py --checkpoint M.gguf   a real model beside the CPU executor in float32, too

    kernels     every kernel beside its float64 or float32 reference, on fresh random inputs, outputs poisoned
    networks    small networks of each family beside float32, and the checkpoint; KL in nats
    sampling    tokens that the device chose beside the host's sampler
    memory      device memory that steps take after READY
    benchmark   tokens per second of known shapes
    daemon      the same through the daemon's socket, beside the bare executor
    sanitizer   compute-sanitizer's memcheck and racecheck, kernel group by kernel group

Everything is printed as soon as it is known. Needs the `test` extra and CUDA; the output is Markdown.
"""

from __future__ import annotations

import argparse
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

from figures import Figures
from limited import Say, run_limited
from network_checks import check_checkpoint, check_networks
from random_engines import random_engine
from sanitized import GROUPS
from sanitizer import check_sanitizer
from step_checks import check_memory, check_sampling
from throughput import bench_daemon, bench_executor

from edgellm import __version__
from edgellm.bench.workloads import parse_counts
from edgellm.cuda.driver import Driver
from edgellm.errors import EdgellmError
from edgellm.executor.cuda_build import cache_kind
from edgellm.memory.sizes import show_size

KERNEL_CHECKS: Final = (
    "linear_checks.py",
    "attention_checks.py",
    "sample_checks.py",
    "feed_checks.py",
    "moe_checks.py",
)


def main() -> int:
    """Run the parts asked for; 1 if any failed."""
    args = _parse()
    say = printing(args.report)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    failed = []
    try:
        say(f"# gpu_check\n\n{facts()}, seed {seed}")
        with ExitStack() as stack:
            if args.engines is None:
                args.engines = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for part in args.parts:
                say(f"\n## {part}\n")
                started = time.monotonic()
                try:
                    good = PARTS[part](args, seed, say)
                except EdgellmError as error:
                    say(f"\n{part}: {type(error).__name__}: {error}")
                    good = False
                if not good:
                    failed.append(part)
                say(f"\n{part}: {'passed' if good else 'FAILED'}, {time.monotonic() - started:.1f} s")
    except EdgellmError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    say(f"\n**{'FAILED: ' + ', '.join(failed) if failed else 'passed'}**")
    return bool(failed)


def facts() -> str:
    """What this runs on.

    Raises:
        DeviceError: there is no CUDA, or no device that will do.
    """
    driver = Driver()
    known = driver.facts
    free, total = driver.memory()
    driver.close()
    return (
        f"- {known.described}, {show_size(known.device.shared_per_block)} shared per block, "
        f"{show_size(free)} of {show_size(total)} free{', unified memory' if known.integrated else ''}\n"
        f"- {platform.machine()}, Python {platform.python_version()}, edgellm {__version__}"
    )


def printing(report: Path | None) -> Say:
    """What prints at once, and keeps it in a file, too."""

    def say(text: str) -> None:
        print(text, flush=True)
        if report is not None:
            with report.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    if report is not None:
        report.write_text("", encoding="utf-8")
    return say


def _kernels(args: argparse.Namespace, seed: int, say: Say) -> bool:
    """Programs of their own: a fault of the device in one does not touch the others."""
    good = True
    for name in KERNEL_CHECKS:
        say(f"### {name}\n\n```")
        program = Path(__file__).parent / "gpu" / name
        command = [sys.executable, str(program), "--seed", str(seed)]
        done = run_limited(command, limit_s=args.kernel_limit, say=say)
        say(f"```\n\n{name}: {done.verdict}, {done.seconds:.1f} s\n")
        good &= done.passed
    return good


def _networks(args: argparse.Namespace, seed: int, say: Say) -> bool:
    caches = [cache_kind(name) for name in args.caches.split(",")]
    good = check_networks(caches, seed, say)
    if args.checkpoint is not None:
        say("")
        good &= check_checkpoint(args.checkpoint, caches, say, Figures(args.figures))
    return good


def _sampling(args: argparse.Namespace, seed: int, say: Say) -> bool:  # noqa: ARG001 - as every part
    return check_sampling(seed, say)


def _memory(args: argparse.Namespace, seed: int, say: Say) -> bool:
    return check_memory(seed, say, Figures(args.figures))


def _benchmark(args: argparse.Namespace, seed: int, say: Say) -> bool:  # noqa: ARG001
    for name in args.models.split(","):
        engine = random_engine(args.engines, name, slots=max(args.batches))
        bench_executor(engine, name, args.batches, say, Figures(args.figures), profiled=args.profile)
    return True


def _daemon(args: argparse.Namespace, seed: int, say: Say) -> bool:  # noqa: ARG001
    for name in args.models.split(","):
        engine = random_engine(args.engines, name, slots=max(args.batches))
        bench_daemon(engine, name, sorted({1, min(8, max(args.batches))}), say, Figures(args.figures))
    return True


def _sanitizer(args: argparse.Namespace, seed: int, say: Say) -> bool:
    return check_sanitizer(say, seed=seed, groups=args.groups.split(","), limit_s=args.sanitizer_limit)


PARTS: Final[dict[str, Callable[[argparse.Namespace, int, Say], bool]]] = {
    "kernels": _kernels,
    "networks": _networks,
    "sampling": _sampling,
    "memory": _memory,
    "benchmark": _benchmark,
    "daemon": _daemon,
    "sanitizer": _sanitizer,
}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=_parts, default=list(PARTS), metavar="PART,…", help="not all of them")
    parser.add_argument("--report", type=Path, metavar="FILE", help="keep the output there, too")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="add figures there, as lines of JSON")
    parser.add_argument("--seed", type=int, help="of everything; default: another one each run")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="networks: a real model to compare")
    parser.add_argument("--caches", default="fp16,int8", help="networks: of them (default %(default)s)")
    parser.add_argument(
        "--kernel-limit", type=float, default=600, metavar="S", help="kernels: for each program"
    )
    parser.add_argument(
        "--models", default="qwen3-8b,smollm2-135m", help="benchmark, daemon: random shapes (%(default)s)"
    )
    parser.add_argument(
        "--engines", type=Path, metavar="DIR", help="benchmark, daemon: where engines are, or are kept"
    )
    parser.add_argument(
        "--batches", type=_counts, default=(1, 2, 4, 8, 16), metavar="N,…", help="benchmark, daemon: rows"
    )
    parser.add_argument(
        "--profile",
        default="1,8,t512",
        help="benchmark: rows, and tokens as t512, whose kernels are timed alone (default %(default)s)",
    )
    parser.add_argument(
        "--groups", default=",".join(GROUPS), help="sanitizer: kernel groups (default %(default)s)"
    )
    parser.add_argument(
        "--sanitizer-limit", type=float, default=300, metavar="S", help="sanitizer: for each tool and group"
    )
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    return parts


def _counts(text: str) -> tuple[int, ...]:
    try:
        return parse_counts(text, "--batches", least=1)
    except EdgellmError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())

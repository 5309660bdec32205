"""Measure what the daemon costs and adds, in one run on one machine, and print it as a table.

    python tools/measure_daemon.py ENGINE --markdown

Two daemons are started, one after the other:
    as deployed   --slots slots: READY by phase, idle CPU, request → accepted, peak memory once every
                  slot was full
    one thread    decode through the socket against the bare executor in this process, alternating, per batch

ENGINE is built with `--max-batch-size 8 --max-seq-len 1024`: it needs as many slots as the largest batch, and
its slots are as long as built. Ends with 1 if a figure that has a target misses it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from running_daemon import Daemon, running_daemon
from socket_share import DEPTH, measure_share

from edgellm.bench.endpoint import latencies
from edgellm.bench.facts import engine_facts
from edgellm.bench.load import Load
from edgellm.bench.report import Column, Report, show
from edgellm.bench.statistics import Interval, summarize
from edgellm.bench.workloads import parse_counts
from edgellm.config import EngineConfig
from edgellm.enginedir import EngineDir, open_engine
from edgellm.errors import EdgellmError, ExecutorFault, UsageError
from edgellm.executor.factory import threads_of

PAUSE_S = 0.02
"""Between round trips: the daemon has gone back to sleep."""

TARGETS = {
    "ready_s": ("≤", 1.5),
    "idle_cpu_percent": ("≤", 1.0),
    "accepted_ms_p99": ("≤", 2.0),
    "peak_rss_mb": ("≤", 480.0),
    "socket_ratio": ("≥", 0.95),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a target is missed."""
    args = _parse(argv)
    try:
        engine = open_engine(args.engine)
        _check(engine, args)
        rows = [*_as_deployed(engine, args), *_through_socket(engine, args)]
    except EdgellmError as error:
        print(f"measure_daemon: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    threads = threads_of(EngineConfig(threads=args.threads))
    report = Report(
        facts={
            **engine_facts(engine, threads),
            "as deployed": f"{args.slots} slots of {engine.build.max_seq_len} tokens, {threads} threads",
            "decode compared": f"1 thread, {args.rounds} alternating rounds, {args.tokens} tokens"
            f" behind {DEPTH}, medians, 95 % bootstrap interval of the ratio",
        },
        columns=(
            Column("figure", ("figure",), right=False),
            Column("target", ("target",), right=False),
            Column("measured", ("shown",), right=False),
            Column("met", ("met",), right=False),
        ),
        rows=rows,
    )
    show(report, args.form)
    return 1 if any(row["met"] == "no" for row in rows) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--slots", type=int, default=4, help="of the daemon as deployed (default 4)")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads there (default: as many as cores)"
    )
    parser.add_argument("--starts", type=int, default=5, help="starts that are timed (default 5)")
    parser.add_argument("--round-trips", type=int, default=500, help="request → accepted (default 500)")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds of idling (default 10)")
    parser.add_argument("--batches", default="1,8", help="rows of the decode compared (default 1,8)")
    parser.add_argument("--rounds", type=int, default=12, help="bare against socket (default 12)")
    parser.add_argument("--tokens", type=int, default=64, help="generated in each round (default 64)")
    form = parser.add_mutually_exclusive_group()
    for name in ("json", "csv", "markdown"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    return parser.parse_args(argv)


def _batches(args: argparse.Namespace) -> tuple[int, ...]:
    return parse_counts(args.batches, "--batches", least=1)


def _check(engine: EngineDir, args: argparse.Namespace) -> None:
    needs = {
        "--max-batch-size": (engine.build.max_batch_size, max(args.slots, *_batches(args))),
        "--max-seq-len": (engine.build.max_seq_len, DEPTH + args.tokens),
    }
    for flag, (has, needed) in needs.items():
        if has < needed:
            raise UsageError(f"{engine.path} was built with {flag} {has}: build one with {flag} {needed}")
    for name in ("slots", "starts", "round_trips", "rounds"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.tokens < 2:
        raise UsageError(f"--tokens {args.tokens}: a rate needs at least 2")


def _as_deployed(engine: EngineDir, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """READY, idle CPU, round trips, memory."""
    flags = ["--max-batch-size", str(args.slots)]
    if args.threads:
        flags += ["--threads", str(args.threads)]
    starts = []
    for _ in range(args.starts - 1):
        with running_daemon(args.engine, *flags) as daemon:
            starts.append(daemon)
    with running_daemon(args.engine, *flags) as daemon:
        starts.append(daemon)
        # Once it has worked, not before: what it idles like after its first requests is what counts.
        _fill_slots(daemon, args.slots, engine.build.max_seq_len)
        idle = _idle_cpu(daemon.process, args.idle)
        accepted = summarize(_round_trips(daemon, args.round_trips))
        memory = _memory_mb(daemon.process)
    yield from _ready_rows(starts)
    yield _row("idle CPU, % of a core", idle, "{:.2f}", target="idle_cpu_percent")
    yield _row("request → accepted p50, ms", accepted.p50, "{:.2f}")
    yield _row("request → accepted p99, ms", accepted.p99, "{:.2f}", target="accepted_ms_p99")
    yield _row("peak RSS, MB", memory.pop("peak"), "{:.0f}", target="peak_rss_mb")
    for part, size in {**daemon.memory_mb, **memory}.items():
        yield _row(f"… {part}, MB", size, "{:.0f}")


def _ready_rows(starts: Sequence[Daemon]) -> Iterator[dict[str, Any]]:
    ready = summarize([start.ready_s for start in starts])
    spread = f" ({ready.least:.2f} … {ready.most:.2f} in {ready.n} starts)"
    yield _row("READY from exec, s", ready.median, "{:.2f}" + spread, target="ready_s")
    for phase in starts[0].phases:
        median = summarize([start.phases[phase] for start in starts]).median
        yield _row(f"… {phase}, s", median, "{:.2f}")


def _through_socket(engine: EngineDir, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decode through the socket against the bare executor, at each batch."""
    shares = measure_share(engine, _batches(args), rounds=args.rounds, tokens=args.tokens, threads=1)
    for batch, share in shares.items():
        yield _row(f"bare executor, batch {batch}, tokens/s", share.bare_median, "{:.1f}")
        yield _row(f"through the socket, batch {batch}, tokens/s", share.socket_median, "{:.1f}")
        yield _ratio_row(f"socket ÷ bare, batch {batch}", share.ratio)


def _fill_slots(daemon: Daemon, slots: int, seq_len: int) -> None:
    """Use every slot to its end, so that all memory that the daemon will ever touch is touched."""
    answer = min(32, seq_len - 1)
    prompts = daemon.prompts(seq_len - answer)
    with Load(daemon.endpoint) as load:
        traces = load.closed(prompts.take(slots), answer, slots)
    if errors := [trace.error for trace in traces if not trace.ok]:
        raise ExecutorFault(f"the daemon could not fill its slots: {errors}")


def _round_trips(daemon: Daemon, count: int) -> list[float]:
    """Milliseconds from request to accepted, of one request at a time on the idle daemon."""
    found = []
    prompts = daemon.prompts(8)
    with Load(daemon.endpoint) as load:
        load.closed(prompts.take(1), 1, 1)
        for prompt in prompts.take(count):
            time.sleep(PAUSE_S)
            (trace,) = load.closed([prompt], 1, 1)
            found += latencies(trace)["accepted_ms"]
    return found


def _idle_cpu(process: psutil.Process, seconds: float) -> float:
    """Percent of one core that the process takes while nobody asks for anything."""
    time.sleep(1.0)  # what the last request left to do is done
    before, started = _cpu_s(process.pid), time.monotonic()
    time.sleep(seconds)
    after, ended = _cpu_s(process.pid), time.monotonic()
    return 100 * (after - before) / (ended - started)


def _cpu_s(pid: int) -> float:
    """Seconds that all threads have run. schedstat counts nanoseconds, where stat counts ticks of 10 ms."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def _memory_mb(process: psutil.Process) -> dict[str, float]:
    """proc(5) status: the peak of the resident set, and what is resident now."""
    wanted = {"VmHWM": "peak", "RssAnon": "anonymous at the end", "RssFile": "mapped files at the end"}
    found = {}
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in wanted:
            found[wanted[name]] = int(value.split()[0]) * 1024 / 1e6
    return found


def _row(figure: str, value: float, form: str, *, target: str | None = None) -> dict[str, Any]:
    sign, bound = TARGETS[target] if target else ("", math.nan)
    met = value <= bound if sign == "≤" else value >= bound
    return {
        "figure": figure,
        "target": f"{sign} {bound:g}" if target else "",
        "measured": value,
        "low": math.nan,
        "high": math.nan,
        "shown": form.format(value),
        "met": ("yes" if met else "no") if target else "",
    }


def _ratio_row(figure: str, ratio: Interval) -> dict[str, Any]:
    row = _row(figure, ratio.value, "{:.3f}", target="socket_ratio")
    return {
        **row,
        "low": ratio.low,
        "high": ratio.high,
        "shown": f"{row['shown']} [{ratio.low:.3f}, {ratio.high:.3f}]",
    }


if __name__ == "__main__":
    sys.exit(main())

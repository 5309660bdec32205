"""`edgellm bench ENGINE`: the executor by itself. `edgellm bench --endpoint URL`: what clients get."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgellm.commands.flags import seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgellm.bench.endpoint import Objectives
    from edgellm.bench.load import Trace
    from edgellm.bench.prompts import Prompts
    from edgellm.bench.report import Report
    from edgellm.client import Model

MERGED = 1.05
"""Tokens in a delta on average from which a reader should know."""


class _Flag(NamedTuple):
    """A flag of one of the two modes: its default is filled in here, so that the other mode can refuse it."""

    flags: tuple[str, ...]
    default: Any
    type: Callable[[str], Any]
    metavar: str
    help: str


BARE = {
    "prompts": _Flag(("-p", "--n-prompt"), None, str, "N,…", "prompt lengths; 0: none (default 512)"),
    "generates": _Flag(("-n", "--n-gen"), None, str, "N,…", "generated lengths; 0: none (default 128)"),
    "depths": _Flag(("-d", "--n-depth"), None, str, "N,…", "tokens in the slots before (default 0,512)"),
    "batches": _Flag(("-b", "--batch"), None, str, "N,…", "rows advanced together (default 1,2,4,8)"),
    "repetitions": _Flag(("-r", "--repetitions"), 5, int, "N", "of each test, after a warm-up (default 5)"),
    "threads": _Flag(("-t", "--threads"), 0, int, "N", "CPU threads (default: one for each core)"),
}
"""Names and meanings are llama-bench's, but for -b: batch there is a prompt's chunk, here it is rows."""

ENDPOINT = {
    "concurrency": _Flag(
        ("--concurrency",), "1,2,4,8", str, "N,…", "requests always in flight (default 1,2,4,8)"
    ),
    "request_rate": _Flag(
        ("--request-rate",), None, str, "R,…", "instead: requests a second, arriving at random (Poisson)"
    ),
    "requests": _Flag(("--requests",), 32, int, "N", "requests at each level (default 32)"),
    "prompt_tokens": _Flag(("--prompt-tokens",), 128, int, "N", "length of a prompt (default 128)"),
    "max_tokens": _Flag(("--max-tokens",), 64, int, "N", "length of an answer (default 64)"),
    "shared_prefix": _Flag(
        ("--shared-prefix",), 0, int, "N", "tokens that all prompts begin with (default 0)"
    ),
    "slo_ttft_ms": _Flag(("--slo-ttft-ms",), None, float, "MS", "goodput: time to first token"),
    "slo_itl_ms": _Flag(("--slo-itl-ms",), None, float, "MS", "goodput: a request's mean time per token"),
    "wait": _Flag(("--wait",), 60.0, seconds, "S", "for the daemon to be ready (default 60)"),
    "timeout": _Flag(("--timeout",), 60.0, seconds, "S", "give up after hearing nothing (default 60)"),
    "seed": _Flag(("--seed",), None, int, "N", "of prompts and arrivals (default: another one each run)"),
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("bench", help="measure an engine, or a running daemon")
    parser.add_argument("engine", nargs="?", type=Path, metavar="ENGINE", help="engine directory")
    parser.add_argument("--endpoint", metavar="URL", help="measure the daemon at this socket instead")
    form = parser.add_mutually_exclusive_group()
    for name in ("json", "csv", "markdown"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"print {name}")
    for title, flags in (("with ENGINE", BARE), ("with --endpoint", ENDPOINT)):
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            group.add_argument(*flag.flags, dest=name, type=flag.type, metavar=flag.metavar, help=flag.help)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a request failed."""
    from edgellm.bench.report import show
    from edgellm.errors import ClientError, UsageError

    if (args.engine is None) == (args.endpoint is None):
        raise UsageError("name either an ENGINE directory or --endpoint ipc://PATH")
    ours, others, need = (
        (BARE, ENDPOINT, "--endpoint") if args.endpoint is None else (ENDPOINT, BARE, "an ENGINE directory")
    )
    for name, flag in others.items():
        if getattr(args, name) is not None:
            raise UsageError(f"{flag.flags[-1]} needs {need}")
    for name, flag in ours.items():
        if getattr(args, name) is None:
            setattr(args, name, flag.default)
    if args.endpoint is None:
        show(_bare(args), args.form)
        return 0
    try:
        report = _endpoint(args)
    except ClientError as error:
        print(f"edgellm bench: {error}", file=sys.stderr)
        return error.exit_code
    show(report, args.form)
    return 1 if any(row["errors"] for row in report.rows) else 0


def _bare(args: argparse.Namespace) -> Report:
    from edgellm.bench import bare
    from edgellm.bench.facts import engine_facts
    from edgellm.bench.report import Report
    from edgellm.bench.workloads import compose, parse_counts
    from edgellm.commands.progress import progress_bar
    from edgellm.config import EngineConfig
    from edgellm.enginedir import open_engine, verify_engine
    from edgellm.executor.factory import make_executor, threads_of

    def counts(name: str, least: int = 0) -> tuple[int, ...] | None:
        text = getattr(args, name)
        return None if text is None else parse_counts(text, BARE[name].flags[0], least=least)

    _check_least(args, BARE, repetitions=1, threads=0)
    asked = {
        "prompts": counts("prompts"),
        "generates": counts("generates"),
        "depths": counts("depths"),
        "batches": counts("batches", least=1),
    }
    engine = open_engine(args.engine.absolute())
    workloads = compose(engine.build, **asked)
    with progress_bar() as progress:
        verify_engine(engine, progress, loading=True)
        slots = max(workload.batch for workload in workloads)
        wanted = EngineConfig(threads=args.threads, max_batch_size=slots)
        executor = make_executor(engine, wanted)
        try:
            executor.load(progress)
            bench = bare.BareBench(executor)
            seconds = []
            for index, workload in enumerate(workloads):
                progress(f"{workload.name}, batch {workload.batch}", index / len(workloads))
                seconds.append(bench.run(workload, args.repetitions))
        finally:
            executor.close()
    return Report(
        facts={**engine_facts(engine, threads_of(wanted)), "repetitions": args.repetitions},
        columns=bare.COLUMNS,
        rows=[
            bare.row_of(workload, values, engine.build.max_num_tokens)
            for workload, values in zip(workloads, seconds, strict=True)
        ],
        samples=[{"seconds": values} for values in seconds],
    )


def _endpoint(args: argparse.Namespace) -> Report:
    from edgellm.bench import endpoint as through
    from edgellm.bench.facts import machine_facts
    from edgellm.bench.prompts import PASSAGE, Prompts
    from edgellm.bench.report import Column, Report
    from edgellm.client import Client

    _check_least(args, ENDPOINT, requests=1, prompt_tokens=1, max_tokens=1, shared_prefix=0, seed=0)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    levels = list(_levels(args))
    objectives = through.Objectives(args.slo_ttft_ms, args.slo_itl_ms)
    with Client(args.endpoint) as client:
        client.wait_ready(args.wait)
        model = client.model()
        _check_fits(args, model)
        pool = client.tokenize(PASSAGE)
    prompts = Prompts(pool, length=args.prompt_tokens, shared_prefix=args.shared_prefix, seed=seed)
    measured = _measure(args, levels, prompts, seed)
    rows = [
        through.row_of({field: value}, traces, objectives)
        for (field, value), traces in zip(levels, measured, strict=True)
    ]
    field = levels[0][0]
    return Report(
        facts={
            **machine_facts(),
            "executor": model.executor,
            "model": model.name,
            "quantization": model.quantization,
            "slots": model.max_batch_size,
            "max_seq_len": model.max_seq_len,
            "prompt_tokens": args.prompt_tokens,
            "max_tokens": args.max_tokens,
            "shared_prefix": args.shared_prefix,
            "seed": seed,
            **_objective_facts(objectives),
        },
        columns=through.columns(Column(field.replace("_", " "), (field,)), objectives),
        rows=rows,
        samples=[[through.sample_of(trace) for trace in traces] for traces in measured],
        notes=["latencies: p50 / p90 / p99", *_remarks(levels, measured, rows)],
    )


def _levels(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """The sweep: what is varied, and its values."""
    from edgellm.bench.workloads import parse_counts
    from edgellm.errors import UsageError

    if args.request_rate is None:
        for count in parse_counts(args.concurrency, "--concurrency", least=1):
            yield "concurrency", count
        return
    for word in args.request_rate.split(","):
        try:
            rate = float(word)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf"):
            raise UsageError(
                f"--request-rate {word!r}: write requests a second, as in --request-rate 0.5,1,2"
            )
        yield "request_rate", rate


def _measure(
    args: argparse.Namespace, levels: list[tuple[str, float]], prompts: Prompts, seed: int
) -> list[list[Trace]]:
    """Each level's requests, after a warm-up as wide as the level, which is thrown away."""
    from edgellm.bench.load import Load, poisson_arrivals
    from edgellm.commands.progress import progress_bar

    measured = []
    with Load(args.endpoint, stall_s=args.timeout) as load, progress_bar() as progress:
        for index, (field, value) in enumerate(levels):
            progress(f"{field.replace('_', ' ')} {value:g}", index / len(levels))
            if field == "concurrency":
                wide = int(value)
                load.closed(prompts.take(min(wide, args.requests)), args.max_tokens, wide)
                measured.append(load.closed(prompts.take(args.requests), args.max_tokens, wide))
            else:
                load.closed(prompts.take(1), args.max_tokens, 1)
                arrivals = poisson_arrivals(value, args.requests, seed)
                measured.append(load.open(prompts.take(args.requests), args.max_tokens, arrivals))
    return measured


def _check_least(args: argparse.Namespace, flags: dict[str, _Flag], **least: int) -> None:
    from edgellm.errors import UsageError

    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UsageError(f"{flags[name].flags[-1]} {value}: must be at least {bound}")


def _check_fits(args: argparse.Namespace, model: Model) -> None:
    from edgellm.errors import UsageError

    room = model.max_seq_len - args.max_tokens
    if room < 1:
        raise UsageError(
            f"--max-tokens {args.max_tokens}: a slot holds {model.max_seq_len} tokens and the prompt is one"
            f" at least, so {model.max_seq_len - 1} is the most"
        )
    if args.prompt_tokens > room:
        raise UsageError(
            f"--prompt-tokens {args.prompt_tokens}: a slot holds {model.max_seq_len} tokens, so with"
            f" --max-tokens {args.max_tokens} at most {room}"
        )


def _objective_facts(objectives: Objectives) -> dict[str, float]:
    limits = {"slo_ttft_ms": objectives.ttft_ms, "slo_itl_ms": objectives.itl_ms}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _remarks(
    levels: list[tuple[str, float]], measured: list[list[Trace]], rows: list[dict[str, Any]]
) -> Iterator[str]:
    """What a reader must know to trust the table."""
    from edgellm.bench.endpoint import errors_of

    for (field, value), traces in zip(levels, measured, strict=True):
        if errors := errors_of(traces):
            codes = ", ".join(f"{count} {code}" for code, count in sorted(errors.items()))
            yield f"{field.replace('_', ' ')} {value:g}: {codes}; the other columns leave these requests out"
    if cached := sum(row["cached_tokens"] for row in rows):
        yield f"{cached} prompt tokens were found in a slot and not computed again"
    # NaN, where all requests of a level failed, is not greater than anything.
    merged = max((each for row in rows if (each := row["tokens_per_delta"]) > MERGED), default=None)
    if merged is not None:
        yield f"a delta held {merged:.2f} tokens on average: ITL is between deltas, --json has TPOT too"

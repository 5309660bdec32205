"""`edgellm doctor`: examine the board and say what to change, or prove that an engine computes its model.

Exit code: 0 all is well, 1 there is a warning, 2 there is a failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

SHORTEST_PROMPT: Final = 8


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="examine the board and say what to change",
        description="Examine the board and say what to change. Exit code: 0 well, 1 a warning, 2 a failure.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="examine the files of another system, such as an image"
    )
    proof = parser.add_argument_group("proof", "run an engine here and compare its logits, case by case")
    proof.add_argument("--prove", action="store_true", help="instead of the examination")
    proof.add_argument("--engine", type=Path, metavar="DIR", help="the engine to prove")
    proof.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="a CPU engine of the same checkpoint, best of `edgellm build --compute fp32`",
    )
    proof.add_argument("--length", type=int, default=64, help="tokens of a prompt (default 64)")
    proof.add_argument("--seed", type=int, help="of the prompts (default: a new one each time)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is the worst finding's level."""
    from edgellm.doctor.examination import as_json, as_text, examine, worst
    from edgellm.doctor.host import Host, run_command
    from edgellm.errors import UsageError

    if args.prove:
        return _prove(args)
    if args.engine is not None or args.reference is not None:
        raise UsageError("--engine and --reference go with --prove")
    if args.root is None:
        host = Host(run=run_command)
    elif args.root.is_dir():
        host = Host(args.root)
    else:
        raise UsageError(f"--root {args.root}: is not a directory")
    findings = examine(host)
    print(as_json(findings) if args.json else as_text(findings))
    return int(worst(findings))


def _prove(args: argparse.Namespace) -> int:
    """Compare the two engines and print a table for an issue or a report, each line when it is known."""
    import secrets

    from edgellm.config import EngineConfig
    from edgellm.doctor.proof import heading, prove, row, sample_prompts
    from edgellm.doctor.static_memory import StaticMemory
    from edgellm.enginedir import open_engine
    from edgellm.errors import UsageError
    from edgellm.executor.device import DeviceExecutor
    from edgellm.executor.factory import make_executor

    if args.engine is None or args.reference is None:
        raise UsageError(
            "--prove compares --engine DIR with --reference DIR, an engine of the same checkpoint"
        )
    if args.length < SHORTEST_PROMPT:
        raise UsageError(f"--length {args.length}: a prompt needs {SHORTEST_PROMPT} tokens or more")
    directories = [open_engine(args.engine), open_engine(args.reference)]
    if directories[0].spec != directories[1].spec:
        raise UsageError(f"{args.engine} and {args.reference} are not engines of one model")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    tested, reference = (make_executor(directory, EngineConfig()) for directory in directories)
    try:
        for executor in (reference, tested):
            executor.load(lambda _part, _done: None)
        memory = StaticMemory(tested.driver) if isinstance(tested, DeviceExecutor) else None
        device = tested.driver.facts.described if isinstance(tested, DeviceExecutor) else ""
        slots = min(4, tested.info.max_batch_size, reference.info.max_batch_size)
        prompts = sample_prompts(reference, count=slots, length=args.length, seed=seed)
        print(heading(tested.info, directories[0].model_name, seed, device=device), flush=True)
        good = True
        for case in prove(tested, reference, prompts):
            print(row(case), flush=True)
            good &= case.passed
        if memory is not None:
            taken = memory.taken()
            print(f"\n{taken}: {'passed' if taken.nothing else 'FAILED'}", flush=True)
            good &= taken.nothing
    finally:
        for executor in (reference, tested):
            executor.close()
    return 0 if good else 2

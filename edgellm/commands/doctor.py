"""`edgellm doctor`: examine the board and say what to change, or prove that an engine computes its model.

Exit code: 0 all is well, 1 there is a warning, 2 there is a failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edgellm.doctor.reference import Reference
    from edgellm.enginedir import EngineDir

SHORTEST_TEXT: Final = 8
DEFAULT_LENGTH: Final = 64
TEXTS: Final = 4
"""What a proof's cases want: as many slots beside each other."""


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
        metavar="PATH",
        help="a CPU engine of the same checkpoint, best of `edgellm build --compute fp32`, or its --record",
    )
    proof.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write what the --reference engine says, for a board that has no room for it",
    )
    proof.add_argument("--length", type=int, help="tokens of a text (default 64)")
    proof.add_argument("--seed", type=int, help="of the texts (default: a new one each time)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is the worst finding's level."""
    from edgellm.doctor.examination import as_json, as_text, examine, worst
    from edgellm.doctor.host import Host, run_command
    from edgellm.errors import UsageError

    if args.prove and args.record is not None:
        raise UsageError("--prove and --record are two commands: record first, prove on the board")
    if args.prove:
        return _prove(args)
    if args.record is not None:
        return _record(args)
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
    """Compare an engine with a reference and print a table for a report, each line when it is known."""
    from edgellm.config import EngineConfig
    from edgellm.doctor.proof import heading, prove, row
    from edgellm.doctor.reference import read_reference
    from edgellm.doctor.static_memory import StaticMemory
    from edgellm.enginedir import open_engine
    from edgellm.errors import UsageError
    from edgellm.executor.device import DeviceExecutor
    from edgellm.executor.factory import make_executor

    if args.engine is None or args.reference is None:
        raise UsageError(
            "--prove compares --engine DIR with --reference PATH, an engine of the same checkpoint or what "
            "--record wrote of one"
        )
    directory = open_engine(args.engine)
    if args.reference.is_file():
        if args.length is not None or args.seed is not None:
            raise UsageError(f"--length and --seed: the texts are those that {args.reference} has")
        reference, spec = read_reference(args.reference)
    else:
        source = open_engine(args.reference)
        spec = source.spec
    if directory.spec != spec:
        raise UsageError(f"{args.engine} and {args.reference} are not of one model")
    if not args.reference.is_file():
        reference = _reference_of(source, args)
    tested = make_executor(directory, EngineConfig())
    try:
        tested.load(lambda _part, _done: None)
        memory = StaticMemory(tested.driver) if isinstance(tested, DeviceExecutor) else None
        device = tested.driver.facts.described if isinstance(tested, DeviceExecutor) else ""
        print(heading(tested.info, directory.model_name, reference.seed, device=device), flush=True)
        good = True
        for case in prove(tested, reference):
            print(row(case), flush=True)
            good &= case.passed
        if memory is not None:
            taken = memory.taken()
            print(f"\n{taken}: {'passed' if taken.nothing else 'FAILED'}", flush=True)
            good &= taken.nothing
    finally:
        tested.close()
    return 0 if good else 2


def _record(args: argparse.Namespace) -> int:
    """Write a reference file."""
    from edgellm.doctor.reference import write_reference
    from edgellm.enginedir import open_engine
    from edgellm.errors import UsageError

    if args.reference is None or args.engine is not None:
        raise UsageError("--record FILE writes what --reference DIR says, an engine; it needs no --engine")
    source = open_engine(args.reference)
    reference = _reference_of(source, args)
    try:
        write_reference(args.record, reference, source.spec)
    except OSError as error:
        raise UsageError(f"--record {args.record}: {error.strerror}") from error
    print(f"{args.record}: {len(reference.texts)} texts of {len(reference.texts[0])} tokens")
    return 0


def _reference_of(source: EngineDir, args: argparse.Namespace) -> Reference:
    """What an engine says of texts that it writes itself."""
    import secrets

    from edgellm.config import EngineConfig
    from edgellm.doctor.proof import sample_texts
    from edgellm.doctor.reference import compute_reference
    from edgellm.errors import UsageError
    from edgellm.executor.factory import make_executor

    length = DEFAULT_LENGTH if args.length is None else args.length
    if length < SHORTEST_TEXT:
        raise UsageError(f"--length {length}: a text needs {SHORTEST_TEXT} tokens or more")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    executor = make_executor(source, EngineConfig())
    try:
        executor.load(lambda _part, _done: None)
        return compute_reference(
            executor, sample_texts(executor, count=TEXTS, length=length, seed=seed), seed
        )
    finally:
        executor.close()

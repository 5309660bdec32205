"""`edgellm doctor`: examine the board and say what to change.

Exit code: 0 all is well, 1 there is a warning, 2 there is a failure.
"""

from __future__ import annotations

import argparse
from pathlib import Path


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is the worst finding's level."""
    from edgellm.doctor.examination import as_json, as_text, examine, worst
    from edgellm.doctor.host import Host, run_command
    from edgellm.errors import UsageError

    if args.root is None:
        host = Host(run=run_command)
    elif args.root.is_dir():
        host = Host(args.root)
    else:
        raise UsageError(f"--root {args.root}: is not a directory")
    findings = examine(host)
    print(as_json(findings) if args.json else as_text(findings))
    return int(worst(findings))

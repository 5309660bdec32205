"""The command line, `edgellm COMMAND …`; a command is a module of edgellm.commands with register and run."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from edgellm import __version__
from edgellm.errors import OperatorError, RequestError, UsageError

COMMANDS = (
    "serve",
    "chat",
    "top",
    "build",
    "inspect",
    "tokenize",
    "plan",
    "fetch",
    "bench",
    "doctor",
    "keygen",
)

OUTPUT_FAILED = 74
"""sysexits(3): an error occurred while doing I/O on some file."""

WRITE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors of edgellm's own are one line, not a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # Names that are no UTF-8, a locale without our characters: shown somehow.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        _flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of our output left
        return 141
    except OSError as error:
        # A write to a descriptor names no file; what else can fail is an error of edgellm's.
        if error.errno not in WRITE_ERRORS or error.filename is not None:
            raise
        _discard_output()
        print(f"edgellm: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return OUTPUT_FAILED
    return code


def _run(arguments: Sequence[str]) -> int:
    args = _parse(arguments)
    try:
        code: int = args.run(args)
    except OperatorError as error:
        print(f"edgellm {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except RequestError as error:
        print(f"edgellm {args.command}: {error.code}: {error}", file=sys.stderr)
        return 1
    return code


class _Parser(argparse.ArgumentParser):
    """argparse's, but for the exit code: its own 2 is no reason for systemd to leave the service alone."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="edgellm",
        description="A language model for the other processes on the board: build an engine, serve it.",
    )
    parser.add_argument("--version", action="version", version=f"edgellm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the command at hand is imported: `edgellm chat` must not wait for onnxruntime.
    named = [command for command in COMMANDS if command in arguments[:1]]
    for command in named or COMMANDS:
        importlib.import_module(f"edgellm.commands.{command}").register(subparsers)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse would show the usage of `edgellm`
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _flush() -> None:
    if sys.stdout is not None:  # None: whoever started us closed it
        sys.stdout.flush()


def _discard_output() -> None:
    """Let what cannot be written go nowhere: Python flushes once more when it ends, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

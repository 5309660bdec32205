"""The command line, `edgellm COMMAND …`; a command is a module of edgellm.commands with register and run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from edgellm import __version__
from edgellm.errors import OperatorError, RequestError

COMMANDS = ("serve", "chat", "top", "build", "inspect", "plan", "fetch", "bench", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors of edgellm's own are one line, not a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments)
    try:
        code: int = args.run(args)
    except OperatorError as error:
        print(f"edgellm {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except RequestError as error:
        print(f"edgellm {args.command}: {error.code}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left; without this Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgellm",
        description="A language model for the other processes on the board: build an engine, serve it.",
    )
    parser.add_argument("--version", action="version", version=f"edgellm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the command at hand is imported: `edgellm chat` must not wait for onnxruntime.
    named = [command for command in COMMANDS if command in arguments[:1]]
    for command in named or COMMANDS:
        importlib.import_module(f"edgellm.commands.{command}").register(subparsers)
    return parser

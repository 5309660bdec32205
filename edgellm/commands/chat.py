"""`edgellm chat`: talk to a running daemon, one question or a conversation."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from edgellm.commands.flags import seconds

if TYPE_CHECKING:
    from edgellm.client import Answer, Client
    from edgellm.client.requests import Options

PROMPT = "> "

LOADING_S = 30.0
"""How long a daemon that loads is waited for, unless --wait says otherwise."""

CONNECT_S = 2.0
"""How long one that is not there is."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a running daemon",
        description="Talk to a running daemon. Answers are the most likely ones unless --temperature is set.",
    )
    parser.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="one question; without it, a conversation ('-': from stdin)",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="the daemon's socket (default: $EDGELLM_ENDPOINT, or your own daemon, or the system service)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: server.default_max_tokens, or what is left of the slot if less)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=0.0,
        help="0: always the most likely token; more: draw, the more freely the higher (default %(default)g)",
    )
    drawn = parser.add_argument_group("when tokens are drawn (--temperature above 0)")
    drawn.add_argument(
        "--top-k", type=int, metavar="K", help="only of the K most likely; 0: of all (default 0)"
    )
    drawn.add_argument(
        "--top-p", type=float, metavar="P", help="only of the most likely that make up P (default 1: all)"
    )
    drawn.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="only of those at least P times as likely as the most likely one (default 0: all)",
    )
    drawn.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same answer (default: a random one)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="more than 1: what was said before becomes less likely (default 1)",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated (default: none)"
    )
    parser.add_argument(
        "--priority",
        choices=("critical", "high", "normal", "background"),
        help="whose turn it is when slots are short (default normal)",
    )
    parser.add_argument(
        "--wait",
        type=seconds,
        metavar="S",
        help=f"for a daemon to be ready (default {LOADING_S:g} while it loads, {CONNECT_S:g} to be there)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="tokens and times after each answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, print what comes; the exit code.

    Raises:
        UsageError: there is no question, or it is no text.
    """
    from edgellm.client import Client
    from edgellm.errors import ClientError, RequestError

    conversation = not args.prompt and sys.stdin.isatty()
    question = "" if conversation else _question(args.prompt)
    with Client(args.endpoint, connect_timeout=CONNECT_S) as client:
        try:
            _wait(client, args.wait)
            if conversation:
                return _converse(client, args)
            _answer(client, [*_system(args), {"role": "user", "content": question}], args)
        except (RequestError, ClientError) as error:
            print(_line(error), file=sys.stderr)
            return error.exit_code if isinstance(error, ClientError) else 1
    return 0


def _question(words: list[str]) -> str:
    from edgellm.errors import UsageError

    if words in ([], ["-"]):
        source, raw = "standard input", sys.stdin.buffer.read()
    else:
        source, raw = "the question", os.fsencode(" ".join(words))
    try:
        question = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not question.strip():
        raise UsageError(f"{source} is empty: there is nothing to ask")
    return question


def _wait(client: Client, wait: float | None) -> None:
    if wait is None:
        if client.health().status == "loading":
            client.wait_ready(LOADING_S)
    elif wait > 0:
        client.wait_ready(wait)


def _converse(client: Client, args: argparse.Namespace) -> int:
    """A conversation with its history, until end of file. Ctrl-C ends an answer, not the program."""
    import readline  # noqa: F401 - gives input() its editing and its history

    from edgellm.errors import ClientError, RequestError

    messages = _system(args)
    print("Ctrl-C ends an answer, Ctrl-D the conversation.", file=sys.stderr)
    while True:
        try:
            question = input(PROMPT)
        except UnicodeDecodeError as error:
            print(f"edgellm chat: that was not UTF-8: {error.reason}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return 0
        if not question.strip():
            continue
        turn = {"role": "user", "content": question}
        try:
            text = _answer(client, [*messages, turn], args)
        except (RequestError, ClientError) as error:
            print(_line(error), file=sys.stderr)
            continue
        messages += [turn, {"role": "assistant", "content": text}]


def _answer(client: Client, messages: list[dict[str, str]], args: argparse.Namespace) -> str:
    """Print an answer as it comes; its text, also if Ctrl-C cut it short in a conversation."""
    said: list[str] = []
    started = time.monotonic()
    first: float | None = None
    with client.stream_chat(messages, **_options(args)) as stream:
        try:
            for delta in stream:
                first = time.monotonic() if first is None else first
                said.append(delta.text)
                print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            if args.prompt:
                raise
        finally:
            if said:
                print(flush=True)
        if args.verbose and stream.answer is not None:
            print(_statistics(stream.answer, started, first), file=sys.stderr)
    return "".join(said)


def _options(args: argparse.Namespace) -> Options:
    options: Options = {}
    for name in (
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "priority",
    ):
        if (value := getattr(args, name)) is not None:
            options[name] = value
    return options


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _statistics(answer: Answer, started: float, first: float | None) -> str:
    usage, now = answer.usage, time.monotonic()
    parts = [f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)"]
    if first is not None:
        parts.append(f"first text after {1000 * (first - started):.0f} ms")
    parts.append(f"{usage.completion_tokens} tokens in {now - started:.2f} s")
    if first is not None and usage.completion_tokens > 1 and now > first:
        parts.append(f"{(usage.completion_tokens - 1) / (now - first):.1f} tokens/s")
    return f"[{', '.join(parts)}, {answer.finish_reason}]"


def _line(error: Exception) -> str:
    from edgellm.errors import RequestError

    return (
        f"edgellm chat: {error.code}: {error}"
        if isinstance(error, RequestError)
        else f"edgellm chat: {error}"
    )

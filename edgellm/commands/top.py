"""`edgellm top`: a running daemon at a glance: what its governor thinks, how busy and how hot it is."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm.client import Events, StateChange, Status

SILENCE_S = 3.0
"""Statistics come every second: after so long the daemon is stuck, or gone."""

RATE_S = 0.5
"""--once measures tokens per second for so long."""

LOOK_S = 0.2
"""How often the keyboard is looked at."""

CHANGES = 5
"""Changes of state that are kept in view."""

STYLES = {"NORMAL": "green", "THROTTLED": "yellow", "SHED": "red", "CRITICAL": "bold red"}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "top",
        help="watch a running daemon",
        description="Watch a running daemon: state, load, temperature. q leaves. Not a terminal: as --once.",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="the daemon's socket (default: $EDGELLM_ENDPOINT, or your own daemon, or the system service)",
    )
    parser.add_argument(
        "--events", metavar="URL", help="where it publishes, if server.events_endpoint is configured"
    )
    parser.add_argument("--once", action="store_true", help="print how things are, and leave")
    parser.add_argument("--json", action="store_true", help="for programs: an object a line for each event")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Watch until q or Ctrl-C; the exit code."""
    from edgellm.client import Client, subscribe
    from edgellm.errors import ClientError

    try:
        with Client(args.endpoint) as client:
            status = _without_us(client.status())
            if args.once or not (args.json or sys.stdout.isatty()):
                time.sleep(RATE_S)
                _print_once(status, _without_us(client.status()), as_json=args.json)
                return 0
            endpoint = client.endpoint
        # The client is gone: it would be counted.
        with subscribe(endpoint, at=args.events, silence=SILENCE_S) as events:
            if args.json:
                _print_events(events)
            with contextlib.suppress(KeyboardInterrupt):
                _watch(status, events)
            return 0
    except ClientError as error:
        print(f"edgellm top: {error}", file=sys.stderr)
        return error.exit_code


def _without_us(status: Status) -> Status:
    """A status that was asked for counts who asked."""
    return dataclasses.replace(status, clients=max(0, status.clients - 1))


def _print_once(before: Status, after: Status, *, as_json: bool) -> None:
    speed = Speed(before)
    speed.take(after)
    if as_json:
        print(json.dumps({**dataclasses.asdict(after), "tokens_per_s": speed.generated}))
        return
    for name, value in describe(after, speed):
        print(f"{name:<13}{value}")


def _print_events(events: Events) -> NoReturn:
    from edgellm.client import StateChange

    for event in events:
        kind = "state" if isinstance(event, StateChange) else "stats"
        print(json.dumps({"ev": kind, **dataclasses.asdict(event)}), flush=True)
    raise AssertionError("events have no end")


def _watch(status: Status, events: Events) -> None:
    """Until q is pressed."""
    from rich.live import Live

    from edgellm.client import StateChange
    from edgellm.errors import RequestTimeout

    changes: collections.deque[StateChange] = collections.deque(maxlen=CHANGES)
    speed = Speed(status)
    heard, silent = time.monotonic(), ""
    with (
        _keys() as keys,
        Live(_table(status, speed, changes, silent), screen=True, auto_refresh=False) as live,
    ):
        while "q" not in keys():
            try:
                event = events.receive(LOOK_S)
            except RequestTimeout:
                if time.monotonic() - heard < SILENCE_S:
                    continue
                silent = f"{events.endpoint} is silent"  # it may be restarting: go on listening
            else:
                heard, silent = time.monotonic(), ""
                if isinstance(event, StateChange):
                    changes.append(event)
                else:
                    status = event
                    speed.take(event)
            live.update(_table(status, speed, changes, silent), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Keys that were pressed since the last call; none where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield lambda: ""
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)  # a key at a time, unseen; Ctrl-C stays what it is
    try:
        yield (
            lambda: (
                os.read(descriptor, 64).decode(errors="replace")
                if select.select([descriptor], [], [], 0)[0]
                else ""
            )
        )
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _table(status: Status, speed: Speed, changes: Iterable[StateChange], silent: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in describe(status, speed):
        style = STYLES.get(status.state or "", "") if name == "state" else ""
        table.add_row(name, Text(value, style=style))
    for change in changes:
        clock = time.strftime("%H:%M:%S", time.localtime(change.at))
        arrow = "" if change.previous == change.state else f"{change.previous} → "
        table.add_row(clock, Text(f"{arrow}{change.state}: {change.detail}", STYLES.get(change.state, "")))
    if silent:
        table.add_row("", Text(silent, style="red"))
    table.add_row("", Text("q or Ctrl-C: leave", style="dim"))
    return table


class Speed:
    """Tokens per second between two statistics; None until there are two of the same daemon."""

    def __init__(self, status: Status) -> None:
        self._last = status
        self.generated: float | None = None
        self.prompt: float | None = None

    def take(self, status: Status) -> None:
        """Take newer counters. Those of a daemon that was started again begin anew."""
        last, self._last = self._last, status
        elapsed = status.uptime_s - last.uptime_s
        if elapsed <= 0:
            self.generated = self.prompt = None
            return
        computed = status.prompt_tokens - status.cached_tokens - (last.prompt_tokens - last.cached_tokens)
        self.generated = (status.completion_tokens - last.completion_tokens) / elapsed
        self.prompt = computed / elapsed


def describe(status: Status, speed: Speed) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown."""
    state = status.state or status.status
    if status.state is not None and status.status != "ready":
        state = f"{state}  {status.status}"
    if status.reason not in (None, "none"):
        state = f"{state}  {status.reason}: {status.detail}"
    return [
        ("state", state),
        ("may run", f"{status.batch_cap} of {status.slots} slots, duty {status.duty:.2f}"),
        ("requests", f"{status.running} running, {status.queued} queued, {_clients(status.clients)}"),
        ("tokens/s", f"{_number(speed.generated)} generated, {_number(speed.prompt)} prompt"),
        ("temperature", _temperature(status)),
        ("power", "unknown" if status.watts is None else f"{status.watts:.1f} W"),
        (
            "memory",
            f"{_mebibytes(status.available_bytes)} available, {_mebibytes(status.rss_bytes)} edgellm's",
        ),
        ("so far", _so_far(status)),
        ("up", _duration(status.uptime_s)),
    ]


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def _temperature(status: Status) -> str:
    if status.hottest_c is None:
        return "unknown"
    return f"{status.hottest_c:.1f} °C {status.hottest_zone}"


def _so_far(status: Status) -> str:
    done = status.requests.get("done", 0)
    counts = [
        f"{count} {name}" for name, count in status.requests.items() if name not in ("accepted", "done")
    ]
    entered = [f"{count} × {state}" for state, count in status.transitions.items() if state != "NORMAL"]
    return ", ".join([f"{done} done", *counts, *entered])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _mebibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / (1 << 20):,.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

"""What a second process on the GPU loses by the daemon, and what duty gives it back.

    python tools/gpu/corun.py ENGINE

A neighbour with a context of its own (`neighbour.py`) runs a frame some times a second, as perception does.
Its response times are recorded without a daemon, beside one that is idle, beside one that decodes 8 requests
at duty 1 and at duty 0.5, beside one that is suspended, and without it again. What the daemon gets meanwhile
is counted at its socket.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import Figures
from limited import Say
from neighbour import Recording
from running_daemon import Daemon, running_daemon

from edgellm.bench.load import Load, Trace
from edgellm.bench.statistics import summarize
from edgellm.client import Client
from edgellm.errors import EdgellmError, ExecutorFault

ROWS: Final = 8
"""Requests that the daemon decodes at once."""
PROMPT_TOKENS: Final = 16
ANSWER_TOKENS: Final = 512
SETTLING_S: Final = 1.0
"""Between a change and the recording: requests are in their decode by then, and a limit has taken effect."""
START_TIMEOUT_S: Final = 300.0

WITHOUT: Final = "without the daemon"


@dataclass(frozen=True, slots=True)
class Case:
    """What a neighbour's frames took beside something.

    Attributes:
        name: beside what.
        recording: of the neighbour.
        tokens_per_s: of the daemon meanwhile; None: there was none.
    """

    name: str
    recording: Recording
    tokens_per_s: float | None = None


class Neighbour:
    """The second process, from outside.

    Args:
        command: that starts it.

    Attributes:
        facts: as it says of its device.

    Raises:
        ExecutorFault: it ended.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.facts: dict[str, Any] = self._line()["ready"]

    def record(self, seconds: float) -> Recording:
        """Its frames of so many seconds from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        return Recording(**self._line())

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=30)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ExecutorFault(f"the neighbour ended with {self._process.returncode}")
        found: dict[str, Any] = json.loads(line)
        return found


class Busy:
    """Requests that a daemon always has, from a thread of their own, for as long as the block lasts.

    Args:
        rows: in flight.
    """

    def __init__(self, daemon: Daemon, rows: int, *, answer_tokens: int = ANSWER_TOKENS) -> None:
        self._daemon = daemon
        self._rows = rows
        self._answer_tokens = answer_tokens
        self._traces: list[Trace] = []
        self._ended = threading.Event()
        self._error: EdgellmError | None = None
        self._thread = threading.Thread(target=self._run, name="busy")

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def rate(self, begin: float, end: float) -> float:
        """Tokens a second that came between two times of `time.perf_counter`.

        Raises:
            EdgellmError: what ended the requests.
        """
        if self._error is not None:
            raise self._error
        traces = list(self._traces)
        if failed := [trace.error for trace in traces if trace.error is not None]:
            raise ExecutorFault(f"the daemon refused what should keep it busy: {failed[0]}")
        return tokens_between(traces, begin, end) / (end - begin)

    def _run(self) -> None:
        try:
            prompts = self._daemon.prompts(PROMPT_TOKENS)
            endless = (prompts.take(1)[0] for _ in itertools.count())
            with Load(self._daemon.endpoint) as load:
                load.busy(
                    endless, self._answer_tokens, self._rows, until=self._ended.is_set, into=self._traces
                )
        except EdgellmError as error:
            self._error = error


def tokens_between(traces: Sequence[Trace], begin: float, end: float) -> int:
    """Tokens that arrived in (begin, end]."""
    return sum(count for trace in traces for at, count in list(trace.deltas) if begin < at <= end)


def measure(
    engine: Path, neighbour: Neighbour, seconds: float, *, flags: Sequence[str] = (), rows: int = ROWS
) -> Iterator[Case]:
    """Every case, one after the other.

    Args:
        flags: of the daemon.
        rows: that it decodes at once.
    """
    yield Case(WITHOUT, neighbour.record(seconds))
    sizes = ("--max-batch-size", str(rows), *flags)
    with running_daemon(engine, *sizes, start_timeout_s=START_TIMEOUT_S) as daemon:
        yield Case("beside an idle one", neighbour.record(seconds), 0.0)
        room = _longest_answer(daemon)
        with Client(daemon.endpoint) as client, Busy(daemon, rows, answer_tokens=room) as busy:
            settings: list[tuple[str, Callable[[], object]]] = [
                ("at duty 1", client.resume),
                ("at duty 0.5", lambda: client.limit(duty=0.5)),
                ("suspended", client.suspend),
            ]
            for name, change in settings:
                change()
                time.sleep(SETTLING_S)
                begin = time.perf_counter()
                recording = neighbour.record(seconds)
                yield Case(name, recording, busy.rate(begin, time.perf_counter()))
            client.resume()
    yield Case(f"{WITHOUT}, again", neighbour.record(seconds))


def _longest_answer(daemon: Daemon) -> int:
    with Client(daemon.endpoint) as client:
        return min(ANSWER_TOKENS, client.model().max_seq_len - PROMPT_TOKENS)


def heading(facts: dict[str, Any], hz: float, megabytes: int) -> str:
    """What stands above the rows."""
    mps = facts.get("mps")
    if mps:
        sharing = "MPS is on: kernels of both processes may run at the same time"
    else:
        sharing = (
            "contexts of two processes take turns on the GPU, kernels of both never run at the same time"
            + ("" if mps is False else " (the driver does not say whether MPS is on)")
        )
    unified = ", unified memory" if facts.get("integrated") else ""
    return (
        f"- {facts['device']}{unified}; {sharing}\n"
        f"- neighbour: {hz:g} frames a second, {megabytes} MB read and written by each\n\n"
        "| the neighbour | frames | dropped | p50 ms | p99 ms | largest ms | p99 × alone | daemon tok/s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )


def row(case: Case, alone_p99: float) -> str:
    """A case's line."""
    found = summarize(case.recording.response_ms)
    rate = "" if case.tokens_per_s is None else f"{case.tokens_per_s:.0f}"
    return (
        f"| {case.name} | {found.n} | {case.recording.dropped} | {found.p50:.2f} | {found.p99:.2f} | "
        f"{found.most:.2f} | {found.p99 / alone_p99:.2f} | {rate} |"
    )


def run(engine: Path, say: Say, figures: Figures, *, seconds: float, hz: float, megabytes: int) -> None:
    """Print the table, each line when it is known."""
    program = str(Path(__file__).with_name("neighbour.py"))
    command = [sys.executable, program, "--hz", str(hz), "--megabytes", str(megabytes)]
    with contextlib.closing(Neighbour(command)) as neighbour:
        say(heading(neighbour.facts, hz, megabytes))
        alone = None
        for case in measure(engine, neighbour, seconds):
            p99 = summarize(case.recording.response_ms).p99
            alone = p99 if alone is None else alone
            say(row(case, alone))
            figures.add(f"neighbour p99 ms {case.name}", p99)
            if case.tokens_per_s is not None:
                figures.add(f"daemon tok/s beside the neighbour {case.name}", case.tokens_per_s)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case (default %(default)s)")
    parser.add_argument("--hz", type=float, default=50.0, help="frames a second (default %(default)s)")
    parser.add_argument("--megabytes", type=int, default=100, help="of a frame (default %(default)s)")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="add figures there, as lines of JSON")
    args = parser.parse_args()
    try:
        run(
            args.engine,
            lambda line: print(line, flush=True),
            Figures(args.figures),
            seconds=args.seconds,
            hz=args.hz,
            megabytes=args.megabytes,
        )
    except EdgellmError as error:
        print(f"corun: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

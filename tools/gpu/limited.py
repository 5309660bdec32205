"""A program with a time limit, whose output is there as it comes: what it found before its end counts."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

Say = Callable[[str], None]
"""Takes a line, or several, as soon as they are known."""

GRACE_S: Final = 5.0
"""Between asking a program to end and ending it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program.

    Attributes:
        code: its exit code, −9 and the like after a signal of somebody else's; None: it ran out of time.
        lines: standard output and standard error, in the order in which they came.
        seconds: that it ran.
    """

    code: int | None
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ended by itself, with 0."""
        return self.code == 0

    @property
    def verdict(self) -> str:
        """For a table."""
        if self.code is None:
            return "ran out of time"
        return "passed" if self.code == 0 else f"FAILED ({self.code})"


def run_limited(
    command: Sequence[str],
    *,
    limit_s: float,
    say: Say = lambda _line: None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a program, with all that it starts, for at most so long.

    Args:
        say: gets each line when it comes.
        environment: variables beside this process's own.

    Raises:
        OSError: it cannot be started.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        start_new_session=True,
    )
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        _signal(process, signal.SIGTERM)
        timer = threading.Timer(GRACE_S, _signal, (process, signal.SIGKILL))
        timer.daemon = True
        timer.start()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    lines = []
    try:
        with process.stdout:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                say(lines[-1])
        code = process.wait()
    except BaseException:
        _signal(process, signal.SIGKILL)
        process.wait()
        raise
    finally:
        timer.cancel()
        # What it started and left behind holds the device.
        _signal(process, signal.SIGKILL)
    return Outcome(None if late.is_set() else code, lines, time.monotonic() - started)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To all of the program's session; nobody may be left to get it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return

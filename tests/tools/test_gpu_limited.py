"""A program with a limit: what it said before its end is there, and nothing of it is left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from limited import Outcome, run_limited


def run(text: str, limit_s: float) -> Outcome:
    return run_limited([sys.executable, "-c", text], limit_s=limit_s)


def test_lines_of_both_outputs_come_in_their_order_and_at_once() -> None:
    heard: list[str] = []
    text = "import sys\nprint('one')\nsys.stdout.flush()\nprint('two', file=sys.stderr)\nraise SystemExit(3)"
    done = run_limited([sys.executable, "-c", text], limit_s=60, say=heard.append)
    assert heard == done.lines == ["one", "two"]
    assert (done.code, done.passed, done.verdict) == (3, False, "FAILED (3)")


def test_a_program_that_ends_by_itself_passes() -> None:
    done = run("print('ü', end='')", 60)
    assert (done.lines, done.passed, done.verdict) == (["ü"], True, "passed")


# It ignores being asked, and has a child that would go on.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_what_ran_out_of_time_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limited.GRACE_S", 0.2)
    done = run(STUBBORN, 1.0)
    assert (done.code, done.passed, done.verdict) == (None, False, "ran out of time")
    (line,) = done.lines
    end = time.monotonic() + 10
    while _runs(int(line)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(int(line))


def test_a_child_left_behind_by_a_program_that_passed_ends_too() -> None:
    text = (
        "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']"
    )
    done = run(f"{text}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\nprint(p.pid)", 60)
    assert done.passed
    end = time.monotonic() + 10
    while _runs(int(done.lines[0])) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(int(done.lines[0]))


def test_the_environment_is_this_ones_and_more() -> None:
    text = "import os; print(os.environ['MORE'], os.environ['PATH'])"
    done = run_limited([sys.executable, "-c", text], limit_s=60, environment={"MORE": "here"})
    assert done.lines == [f"here {os.environ['PATH']}"]


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

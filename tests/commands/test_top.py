"""`edgellm top` against a real socket."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import Service
from fake_governor import HEATING_UP, THROTTLED, FakeGovernor

from edgellm.cli import main
from edgellm.client import Status
from edgellm.commands.top import Speed, describe
from edgellm.governor.sensors import Memory, Readings, Zone

STATUS = Status(
    status="ready", uptime_s=3661.0, running=2, queued=1, slots=4, batch_cap=3, clients=1,
    requests={"accepted": 9, "done": 5, "overloaded": 1}, prompt_tokens=100, cached_tokens=40,
    completion_tokens=200, steps=100, rss_bytes=400 << 20, state="NORMAL", reason="none", detail="fine",
    duty=1.0, transitions={"NORMAL": 1}, hottest_zone=None, hottest_c=None, watts=None, available_bytes=None,
)  # fmt: skip


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    readings = Readings(0.0, (Zone("tj-thermal", 88.0, passive=99.0),), memory=Memory(available=2 << 30))
    over = threading.Event()

    def publish() -> None:
        while not over.wait(0.02):
            running.server.publish_statistics()

    with Service(tmp_path) as running:
        running.server.govern(FakeGovernor(THROTTLED, readings))
        thread = threading.Thread(target=publish)
        thread.start()
        yield running
        over.set()
        thread.join()


def test_once(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--endpoint", service.endpoint]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["state"] == f"THROTTLED  heat: {THROTTLED.detail}"
    assert lines["may run"] == "4 of 4 slots, duty 0.50"
    assert lines["requests"] == "0 running, 0 queued, 0 clients"  # top itself does not count
    assert lines["tokens/s"] == "0.0 generated, 0.0 prompt"
    assert lines["temperature"] == "88.0 °C tj-thermal"
    assert lines["memory"].startswith("2,048 MiB available")
    assert lines["so far"] == "0 done, 2 × SHED"


def test_without_a_terminal_it_is_once(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--endpoint", service.endpoint]) == 0
    assert capsys.readouterr().out.startswith("state        THROTTLED")


def test_once_for_programs(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--json", "--endpoint", service.endpoint]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["hottest_c"], told["tokens_per_s"]) == ("THROTTLED", 88.0, 0.0)


def test_events_for_programs(service: Service) -> None:
    arguments = [sys.executable, "-m", "edgellm", "top", "--json", "--endpoint", service.endpoint]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        first = json.loads(program.stdout.readline())
        assert (first["ev"], first["state"]) == ("stats", "THROTTLED")
        service.server.publish_transition(HEATING_UP)
        change = next(e for e in map(json.loads, program.stdout) if e["ev"] == "state")
        assert (change["previous"], change["state"]) == ("NORMAL", "THROTTLED")
        program.send_signal(signal.SIGINT)
        program.stdout.read()
        assert program.wait(10) == 130


@pytest.mark.parametrize("leave", ["q", "Ctrl-C"])
def test_live_at_a_terminal(service: Service, leave: str) -> None:
    parent, child = pty.openpty()
    arguments = [sys.executable, "-m", "edgellm", "top", "--endpoint", service.endpoint]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    before = termios.tcgetattr(child)
    program = subprocess.Popen(arguments, stdin=child, stdout=child, stderr=child, env=environment)
    heard = b""

    def wait_for(text: str) -> None:
        nonlocal heard
        while text.encode() not in heard:
            assert select.select([parent], [], [], 10)[0], heard
            heard += os.read(parent, 65536)

    wait_for(THROTTLED.detail)
    wait_for("88.0 °C tj-thermal")
    wait_for("q or Ctrl-C: leave")
    wait_for("0 clients")  # top itself does not count
    heard = b""
    wait_for("88.0 °C tj-thermal")  # it goes on
    service.server.publish_transition(HEATING_UP)
    wait_for("NORMAL → THROTTLED")
    if leave == "q":
        os.write(parent, b"xq")
    else:
        program.send_signal(signal.SIGINT)
    assert program.wait(10) == 0
    assert termios.tcgetattr(child) == before
    os.close(child)
    os.close(parent)


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--once"], ["--json"], []):
        assert main(["top", *arguments, "--endpoint", "nonsense"]) == 69
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("edgellm top: ")
        assert said.err.count("\n") == 1


def test_speed_is_between_two_statistics() -> None:
    speed = Speed(STATUS)
    assert dict(describe(STATUS, speed))["tokens/s"] == "– generated, – prompt"
    later = replace(STATUS, uptime_s=3663.0, completion_tokens=260, prompt_tokens=150, cached_tokens=60)
    speed.take(later)
    assert dict(describe(later, speed))["tokens/s"] == "30.0 generated, 15.0 prompt"
    speed.take(replace(STATUS, uptime_s=1.0, completion_tokens=0, prompt_tokens=0, cached_tokens=0))
    assert speed.generated is None  # the daemon was started again


def test_how_things_are_described() -> None:
    told = dict(describe(STATUS, Speed(STATUS)))
    assert told["state"] == "NORMAL"
    assert (told["temperature"], told["power"]) == ("unknown", "unknown")
    assert told["memory"] == "unknown available, 400 MiB edgellm's"
    assert told["so far"] == "5 done, 1 overloaded"
    assert told["up"] == "1:01:01"
    loading = replace(STATUS, status="loading", state=None, reason=None, detail=None, watts=12.34)
    told = dict(describe(loading, Speed(loading)))
    assert (told["state"], told["power"]) == ("loading", "12.3 W")
    draining = replace(STATUS, status="draining")
    assert dict(describe(draining, Speed(draining)))["state"] == "NORMAL  draining"
    hot = replace(draining, state="THROTTLED", reason="heat", detail="hot")
    assert dict(describe(hot, Speed(hot)))["state"] == "THROTTLED  draining  heat: hot"
    assert dict(describe(STATUS, Speed(STATUS)))["requests"] == "2 running, 1 queued, 1 client"

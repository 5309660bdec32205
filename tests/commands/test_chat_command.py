"""`edgellm chat` against a real socket."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, Service, echo

from edgellm.cli import main
from edgellm.scheduler.request import Finish, Request


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        service.engine.script = echo
        yield service


def test_one_question(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", "--endpoint", service.endpoint, "--system", "be brief", "--wait", "5", "-v", "hi"]
    assert main([*arguments, "--temperature", "0", "--seed", "4", "--stop", "zzz"]) == 0
    said = capsys.readouterr()
    assert said.out == "system:be brief\nuser:hi\nassistant:\n"
    assert said.err.startswith("[")
    assert "34 prompt tokens (3 cached)" in said.err
    (request,) = service.engine.requests
    assert (request.sampling.temperature, request.sampling.seed) == (0, 4)


def test_the_endpoint_comes_from_the_environment(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLM_ENDPOINT", service.endpoint)
    assert main(["chat", "hi"]) == 0
    assert capsys.readouterr().out == "user:hi\nassistant:\n"


def test_errors_are_one_line_and_an_exit_code(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--endpoint", service.endpoint, "--max-tokens", "9999", "hi"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("edgellm chat: too_long: ")
    assert said.err.count("\n") == 1
    assert main(["chat", "--endpoint", "nonsense", "hi"]) == 69
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["chat", "--endpoint", f"ipc://{tmp_path}/none", "--wait", "0.05", "hi"]) == 69
    assert "nothing answered" in capsys.readouterr().err


def test_a_conversation_has_a_history_and_survives_ctrl_c(service: Service) -> None:
    def endless(engine: FakeEngine, request: Request) -> None:
        engine.say(request.key, b"on and on")

    def short(engine: FakeEngine, request: Request) -> None:
        engine.end(request.key, data=b"fine")

    parent, child = pty.openpty()
    arguments = [sys.executable, "-m", "edgellm", "chat", "--endpoint", service.endpoint]
    environment = {**os.environ, "TERM": "dumb"}
    program = subprocess.Popen(arguments, stdin=child, stdout=child, stderr=child, env=environment)
    os.close(child)

    heard = b""

    def wait_for(text: bytes) -> None:
        nonlocal heard
        while text not in heard:
            assert select.select([parent], [], [], 10)[0], heard
            heard += os.read(parent, 1024)
        heard = heard[heard.index(text) + len(text) :]

    service.engine.script = short
    wait_for(b"> ")
    os.write(parent, b"first\n")
    wait_for(b"fine")
    service.engine.script = endless
    wait_for(b"> ")
    os.write(parent, b"second\n")
    wait_for(b"on and on")
    program.send_signal(signal.SIGINT)
    service.engine.wait(lambda engine: [finish for _, finish in engine.stopped] == [Finish.CANCELLED])
    service.engine.script = short
    wait_for(b"> ")
    os.write(parent, b"third\n")
    wait_for(b"fine")
    wait_for(b"> ")
    os.write(parent, b"\x04")
    assert program.wait(10) == 0
    os.close(parent)
    last = bytes(service.engine.requests[-1].prompt.astype("u1")).decode()
    assert last == ("user:first\nassistant:fine\nuser:second\nassistant:on and on\nuser:third\nassistant:")

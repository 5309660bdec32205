"""`edgellm chat` against a real socket."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
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
    assert main(["chat", "say", "hi"]) == 0  # words need no quotes
    assert capsys.readouterr().out == "user:say hi\nassistant:\n"
    (request,) = service.engine.requests
    assert request.sampling.temperature == 0  # the protocol's default is 1


def test_every_sampling_flag_is_explained_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    _, *flags = re.split(r" --(?=[a-z-]+ [A-Z{])", said.partition("PROMPT one question")[2])
    assert len(flags) >= 12
    for flag in flags:
        assert "(default" in flag, flag


def test_a_daemon_that_loads_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Service(tmp_path, ready=False) as service:
        service.engine.script = echo
        timer = threading.Timer(0.3, service.attach)
        timer.start()
        assert main(["chat", "--endpoint", service.endpoint, "hi"]) == 0
        assert capsys.readouterr().out == "user:hi\nassistant:\n"
        timer.join()
    with Service(tmp_path, ready=False) as service:
        assert main(["chat", "--endpoint", service.endpoint, "--wait", "0", "hi"]) == 1
        assert capsys.readouterr().err.startswith("edgellm chat: loading: ")


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (["-"], b"\xff\xfe", "standard input is not UTF-8"),
        ([], b" \n", "standard input is empty"),
        (["hi", b"\xff"], b"", "the question is not UTF-8"),
        ([" "], b"", "the question is empty"),
        (["--wait", "-3", "hi"], b"", "-3 is no number of seconds"),
    ],
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_what_is_no_question_is_said_to_be_none(
    service: Service, arguments: list[str | bytes], given: bytes, words: str, locale: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgellm", "chat", "--endpoint", service.endpoint, *arguments],
        input=given,
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": locale},
    )
    assert done.returncode == 64
    assert words in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert service.engine.requests == []


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

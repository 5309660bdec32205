"""What every command has in common: exit codes of a wrong command line, and an output that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import Service, echo

from edgellm.cli import main


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        ([], "edgellm"),
        (["nonsense"], "edgellm"),
        (["serve", "--bogus"], "edgellm serve"),
        (["chat", "--max-tokens", "x", "hi"], "edgellm chat"),
        (["build", "model.gguf"], "edgellm build"),
        (["doctor", "here"], "edgellm doctor"),
    ],
)
def test_a_wrong_command_line_is_64_with_the_command_s_usage(
    arguments: list[str], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 64
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"usage: {usage} [")


def test_help_and_version_are_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"], ["serve", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert capsys.readouterr().out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["fetch --list", "top --once --json", "top --json", "chat hi"])
def test_a_full_disk_under_the_output_is_one_line(tmp_path: Path, command: str, unbuffered: str) -> None:
    with Service(tmp_path) as service, Path("/dev/full").open("w") as full:
        service.engine.script = echo
        arguments = command.split()
        if arguments[0] != "fetch":
            arguments += ["--endpoint", service.endpoint]
        program = subprocess.Popen(
            [sys.executable, "-m", "edgellm", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
        while program.poll() is None:
            service.server.publish_statistics()
            try:
                program.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert program.stderr is not None
        said = program.stderr.read()
        program.stderr.close()
    assert (program.returncode, said) == (
        74,
        "edgellm: standard output cannot be written: No space left on device\n",
    )


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "edgellm", "fetch", "--list"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None and left.stderr is not None
        left.stdout.close()
        assert left.stderr.read() == ""
        assert left.wait(20) == 141


def test_what_the_locale_lacks_is_escaped(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "edgellm", "inspect", str(tmp_path / os.fsdecode(b"caf\xc3\xa9\xff"))]
    for encoding, shown in (("utf-8", "caf\u00e9\\udcff"), ("ascii", "caf\\xe9\\udcff")):
        environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
        done = subprocess.run(program, capture_output=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (65, b"")
        assert f"{shown} (checkpoint)" in done.stdout.decode(encoding)

"""docs/operations.md against the program: what it tells one to type exists, and every exit code is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgellm.cli import COMMANDS, main
from edgellm.errors import OperatorError

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def told(pattern: str) -> list[tuple[str, str]]:
    """Each mention of a command line, up to the end of its code span or line: (command, flags)."""
    return [(found[1], found[2]) for found in re.finditer(pattern + r"([^`\n#;&|]*)", DOCUMENT)]


def codes_of(error: type[OperatorError]) -> set[int]:
    return {error.exit_code}.union(*(codes_of(kind) for kind in error.__subclasses__()))


def test_every_command_line_exists(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(r"\bedgellm (?=[a-z])(\w+)\b(?!\.)")
    lines = [(command, flags) for command, flags in lines if command in COMMANDS]
    assert len(lines) >= 10
    for command, flags in lines:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z-]+", flags)) <= known, (command, flags)


def test_every_option_of_the_installer_exists() -> None:
    script = (ROOT / "tools/install.sh").read_text(encoding="utf-8")
    known = set(re.findall(r"^  (--[a-z-]+)", script, re.MULTILINE))
    used = {
        flag
        for line in DOCUMENT.splitlines()
        if "install.sh" in line
        for flag in re.findall(r"--[a-z-]+", line)
    }
    assert used <= known | {"--wait"}


def test_the_table_of_drop_ins_is_what_is_there() -> None:
    table = DOCUMENT.split("### Options of the unit")[1].split("## Configure")[0]
    named = re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(file.stem for file in (ROOT / "systemd/drop-ins").glob("*.conf"))
    usage = (ROOT / "tools/install.sh").read_text(encoding="utf-8").split("USAGE")[1]
    listed = usage.split("--drop-in NAME")[1].split("--no-drop-in")[0].split("):")[1]
    assert sorted(re.findall(r"[a-z-]+", listed)) == sorted(named)


def test_every_exit_code_is_in_a_table() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCUMENT, re.MULTILINE)}
    assert listed >= codes_of(OperatorError) | {0, 1, 2, 130, 141}

"""What the README shows is what the files are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fake_engine import Service, echo

ROOT = Path(__file__).parent.parent


def test_the_req_script_is_shown_whole() -> None:
    assert (ROOT / "examples/python/req.py").read_text() in (ROOT / "README.md").read_text()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples/python/req.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_req_script_gets_an_answer_or_says_how_it_is_used(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.engine.script = echo
        done = run(service.endpoint, "hi")
    assert (done.returncode, done.stdout) == (0, "user:hi\nassistant:\n")
    done = run()
    assert (done.returncode, done.stderr) == (1, "usage: req.py ENDPOINT QUESTION\n")


def test_the_cpp_lines_install_what_the_makefile_names() -> None:
    (wanted,) = re.findall(r"apt install (.*?) \(", (ROOT / "examples/cpp/Makefile").read_text())
    (shown,) = re.findall(r"sudo apt install (.*?)  ", (ROOT / "README.md").read_text())
    assert shown == wanted

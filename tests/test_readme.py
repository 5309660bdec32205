"""What the README shows is what the files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_req_script_is_shown_whole() -> None:
    assert (ROOT / "examples/python/req.py").read_text() in (ROOT / "README.md").read_text()

"""`make demo`, as a newcomer sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"


@pytest.mark.model
def test_the_answer_stands_by_itself(smollm2_gguf: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "\nThe capital of France is Paris.\n" in done.stdout
    assert "READY in" in done.stdout
    assert "stopped" in done.stdout
    assert re.search(r"[^\n]\d{4}-\d\d-\d\d \d\d:", done.stdout) is None  # each log line has its own

"""Loading a model leaves no trace in the user's home: ONNX Runtime's telemetry stays off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ggufs import Llama

LOAD = """
import sys
from pathlib import Path
from edgellm.checkpoint import open_checkpoint
from engines import tiny_executor
tiny_executor(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), compute="int8").close()
"""


def test_loading_a_model_writes_nothing_into_the_home_directory(tmp_path: Path) -> None:
    checkpoint, home = tmp_path / "tiny.gguf", tmp_path / "home"
    Llama().write(checkpoint)
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    environment |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint), str(tmp_path / "engine")], env=environment, check=True
    )
    assert list(home.rglob("*")) == []

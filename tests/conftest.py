"""What all tests share: the real model, fetched once and built once."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TENSORRT_REQUIRED = "EDGELLM_TEST_TENSORRT"
"""Set where TensorRT must be there: its tests then fail rather than stay out."""


_UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("gate", derandomize=True, **_UNTIMED)
settings.register_profile("fuzz", derandomize=False, **_UNTIMED)
settings.load_profile("gate")
"""A commit is judged by the same examples each time; `make fuzz` looks for new ones. How long one takes says
something about the machine's other work, and nothing about the commit."""


def pytest_configure() -> None:
    """Ctrl-C must reach what the tests start, also where a shell runs them in the background: it then ignores
    SIGINT, children inherit that, and who waits for Ctrl-C waits for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests out that need what is not installed, and remember how many."""
    missing: dict[str, Callable[[], bool]] = {
        "tensorrt": lambda: not os.environ.get(TENSORRT_REQUIRED) and not _has_tensorrt(),
        "emulated": lambda: shutil.which("g++") is None,
    }
    for marker, is_missing in missing.items():
        needing = [item for item in items if item.get_closest_marker(marker)]
        if needing and is_missing():
            items[:] = [item for item in items if item not in needing]
            config.hook.pytest_deselected(items=needing)
            config.stash.setdefault(_LEFT_OUT, {})[marker] = len(needing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests did not run: a green line must not hide them."""
    why = {
        "tensorrt": "TensorRT tests did NOT run: no TensorRT is installed "
        "(`pip install edgellm[tensorrt-rtx]` brings one that builds plans without a GPU)",
        "emulated": "tests of CUDA kernels did NOT run: they are compiled for this CPU by g++, which is not "
        "installed (apt install g++)",
    }
    left_out: dict[str, int] = config.stash.get(_LEFT_OUT, {})
    for marker, count in left_out.items():
        terminalreporter.write_line(f"{count} {why[marker]}")


_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def _has_tensorrt() -> bool:
    from edgellm.errors import TensorRtMissing
    from edgellm.tensorrt.api import find_api

    try:
        find_api()
    except TensorRtMissing:
        return False
    return True


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, as `edgellm fetch smollm2-135m` brings it."""
    from edgellm.checkpoint.fetch import fetch

    return fetch("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_engine(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CPU engine of it: 4 slots of 1024 tokens."""
    from edgellm.cli import main

    engine = tmp_path_factory.mktemp("smollm2") / "engine"
    assert main(["build", str(smollm2_gguf), "-o", str(engine), "--max-seq-len", "1024"]) == 0
    return engine

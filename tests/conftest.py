"""What all tests share: the real model, fetched once and built once."""

from __future__ import annotations

from pathlib import Path

import pytest


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

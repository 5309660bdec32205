"""The real file as the `gguf` package reads it, which takes seconds: once for all tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest


@pytest.fixture(scope="session")
def smollm2_reader(smollm2_gguf: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(smollm2_gguf)

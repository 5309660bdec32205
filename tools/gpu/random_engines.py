"""Whole engine directories of known shapes with random weights, kept from one tool to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edgellm.cli import main as edgellm
from edgellm.enginedir import EngineDir, is_engine, open_engine
from edgellm.errors import UsageError

SEQ_LEN: Final = 2560
NUM_TOKENS: Final = 2048
LEAST_SLOTS: Final = 4


def random_engine(folder: Path, name: str, *, slots: int = LEAST_SLOTS) -> EngineDir:
    """The CUDA engine of a shape that `edgellm build --random` knows, int4; built if the folder has none.

    Raises:
        UsageError: it cannot be built, or one that is there is too small.
    """
    path = folder / name
    if not is_engine(path):
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["--random", name, "--quant", "int4", "--executor", "cuda", "-o", str(path)]
        sizes = {"batch-size": max(slots, LEAST_SLOTS), "seq-len": SEQ_LEN, "num-tokens": NUM_TOKENS}
        flags += [word for size, value in sizes.items() for word in (f"--max-{size}", str(value))]
        if code := edgellm(["build", *flags]):
            raise UsageError(f"edgellm build {' '.join(flags)} ended with {code}")
    engine = open_engine(path)
    if engine.build.max_batch_size < slots:
        raise UsageError(f"{path} has {engine.build.max_batch_size} slots and {slots} are needed: remove it")
    return engine

"""Whole engine directories of known shapes with random weights, kept from one tool to the next.

    python tools/gpu/random_engines.py --engines DIR NAME…

`DIR/NAME` is for the CUDA executor, `DIR/NAME-reference` the same model for the CPU executor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.checkpoint.random import random_checkpoint
from edgellm.cli import main as edgellm
from edgellm.enginedir import EngineDir, is_engine, open_engine
from edgellm.errors import EdgellmError, UsageError
from edgellm.model.inventory import take_inventory

SEQ_LEN: Final = 2560
NUM_TOKENS: Final = 2048
LEAST_SLOTS: Final = 4
REFERENCE: Final = "-reference"
REFERENCE_SEQ_LEN: Final = 256
LARGEST_FLOAT32: Final = 8 << 30
"""Bytes of a float32 engine; of larger models activations are in 8 bits, which costs KL of some 0.0005."""


def random_engine(folder: Path, name: str, *, slots: int = LEAST_SLOTS) -> EngineDir:
    """The CUDA engine of a shape that `edgellm build --random` knows, int4; built if the folder has none.

    Raises:
        UsageError: it cannot be built, or one that is there is too small.
    """
    engine = cuda_engine(folder / name, name, slots=slots)
    if engine.build.max_batch_size < slots:
        raise UsageError(
            f"{engine.path} has {engine.build.max_batch_size} slots and {slots} are needed: remove it"
        )
    return engine


def cuda_engine(path: Path, source: str | Path, *, slots: int = LEAST_SLOTS) -> EngineDir:
    """The CUDA engine at `path`, built if there is none.

    Args:
        source: a checkpoint, or the name of a shape.

    Raises:
        UsageError: it cannot be built.
    """
    length, slots = _length(source, SEQ_LEN), max(slots, LEAST_SLOTS)
    sizes = {"batch-size": slots, "seq-len": length, "num-tokens": min(NUM_TOKENS, slots * length)}
    return _built(path, source, ["--executor", "cuda"], sizes)


def reference_engine(path: Path, source: str | Path) -> EngineDir:
    """The CPU engine at `path`, in float32 unless it is too large, built if there is none; for short texts.

    Raises:
        UsageError: it cannot be built.
    """
    sizes = {"batch-size": LEAST_SLOTS, "seq-len": _length(source, REFERENCE_SEQ_LEN)}
    elements = sum(matrices.elements for matrices in take_inventory(_checkpoint(source)))
    compute = "fp32" if 4 * elements <= LARGEST_FLOAT32 else "int8"
    return _built(path, source, ["--compute", compute], sizes)


def _length(source: str | Path, wanted: int) -> int:
    """As many tokens as the model was trained for, at most."""
    return min(wanted, _checkpoint(source).spec.max_context)


def _checkpoint(source: str | Path) -> Checkpoint:
    return open_checkpoint(source) if isinstance(source, Path) else random_checkpoint(source, "int4")


def _built(path: Path, source: str | Path, flags: list[str], sizes: dict[str, int]) -> EngineDir:
    if not is_engine(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        named = [str(source)] if isinstance(source, Path) else ["--random", source, "--quant", "int4"]
        words = [word for size, value in sizes.items() for word in (f"--max-{size}", str(value))]
        command = ["build", *named, *flags, *words, "-o", str(path)]
        if code := edgellm(command):
            raise UsageError(f"edgellm {' '.join(command)} ended with {code}")
    return open_engine(path)


def main() -> int:
    """Build what is missing of the engines of these names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR")
    parser.add_argument("--slots", type=int, default=16, help="of the CUDA engines (default %(default)s)")
    args = parser.parse_args()
    try:
        for name in args.names:
            random_engine(args.engines, name, slots=args.slots)
    except EdgellmError as error:
        print(f"random_engines: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

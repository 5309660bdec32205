"""`edgellm doctor --prove`: CUDA engines beside the CPU executor, both built if they are missing.

    python tools/gpu/proofs.py --engines DIR tiny-llama smollm2-135m M.gguf

What `edgellm doctor --record` wrote of a model elsewhere, as `NAME.npz` below --references, stands in for its
engine: a large model's is soon carried, and slow to compute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from random_engines import REFERENCE, cuda_engine, reference_engine

from edgellm.cli import main as edgellm
from edgellm.errors import EdgellmError


def prove(
    folder: Path, source: str | Path, *, length: int, seed: int | None, references: Path | None = None
) -> bool:
    """Build and compare; whether the engine computes the model.

    Args:
        source: a checkpoint, or the name of a shape.
        length: tokens of a text, where nothing was recorded.
        references: where recorded ones are.

    Raises:
        UsageError: an engine cannot be built.
    """
    name = source.stem if isinstance(source, Path) else source
    flags = ["--engine", str(cuda_engine(folder / name, source).path)]
    if references is not None and (recorded := references / f"{name}.npz").is_file():
        flags += ["--reference", str(recorded)]
    else:
        reference = reference_engine(folder / f"{name}{REFERENCE}", source)
        flags += ["--reference", str(reference.path), "--length", str(length)]
        flags += [] if seed is None else ["--seed", str(seed)]
    return edgellm(["doctor", "--prove", *flags]) == 0


def main() -> int:
    """Prove one after the other; 1 if any is not what it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME|CHECKPOINT", help="a known shape, or a file")
    parser.add_argument("--engines", type=Path, required=True, metavar="DIR", help="where they are, or go")
    parser.add_argument("--references", type=Path, metavar="DIR", help="where recorded ones are, NAME.npz")
    parser.add_argument("--length", type=int, default=24, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    good = True
    for model in args.models:
        print(f"### {Path(model).name}\n", flush=True)
        source = Path(model) if Path(model).exists() else model
        try:
            good &= prove(
                args.engines, source, length=args.length, seed=args.seed, references=args.references
            )
        except EdgellmError as error:
            print(f"proofs: {error}", file=sys.stderr)
            good = False
        print(flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

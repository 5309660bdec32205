"""That a build holds a few blocks of a weight, and never the whole of it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from model_directories import Tensors, write_directory
from numpy.typing import NDArray
from tiny_llama import TinyLlama

from edgellm.checkpoint import open_checkpoint
from edgellm.commands.build import build_config
from edgellm.model.onnx import emit
from edgellm.model.onnx_linear import Compute

WIDE = TinyLlama(1024, 8, 2, 128, 4096, tied=False, rotary_base=1e4, layers=1)
"""gate, up and down have 4 Mi numbers each; q, k and v together half as many."""
BLOCK_BYTES = 1 << 18
BOUND = 4 << 20
"""A byte for each number of a matrix. Of it 1 MiB is a digest's buffer, and 1 MiB a piece of a file."""


def layer_in(method: str, name: str, values: NDArray[np.float32]) -> Tensors:
    """A layer in AWQ's or GPTQ's layout; its numbers mean nothing."""
    n, k = values.shape
    shape = (k, n // 8) if method == "awq" else (k // 8, n)
    return {
        f"{name}.qweight": np.random.default_rng(0).integers(0, 2**31, shape, np.int32),
        f"{name}.qzeros": np.full((k // 128, n // 8), 0x77777777, np.int32),
        f"{name}.scales": np.full((k // 128, n), 0.01, np.float16),
    }


def write(kind: str, path: Path) -> Path:
    """The model as a directory, in float16 or packed, or as a GGUF file."""
    if kind == "f16":
        return write_directory(path, WIDE, dtype=np.float16)
    if kind in ("awq", "gptq"):
        config = {"quantization_config": {"quant_method": kind, "bits": 4, "group_size": 128}}
        return write_directory(
            path, WIDE, config=config, linear=lambda name, values: layer_in(kind, name, values)
        )
    return WIDE.write_gguf(path, kind, kind)


@pytest.mark.parametrize("kind", ["f16", "awq", "gptq", "BF16", "Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_a_build_holds_less_than_a_matrix(
    kind: str, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.model.weights.BLOCK_BYTES", BLOCK_BYTES)
    checkpoint = open_checkpoint(write(kind, tmp_path / "wide"))
    build = build_config(checkpoint.spec, max_seq_len=64)
    tracemalloc.start()
    try:
        emit(checkpoint, tmp_path, build, compute=compute, progress=lambda _name, _fraction: None)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()

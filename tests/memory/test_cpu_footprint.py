"""The CPU footprint's lines against the arrays that the executor really makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import MAX_SEQ_LEN, tiny_executor
from ggufs import Llama

from edgellm.checkpoint import open_checkpoint
from edgellm.memory.cpu import CpuFootprint
from edgellm.memory.plan import Shape, make_plan
from edgellm.model.inventory import take_inventory
from edgellm.model.kv_cache import KvCache

FLOAT, INDEX = 4, 8


@pytest.mark.parametrize("kv_cache", ["fp32", "fp16"])
@pytest.mark.parametrize("slots", [1, 3])
def test_caches_and_sampling_are_what_is_allocated(kv_cache: KvCache, slots: int, tmp_path: Path) -> None:
    Llama().write(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    executor = tiny_executor(checkpoint, tmp_path / "e", compute="int8", kv_cache=kv_cache, slots=slots)
    footprint = CpuFootprint(
        spec=checkpoint.spec, weights=take_inventory(checkpoint), compute="int8", kv_cache=kv_cache
    )
    plan = make_plan(footprint, Shape(slots, MAX_SEQ_LEN, 32))
    lines = {line.name: line.bytes for line in plan.lines}
    assert lines["kv_cache"] == executor._kv.nbytes

    arrays = [executor._logits, executor._scratch, *vars(executor._sampler).values()]
    made = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray) and array.base is None)
    vocabulary = checkpoint.spec.vocab_size
    padding = (
        2 * FLOAT * (-(-vocabulary // 64) * 64 - vocabulary)
    )  # of the sampler's two rows, to blocks of 64
    assert lines["sampling"] == made - padding - slots * INDEX
    executor.close()

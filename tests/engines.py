"""Tiny engines for the tests of emitters and executors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint import Checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.executor.base import Row, Step, Want
from edgellm.executor.cpu import CpuExecutor
from edgellm.model.kv_cache import KvCache
from edgellm.model.onnx import emit

MAX_SEQ_LEN = 48


def tiny_executor(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    compute: Literal["int8", "fp32"],
    kv_cache: KvCache = "fp32",
    slots: int = 1,
    max_num_tokens: int = 32,
) -> CpuExecutor:
    """An executor of the checkpoint, built into `directory` and loaded; slots of MAX_SEQ_LEN tokens."""
    build = BuildConfig(
        max_input_len=MAX_SEQ_LEN - 1,
        max_seq_len=MAX_SEQ_LEN,
        max_batch_size=slots,
        max_num_tokens=max_num_tokens,
        opt_batch_size=slots,
        opt_num_tokens=slots,
    )
    directory.mkdir(exist_ok=True)
    emit(checkpoint, directory, build, compute=compute, kv_cache=kv_cache, progress=lambda part, done: None)
    executor = CpuExecutor(
        directory,
        checkpoint.spec,
        max_batch_size=slots,
        max_seq_len=MAX_SEQ_LEN,
        max_num_tokens=max_num_tokens,
        threads=1,
        kv_cache=kv_cache,
    )
    executor.load(lambda part, done: None)
    return executor


def run(executor: CpuExecutor, *rows: Row) -> NDArray[np.float32]:
    """Run a step; gives the logits of the rows that want them."""
    logits = executor.collect(executor.submit(Step(rows))).logits
    assert logits is not None
    return logits


def row(slot: int, past: int, tokens: Sequence[int], want: Want = Want.LOGITS) -> Row:
    """A row, its tokens as the contract wants them."""
    return Row(slot, past, np.array(tokens, np.int32), want)


def all_logits(executor: CpuExecutor, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits [T, vocab] of every position: each is the last of a prompt once."""
    return np.concatenate([run(executor, row(0, 0, tokens[: n + 1])) for n in range(len(tokens))])

"""Executors of a checkpoint, built into a folder of their own, loaded, and gone again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellm.checkpoint.base import Checkpoint
from edgellm.cuda.driver import Driver
from edgellm.engine_config import BuildConfig
from edgellm.executor.cpu import CpuExecutor
from edgellm.executor.cuda import CudaExecutor
from edgellm.kernels.attention_shape import CacheKind
from edgellm.memory.plan import Shape
from edgellm.model import kernels, onnx
from edgellm.model.spec import ModelSpec

STEP_LIMIT_S = 300.0
"""A step under a sanitizer takes long."""


@contextmanager
def loaded(
    checkpoint: Checkpoint,
    shape: Shape,
    *,
    kv_cache: CacheKind = "fp16",
    open_driver: Callable[[], Driver] = Driver,
) -> Iterator[CudaExecutor]:
    """The checkpoint on the device."""
    with tempfile.TemporaryDirectory() as folder:
        kernels.emit(checkpoint, Path(folder), build_config(shape), progress=_quiet)
        with opened(
            Path(folder), checkpoint.spec, shape, kv_cache=kv_cache, open_driver=open_driver
        ) as executor:
            yield executor


@contextmanager
def opened(
    folder: Path,
    spec: ModelSpec,
    shape: Shape,
    *,
    kv_cache: CacheKind = "fp16",
    dependent_launch: bool = True,
    open_driver: Callable[[], Driver] = Driver,
) -> Iterator[CudaExecutor]:
    """What a folder holds of a network, on the device."""
    executor = CudaExecutor(
        folder,
        spec,
        max_batch_size=shape.max_batch_size,
        max_seq_len=shape.max_seq_len,
        max_num_tokens=shape.max_num_tokens,
        kv_cache=kv_cache,
        dependent_launch=dependent_launch,
        step_limit_s=STEP_LIMIT_S,
        open_driver=open_driver,
    )
    try:
        executor.load(_quiet)
        yield executor
    finally:
        executor.close()


@contextmanager
def exact(checkpoint: Checkpoint, shape: Shape) -> Iterator[CpuExecutor]:
    """The checkpoint on the CPU in float32: the reference for models with real weights."""
    with tempfile.TemporaryDirectory() as folder:
        onnx.emit(
            checkpoint, Path(folder), build_config(shape), compute="fp32", kv_cache="fp32", progress=_quiet
        )
        executor = CpuExecutor(
            Path(folder),
            checkpoint.spec,
            max_batch_size=shape.max_batch_size,
            max_seq_len=shape.max_seq_len,
            max_num_tokens=shape.max_num_tokens,
            threads=len(os.sched_getaffinity(0)),
            kv_cache="fp32",
        )
        try:
            executor.load(_quiet)
            yield executor
        finally:
            executor.close()


def build_config(shape: Shape) -> BuildConfig:
    """Of an engine that holds just that."""
    return BuildConfig(
        max_input_len=shape.max_seq_len - 1,
        max_seq_len=shape.max_seq_len,
        max_batch_size=shape.max_batch_size,
        max_num_tokens=shape.max_num_tokens,
        opt_batch_size=shape.max_batch_size,
        opt_num_tokens=shape.max_batch_size,
    )


def _quiet(_what: str, _done: float) -> None:
    """Nobody watches."""

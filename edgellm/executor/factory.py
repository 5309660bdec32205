"""The executor that an engine was built for, of the size that is asked for."""

from __future__ import annotations

import os

from edgellm.config import EngineConfig
from edgellm.enginedir import EngineDir
from edgellm.errors import ConfigError
from edgellm.executor.base import Executor
from edgellm.memory.plan import Shape


def make_executor(directory: EngineDir, wanted: EngineConfig) -> Executor:
    """Make the executor, not loaded yet; the caller closes it.

    Raises:
        ConfigError: an `engine.*` key asks for more than the engine was built for.
        EngineError: it is to be a TensorRT plan and has none.
    """
    shape = shape_of(directory, wanted)
    if directory.config.edgellm.executor == "cuda":
        from edgellm.executor.cuda import CudaExecutor
        from edgellm.executor.cuda_build import cache_kind

        return CudaExecutor(
            directory.path,
            directory.spec,
            max_batch_size=shape.max_batch_size,
            max_seq_len=shape.max_seq_len,
            max_num_tokens=shape.max_num_tokens,
            kv_cache=cache_kind(directory.kv_cache),
        )
    if directory.config.edgellm.executor == "tensorrt":
        from edgellm.executor.tensorrt import TensorRtExecutor

        return TensorRtExecutor(directory, shape)
    from edgellm.executor.cpu import CpuExecutor

    return CpuExecutor(
        directory.path,
        directory.spec,
        threads=threads_of(wanted),
        max_batch_size=shape.max_batch_size,
        max_seq_len=shape.max_seq_len,
        max_num_tokens=shape.max_num_tokens,
        kv_cache=directory.kv_cache,
    )


def shape_of(directory: EngineDir, wanted: EngineConfig) -> Shape:
    """The sizes that are asked for, or as built where nothing is.

    Raises:
        ConfigError: an `engine.*` key asks for more than the engine was built for.
    """
    return Shape(
        max_batch_size=_limit(directory, wanted, "max_batch_size"),
        max_seq_len=_limit(directory, wanted, "max_seq_len"),
        max_num_tokens=_limit(directory, wanted, "max_num_tokens"),
    )


def threads_of(wanted: EngineConfig) -> int:
    """Threads to run the model with: those asked for, or one for each core that this process may use."""
    return wanted.threads or len(os.sched_getaffinity(0))


def _limit(directory: EngineDir, wanted: EngineConfig, name: str) -> int:
    built: int = getattr(directory.build, name)
    asked: int = getattr(wanted, name)
    if asked > built:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"engine.{name} = {asked}, but {directory.path} was built with {flag} {built}")
    return asked or built

"""An engine's executor, loaded for a benchmark."""

from __future__ import annotations

import os

from edgellm.bench.facts import executor_version, machine_facts
from edgellm.enginedir import EngineDir
from edgellm.executor.base import Executor, Progress


def load_executor(engine: EngineDir, *, slots: int, threads: int, progress: Progress) -> Executor:
    """The executor that the engine was built for, with as many slots as are needed; the caller closes it.

    Args:
        engine: opened.
        slots: at most as built.
        threads: CPU threads that run the model; 0: one for each core available.
        progress: told how far loading is.

    Raises:
        EngineError: the engine cannot be loaded.
    """
    from edgellm.executor.cpu import CpuExecutor

    executor = CpuExecutor(
        engine.path,
        engine.spec,
        max_batch_size=slots,
        max_seq_len=engine.build.max_seq_len,
        max_num_tokens=engine.build.max_num_tokens,
        threads=threads_of(threads),
    )
    executor.load(progress)
    return executor


def threads_of(asked: int) -> int:
    """Threads to run the model with: those asked for, or one for each core available."""
    return asked or len(os.sched_getaffinity(0))


def engine_facts(engine: EngineDir, threads: int) -> dict[str, str | int]:
    """The machine's facts and the engine's, for a report."""
    quantization = engine.config.pretrained_config.quantization
    grouped = f" in groups of {quantization.group_size}" if quantization.group_size else ""
    return {
        **machine_facts(),
        "executor": executor_version(engine.config.edgellm.executor),
        "threads": threads_of(threads),
        "model": engine.model_name,
        "quantization": f"{quantization.quant_algo}{grouped}",
        "compute": engine.compute,
        "max_num_tokens": engine.build.max_num_tokens,
    }

"""What a figure means nothing without: the machine it was measured on, and the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from edgellm import __version__
from edgellm.enginedir import EngineDir


def machine_facts(root: Path = Path("/")) -> dict[str, str | int]:
    """CPU, cores, memory and versions, as far as the system tells.

    Args:
        root: where `proc` is looked for.
    """
    return {
        "edgellm": __version__,
        "cpu": cpu_model(root),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def engine_facts(engine: EngineDir, threads: int) -> dict[str, str | int]:
    """The machine's facts and the engine's, run with `threads` CPU threads, for a report."""
    quantization = engine.config.pretrained_config.quantization
    grouped = f" in groups of {quantization.group_size}" if quantization.group_size else ""
    return {
        **machine_facts(),
        "executor": executor_version(engine.config.edgellm.executor),
        "threads": threads,
        "model": engine.model_name,
        "quantization": f"{quantization.quant_algo}{grouped}",
        "compute": engine.compute,
        "max_num_tokens": engine.build.max_num_tokens,
    }


def executor_version(executor: str) -> str:
    """The executor with the version of the library that it runs on."""
    library = {"cpu": "onnxruntime"}.get(executor)
    if library is None:
        return executor
    return f"{executor} (onnxruntime {importlib.metadata.version(library)})"


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name, and the board's where a device tree has it: ARM's often say just ARMv8."""
    names = [_read(root / "proc/device-tree/model").rstrip("\0\n")]
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "model name":
            names.append(value.strip())
            break
    return ", ".join(filter(None, names)) or platform.processor() or platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

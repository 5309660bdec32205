"""CUDA, TensorRT, ONNX Runtime, and which executors can run with what is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator

from edgellm.doctor.cuda import check_cuda
from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host

LIBRARY_DIRECTORIES = (
    "usr/lib/*-linux-gnu",
    "usr/lib/*-linux-gnu/nvidia",
    "usr/lib/*-linux-gnu/tegra",
    "usr/local/cuda*/lib64",
    "usr/local/cuda*/targets/*/lib",
    "usr/lib",
    "usr/lib64",
)
"""Debian's directories; Jetson Linux's own below them (r36: nvidia, r35: tegra); DRIVE OS's."""

TENSORRT_NEEDED = (10, 15)
"""IAttention and IKVCacheUpdate; JetPack 7.2 has 10.16."""

ONNXRUNTIME_NEEDED = (1, 23, 2)


def check_executors(host: Host) -> Iterator[Finding]:
    """The libraries, then a line for each executor: whether it can run, and what is missing."""
    driver = _library(host, "libcuda.so")
    cuda = _cuda_version(host)
    tensorrt = _library(host, "libnvinfer.so")
    yield _cuda(host, driver, cuda)
    yield _tensorrt(tensorrt)
    yield _cpu(host)
    yield from check_cuda(host, present=driver is not None)
    yield _device_executor("tensorrt", present=tensorrt is not None and tensorrt[:2] >= TENSORRT_NEEDED)


def _cuda(host: Host, driver: tuple[int, ...] | None, version: str | None) -> Finding:
    found = f"toolkit {version}" if version else "no toolkit"
    if driver is not None:
        return Finding("CUDA", Level.OK, f"driver library present, {found}")
    if not host.tegra:
        return Finding("CUDA", Level.OK, "none", "the CPU executor needs none")
    return Finding(
        "CUDA",
        Level.WARN,
        f"no driver library (libcuda.so), {found}",
        "the GPU cannot be used",
        "install nvidia-l4t-cuda, or start the container with the NVIDIA runtime",
    )


def _tensorrt(version: tuple[int, ...] | None) -> Finding:
    if version is None:
        return Finding("TensorRT", Level.OK, "none", "only the tensorrt executor needs it")
    text = ".".join(map(str, version)) or "of an unknown version"
    if version[:2] >= TENSORRT_NEEDED:
        return Finding("TensorRT", Level.OK, text)
    return Finding("TensorRT", Level.OK, text, "older than 10.15, which the tensorrt executor needs")


def _cpu(host: Host) -> Finding:
    check = "executor cpu"
    if not host.live:
        return Finding.not_asked(check, "another system's root: its Python cannot be asked")
    version = _distribution("onnxruntime") or _distribution("onnxruntime-gpu")
    if version is None:
        return Finding(
            check, Level.FAIL, "cannot run", "onnxruntime is not installed", "pip install edgellm again"
        )
    if _numbers(version) < ONNXRUNTIME_NEEDED:
        return Finding(
            check,
            Level.FAIL,
            "cannot run",
            f"onnxruntime {version} is too old",
            "pip install 'onnxruntime>=1.23.2'",
        )
    return Finding(check, Level.OK, "can run", f"onnxruntime {version}")


def _device_executor(name: str, *, present: bool) -> Finding:
    check = f"executor {name}"
    if importlib.util.find_spec(f"edgellm.executor.{name}") is None:
        return Finding(check, Level.OK, "not in this version of edgellm", "the cpu executor serves")
    if not present:
        return Finding(check, Level.OK, "cannot run", "TensorRT is missing or too old, see above")
    return Finding(check, Level.OK, "can run")


def _library(host: Host, name: str) -> tuple[int, ...] | None:
    """The longest version that a library's file names tell; (): there without one; None: not there."""
    versions = [
        _numbers(path.name[len(name) :])
        for directory in LIBRARY_DIRECTORIES
        for path in host.glob(f"{directory}/{name}*")
    ]
    return max(versions, key=lambda version: (len(version), version), default=None)


def _cuda_version(host: Host) -> str | None:
    try:
        version = json.loads(host.text("usr/local/cuda/version.json") or "")["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        # Before CUDA 11.1 it was version.txt; directories are named cuda-12.6 in any case.
        found = [re.fullmatch(r"cuda-(\d+\.\d+)", path.name) for path in host.glob("usr/local/cuda-*")]
        return max((match[1] for match in found if match), key=_numbers, default=None)
    return str(version)


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))

"""What `edgellm build` builds for: executor, precision, caches, devices, what TensorRT may take for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from edgellm.engine_config import Compute
    from edgellm.model.kv_cache import KvCache
    from edgellm.tensorrt.api import Api


class Target(NamedTuple):
    """What the engine is for, checked: flags that belong together, defaults filled in."""

    executor: Literal["cpu", "cuda", "tensorrt"]
    compute: Compute
    kv_cache: KvCache
    sms: tuple[int, ...]
    tensorrt: Api | None
    builder_memory: int | None
    timing_cache: Path


TARGETS: dict[str, tuple[tuple[Compute, ...], tuple[KvCache, ...]]] = {
    "cpu": (("int8", "fp32"), ("fp32", "fp16")),
    "cuda": (("fp16",), ("fp16", "int8")),
    "tensorrt": (("fp16",), ("fp16",)),
}
"""Executor → how it can compute, and what its caches can hold; the defaults first."""


def read_target(args: argparse.Namespace) -> Target:
    """The target that `edgellm build`'s flags name.

    Raises:
        UsageError: they do not go together.
        DeviceError: kernels are to be compiled, and there is no compiler.
        TensorRtMissing: the executor is to be tensorrt, and there is none.
    """
    from edgellm.cuda.bindings import load_nvrtc
    from edgellm.errors import UsageError
    from edgellm.memory.sizes import parse_size
    from edgellm.tensorrt.api import find_api

    for flag, choices in zip(("compute", "kv_cache"), TARGETS[args.executor], strict=True):
        asked = getattr(args, flag)
        if asked is not None and asked not in choices:
            raise UsageError(
                f"--{flag.replace('_', '-')} {asked}: the {args.executor} executor has "
                + " and ".join(choices)
            )
    if args.sm is not None and args.executor == "cpu":
        raise UsageError("--sm: only --executor cuda and tensorrt build for a device")
    for flag in ("builder_memory", "timing_cache"):
        if getattr(args, flag) is not None and args.executor != "tensorrt":
            raise UsageError(f"--{flag.replace('_', '-')}: only --executor tensorrt has a builder")
    sms = read_compute_capabilities(args.sm, args.executor)
    if sms and args.executor == "cuda":
        # Kernels are compiled last, behind minutes of quantizing and gigabytes of weights.
        load_nvrtc()
    try:
        builder_memory = parse_size(args.builder_memory) if args.builder_memory else None
    except ValueError as error:
        raise UsageError(f"--builder-memory: {error}") from None
    computes, caches = TARGETS[args.executor]
    output = args.output.resolve()
    return Target(
        args.executor,
        args.compute or computes[0],
        args.kv_cache or caches[0],
        sms,
        find_api() if args.executor == "tensorrt" else None,
        builder_memory,
        args.timing_cache or output.with_name(f"{output.name}.timing"),
    )


def read_compute_capabilities(text: str | None, executor: str) -> tuple[int, ...]:
    """Compute capabilities as --sm names them, each once: `87,90`; none where there is no --sm.

    Raises:
        UsageError: one is none, or the cuda executor knows no device that has it.
    """
    from edgellm.errors import UsageError
    from edgellm.executor.cuda_kernels import devices_of

    words = [word.strip() for word in text.split(",")] if text else []
    for word in words:
        if not word.isdecimal():
            raise UsageError(f"--sm {text}: {word!r} is no compute capability, such as 87 for 8.7 (Orin)")
    sms = tuple(dict.fromkeys(int(word) for word in words))
    if executor == "cuda":
        try:
            for sm in sms:
                devices_of(sm)
        except ValueError as error:
            raise UsageError(f"--sm {text}: {error}") from None
    return sms

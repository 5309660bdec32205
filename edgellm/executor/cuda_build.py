"""Kernels ahead of time: what an engine launches on each device of a compute capability, compiled into it."""

from __future__ import annotations

from pathlib import Path

from edgellm.cuda.launch import Device
from edgellm.engine_config import BuildConfig
from edgellm.executor.base import Progress
from edgellm.executor.buckets import decode_buckets, prefill_buckets
from edgellm.executor.cuda_kernels import devices_of, write_cubins
from edgellm.executor.cuda_programs import Lowering
from edgellm.executor.program import Program, kernels_of
from edgellm.kernels.attention_shape import CacheKind
from edgellm.memory.plan import Shape
from edgellm.model.network import NETWORK_FILE, read_network
from edgellm.model.spec import ModelSpec
from edgellm.model.weights_file import WEIGHTS_FILE, read_weights_header


def write_kernels(
    directory: Path, spec: ModelSpec, build: BuildConfig, *, kv_cache: str, sm: int, progress: Progress
) -> None:
    """Compile into an engine directory, whose network and weights are there, what it launches.

    Raises:
        BuildError: a kernel does not compile.
        DeviceError: NVRTC is not installed.
        OSError: a file cannot be written.
    """
    programs = [
        program
        for device in devices_of(sm)
        for program in programs_of(directory, spec, build, kv_cache=kv_cache, device=device)
    ]
    write_cubins(directory, kernels_of(programs), sm, lambda done: progress(f"kernels sm_{sm}", done))


def programs_of(
    directory: Path, spec: ModelSpec, build: BuildConfig, *, kv_cache: str, device: Device
) -> list[Program]:
    """Every program of an engine on a device, of the sizes that it is built for.

    Raises:
        EngineError: its files are damaged.
    """
    weights = read_weights_header(directory / WEIGHTS_FILE)
    shape = Shape(build.max_batch_size, build.max_seq_len, build.max_num_tokens)
    lowering = Lowering(
        read_network(directory / NETWORK_FILE),
        spec,
        shape,
        kv_cache=cache_kind(kv_cache),
        device=device,
        weights=weights.offsets,
        weights_bytes=weights.bytes,
    )
    decode = [lowering.decode(rows) for rows in decode_buckets(build.max_batch_size)]
    return decode + [lowering.prefill(tokens) for tokens in prefill_buckets(shape)]


def cache_kind(kv_cache: str) -> CacheKind:
    """The engine's word for its caches, as kernels know it."""
    if kv_cache == "fp16":
        return "fp16"
    if kv_cache == "int8":
        return "int8"
    raise ValueError(f"CUDA caches hold fp16 or int8, not {kv_cache}")

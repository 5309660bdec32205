"""Building a plan: profiles, targets, limits, and what came of it.

A plan has two profiles: 0 for one prompt's chunk, 1 × 1 … max_num_tokens, and 1 for a decode step,
1 … max_batch_size × 1. Building needs no GPU where the library builds ahead (TensorRT-RTX); TensorRT itself
builds on the device, for the device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgellm.checkpoint.base import Checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.errors import BuildError
from edgellm.executor.base import Progress
from edgellm.memory.arena import ALIGNMENT
from edgellm.model.spec import ModelSpec
from edgellm.model.trt import emit_network
from edgellm.tensorrt.api import Api
from edgellm.tensorrt.build_log import BuildLog, FusedLayer, make_logger

DUPLICATED: Final = 1.05
"""Plans whose weights take more than this times the emitted bytes hold some of them twice."""
PADDING: Final = 1 << 20
"""Bytes beyond that, which small models' constants take by their alignment."""
LARGEST_CACHE: Final = 2**31 - 1
"""Elements of a tensor that kernels are sure to index (NVIDIA/TensorRT#3815); plans build beyond it, too."""


_OUT_OF_MEMORY: Final = re.compile(r"out ?of ?memory|memory allocation|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Plan:
    """A built plan and what its log says.

    Attributes:
        data: the serialized engine.
        emitted_bytes: of the network's constants.
        weight_bytes: of the plan's weights on the device.
        activation_bytes: of prompt chunks and of decode steps, with a context for each.
        layers: the fused layers of both profiles.
        warnings: TensorRT's, and ours where weights were duplicated.
    """

    data: Any
    emitted_bytes: int
    weight_bytes: int
    activation_bytes: tuple[int, int]
    layers: list[FusedLayer]
    warnings: list[str]

    def write(self, path: Path) -> None:
        """Write the plan to a file."""
        path.write_bytes(memoryview(self.data))


def build_plan(
    checkpoint: Checkpoint,
    api: Api,
    build: BuildConfig,
    *,
    targets: Sequence[int] = (),
    builder_memory: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress,
) -> Plan:
    """Emit the checkpoint's network and build its plan.

    Args:
        targets: compute capabilities, 86 for 8.6; none: the device at hand.
        builder_memory: most bytes of device memory that trying kernels out may take, or None.
        timing_cache: file of measured kernels, read if it is there and written afterwards.

    Raises:
        BuildError: the network has no TensorRT form, or TensorRT does not build it; says why.
        CheckpointError: a tensor is missing or damaged.
    """
    _require_cache(checkpoint.spec, build)
    capabilities = _capabilities(api, targets)
    trt, log = api.module, BuildLog()
    builder = trt.Builder(make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    net = emit_network(checkpoint, api, network, build, progress=progress)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, progress)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(capability, i)
    if builder_memory is not None:
        for pool in (trt.MemoryPoolType.WORKSPACE, trt.MemoryPoolType.TACTIC_DRAM):
            config.set_memory_pool_limit(pool, builder_memory)
    _add_profiles(builder, config, checkpoint.spec, build, lengths=api.has_lengths)
    cache = open_timing_cache(api, config, timing_cache)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"{api.name} {api.version} does not build this network: {reason_of(log)}")
    weight_bytes = log.weight_bytes or 0
    warnings = list(log.warnings)
    if weight_bytes > DUPLICATED * net.weight_bytes + PADDING:
        warnings.append(
            f"the plan's weights take {weight_bytes / 1e6:.1f} MB and {net.weight_bytes / 1e6:.1f} were "
            "emitted: TensorRT holds some of them twice"
        )
    if cache is not None and timing_cache is not None:
        try:
            timing_cache.write_bytes(memoryview(cache.serialize()))
        except OSError as error:
            warnings.append(f"the timing cache {timing_cache} cannot be written: {error.strerror}")
    prefill, decode = [*log.activation_bytes, 0, 0][:2]
    return Plan(data, net.weight_bytes, weight_bytes, (prefill, decode), log.layers(), warnings)


def longest_chunk(build: BuildConfig) -> int:
    """Most tokens of a prompt that go in one run: never more than a cache takes."""
    return min(build.max_num_tokens, build.max_seq_len)


def _require_cache(spec: ModelSpec, build: BuildConfig) -> None:
    if spec.num_key_value_heads * build.max_seq_len * spec.head_size * 2 % ALIGNMENT:
        raise BuildError(
            f"--max-seq-len {build.max_seq_len}: TensorRT wants each slot's cache at a multiple of "
            f"{ALIGNMENT} bytes; {-(-build.max_seq_len // 16) * 16} would do"
        )
    each = spec.num_key_value_heads * build.max_seq_len * spec.head_size
    if each * build.max_batch_size > LARGEST_CACHE:
        raise BuildError(
            f"a layer's keys would be {build.max_batch_size} × {spec.num_key_value_heads} × "
            f"{build.max_seq_len} × {spec.head_size} numbers, a TensorRT cache has at most 2^31 − 1: "
            f"--max-seq-len {max(1, LARGEST_CACHE * build.max_seq_len // (each * build.max_batch_size))} "
            f"or --max-batch-size {LARGEST_CACHE // each} would do"
        )


def _capabilities(api: Api, targets: Sequence[int]) -> list[Any]:
    """The library's names for the targets."""
    if not targets:
        return []
    if not api.builds_ahead:
        raise BuildError(
            f"{api.name} {api.version} builds for the device at hand only: leave --sm out and build on the "
            "board, or install TensorRT-RTX for RTX machines"
        )
    known = api.module.ComputeCapability.__members__
    for target in targets:
        if f"SM{target}" not in known:
            possible = ", ".join(name[2:] for name in known if name.startswith("SM"))
            raise BuildError(
                f"--sm {target}: {api.name} {api.version} builds for {possible}; for others build "
                "there, with the device's own TensorRT, or use `--executor cuda`"
            )
    return [known[f"SM{target}"] for target in targets]


def _add_profiles(builder: Any, config: Any, spec: ModelSpec, build: BuildConfig, *, lengths: bool) -> None:
    """Least, best and largest shape of every input, for a chunk and for a decode step."""
    longest = longest_chunk(build)
    best_tokens = min(max(build.opt_num_tokens, 1), longest)
    best_batch = min(max(build.opt_batch_size, 1), build.max_batch_size)
    chunk = ((1, 1), (1, best_tokens), (1, longest))
    decode = ((1, 1), (best_batch, 1), (build.max_batch_size, 1))
    caches = [f"past.{layer}.{part}" for layer in range(spec.num_hidden_layers) for part in ("key", "value")]
    for shapes in (chunk, decode):
        profile = builder.create_optimization_profile()
        for name in ("tokens", "positions"):
            profile.set_shape(name, *shapes)
        for name in ("past", "last", *(["lengths"] if lengths else [])):
            profile.set_shape(name, *((batch,) for batch, _ in shapes))
        for name in caches:
            sizes = (spec.num_key_value_heads, build.max_seq_len, spec.head_size)
            profile.set_shape(name, *((batch, *sizes) for batch, _ in shapes))
        config.add_optimization_profile(profile)


def open_timing_cache(api: Api, config: Any, path: Path | None) -> Any:
    """A file's cache, an empty one where it is missing or another library's; None where none is wanted.

    TensorRT-RTX measures nothing when it builds: it takes a cache, and warns that it will not use it.

    Raises:
        BuildError: the file cannot be read.
    """
    if path is None or api.name == "tensorrt_rtx":
        return None
    try:
        held = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BuildError(f"--timing-cache {path} cannot be read: {error.strerror}") from error
    for content in (held, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's phases are nested; the outermost one that has steps is what a person can follow."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            if parent is None:
                progress("plan", 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == next(iter(self._steps), None):
                progress("plan", min(1.0, (step + 1) / max(1, self._steps[phase])))
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def reason_of(log: BuildLog) -> str:
    """Why a build failed, and what helps, as far as TensorRT's messages are known."""
    text = " ".join(log.errors) or "it gives no reason"
    if "workspace" in text:
        return f"no kernel gets by with what --builder-memory allows; allow more ({text[:300]})"
    if _OUT_OF_MEMORY.search(text):
        return (
            f"memory ran out ({text[:300]}). End what else uses it, bound the builder with --builder-memory, "
            "or build for smaller sizes (--max-seq-len, --max-num-tokens, --max-batch-size)"
        )
    if "HW-specific datatypes: int4" in text:
        return "the target has no INT4 (compute capability 8.0 is the least); use `--executor cpu`"
    return text[:1000]

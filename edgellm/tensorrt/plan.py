"""Building a plan: profiles, targets, limits, and what came of it.

A plan has two profiles: 0 for one prompt's chunk, 1 × 1 … max_num_tokens, and 1 for a decode step,
1 … max_batch_size × 1. Building needs no GPU where the library builds ahead (TensorRT-RTX); TensorRT itself
builds on the device, for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgellm.checkpoint.base import Checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.errors import BuildError
from edgellm.executor.base import Progress
from edgellm.model.spec import ModelSpec
from edgellm.model.trt import emit_network
from edgellm.tensorrt.api import Api
from edgellm.tensorrt.build_log import BuildLog, FusedLayer, make_logger

DUPLICATED: Final = 1.05
"""Plans whose weights take more than this times the emitted bytes hold some of them twice."""


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
    trt, log = api.module, BuildLog()
    builder = trt.Builder(make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    net = emit_network(checkpoint, api, network, build, progress=progress)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, progress)
    _set_targets(api, config, targets)
    if builder_memory is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, builder_memory)
    _add_profiles(builder, config, checkpoint.spec, build, lengths=api.has_lengths)
    cache = _timing_cache(config, timing_cache)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"TensorRT {api.version} does not build this network: {_reason(log)}")
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(memoryview(cache.serialize()))
    weight_bytes = log.weight_bytes or 0
    warnings = list(log.warnings)
    if weight_bytes > DUPLICATED * net.weight_bytes:
        warnings.append(
            f"the plan's weights take {weight_bytes / 1e6:.1f} MB and {net.weight_bytes / 1e6:.1f} were "
            "emitted: TensorRT holds some of them twice"
        )
    prefill, decode = [*log.activation_bytes, 0, 0][:2]
    return Plan(data, net.weight_bytes, weight_bytes, (prefill, decode), log.layers(), warnings)


def _set_targets(api: Api, config: Any, targets: Sequence[int]) -> None:
    if not targets:
        return
    if not api.builds_ahead:
        raise BuildError(
            f"{api.name} {api.version} builds for the device at hand only: leave --sm out and build on the "
            "board, or install TensorRT-RTX for RTX machines"
        )
    known = api.module.ComputeCapability.__members__
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        if f"SM{target}" not in known:
            possible = ", ".join(name[2:] for name in known if name.startswith("SM"))
            raise BuildError(f"--sm {target}: {api.name} {api.version} builds for {possible}")
        config.set_compute_capability(known[f"SM{target}"], i)


def _add_profiles(builder: Any, config: Any, spec: ModelSpec, build: BuildConfig, *, lengths: bool) -> None:
    """Least, best and largest shape of every input, for a chunk and for a decode step."""
    best_tokens = min(max(build.opt_num_tokens, 1), build.max_num_tokens)
    best_batch = min(max(build.opt_batch_size, 1), build.max_batch_size)
    chunk = ((1, 1), (1, best_tokens), (1, build.max_num_tokens))
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


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is not None:
        config.set_timing_cache(cache, False)
    return cache


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


def _reason(log: BuildLog) -> str:
    text = " ".join(log.errors) or "it gives no reason"
    if "HW-specific datatypes: int4" in text:
        return "the target has no INT4 (compute capability 8.0 is the least); use `--executor cpu`"
    return text[:1000]

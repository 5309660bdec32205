"""A TensorRT engine directory's own files: the plan, and which layers TensorRT made of the network.

rank0.engine    the plan, under TensorRT-LLM's name for it
layers.json     a list of the plan's kernels, of both profiles: name, type, and the name, shape and type of
                every input, constant and output
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from edgellm.checkpoint.base import Checkpoint
from edgellm.engine_config import BuildConfig, PlanRecord
from edgellm.enginedir import EngineDir
from edgellm.errors import BuildError, DeviceError, EngineError, UsageError
from edgellm.executor.base import Progress
from edgellm.executor.cuda_kernels import write_cubins
from edgellm.executor.tensorrt_launches import kernels_around
from edgellm.governor.platform import Family, identify_board
from edgellm.tensorrt.api import Api
from edgellm.tensorrt.plan import build_plan

PLAN_FILE: Final = "rank0.engine"
LAYERS_FILE: Final = "layers.json"


def write_plan(
    directory: Path,
    checkpoint: Checkpoint,
    api: Api,
    build: BuildConfig,
    *,
    targets: Sequence[int],
    builder_memory: int | None,
    timing_cache: Path | None,
    progress: Progress,
) -> tuple[PlanRecord, list[str]]:
    """Build the plan into an engine directory; gives what config.json says of it, and warnings.

    Args:
        targets: compute capabilities, 87 for 8.7; none: the device at hand.
        builder_memory: most bytes of device memory for trying kernels out, or None.
        timing_cache: file of measured kernels, read if it is there and written afterwards; None: none.

    Raises:
        UsageError: no target is named and there is no device.
        BuildError: the network has no TensorRT form, or TensorRT does not build it.
        CheckpointError: a tensor is missing or damaged.
        OSError: a file cannot be written.
    """
    runs_on = tuple(targets) or (sm_at_hand(api),)
    plan = build_plan(
        checkpoint,
        api,
        build,
        targets=targets,
        builder_memory=builder_memory,
        timing_cache=timing_cache,
        progress=progress,
    )
    plan.write(directory / PLAN_FILE)
    warnings = list(plan.warnings)
    kernels = kernels_around(checkpoint.spec.vocab_size)
    try:
        for sm in runs_on:
            write_cubins(directory, kernels, sm, lambda done: progress("kernels", done))
    except (DeviceError, BuildError) as error:
        warnings.append(f"the kernels around the plan will be compiled at the first start ({error})")
    layers = msgspec.json.format(msgspec.json.encode(plan.layers), indent=1)
    (directory / LAYERS_FILE).write_bytes(layers + b"\n")
    record = PlanRecord(
        library=api.name,
        version=api.version,
        targets=runs_on,
        software=None if api.builds_ahead else software_at_hand(),
        lengths=api.has_lengths,
        emitted_bytes=plan.emitted_bytes,
        weight_bytes=plan.weight_bytes,
        prefill_bytes=plan.activation_bytes[0],
        decode_bytes=plan.activation_bytes[1],
        kernels=-(-len(plan.layers) // 2),
    )
    return record, warnings


def plan_record(directory: EngineDir) -> PlanRecord:
    """What an engine of the tensorrt executor says of its plan.

    Raises:
        EngineError: nothing, or there is no plan.
    """
    plan = directory.config.edgellm.plan
    if plan is None or PLAN_FILE not in directory.config.edgellm.files:
        raise EngineError(f"{directory.path} has no TensorRT plan, {PLAN_FILE}; build the engine again")
    return plan


def sm_at_hand(api: Api) -> int:
    """The compute capability of the device here.

    Raises:
        UsageError: there is none, and the library could build for one that is named.
        DeviceError: there is none.
    """
    from edgellm.cuda.driver import Driver

    try:
        driver = Driver()
    except DeviceError as error:
        if api.builds_ahead:
            raise UsageError(f"--sm: name what to build for, such as 86; {error}") from error
        raise
    sm = driver.facts.device.sm
    driver.close()
    return sm


def software_at_hand(root: Path = Path("/")) -> str | None:
    """The board's software, which its TensorRT's plans are bound to; None where it is no board."""
    board = identify_board(root)
    return None if board.family is Family.GENERIC else board.software

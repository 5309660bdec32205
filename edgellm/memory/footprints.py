"""The footprint of the executor that an engine was built for, or that a checkpoint would be built for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.checkpoint.base import Checkpoint
from edgellm.enginedir import EngineDir
from edgellm.errors import EngineError
from edgellm.governor.platform import Family, identify_board
from edgellm.memory.cpu import CpuFootprint
from edgellm.server_config import ServerConfig

if TYPE_CHECKING:
    from edgellm.memory.cuda import CudaFootprint
    from edgellm.memory.tensorrt import TensorRtFootprint
    from edgellm.memory.tensorrt_estimate import TensorRtEstimate


def footprint_of(
    directory: EngineDir, *, threads: int, server: ServerConfig, root: Path = Path("/")
) -> CpuFootprint | CudaFootprint | TensorRtFootprint:
    """The footprint of an engine's executor.

    Args:
        root: where the board's /proc and /etc are.

    Raises:
        EngineError: the engine was built before engines said what their weights are, or is damaged.
    """
    if directory.config.edgellm.executor == "cuda":
        from edgellm.executor.cuda_build import cache_kind
        from edgellm.memory.cuda import CudaFootprint
        from edgellm.model.network import NETWORK_FILE, read_network
        from edgellm.model.weights_file import WEIGHTS_FILE, read_weights_header

        return CudaFootprint(
            spec=directory.spec,
            network=read_network(directory.path / NETWORK_FILE),
            weights_bytes=read_weights_header(directory.path / WEIGHTS_FILE).bytes,
            kv_cache=cache_kind(directory.kv_cache),
            unified=is_unified(root),
            max_queue=server.max_queue,
            max_message_bytes=server.max_message_bytes,
        )
    if directory.config.edgellm.executor == "tensorrt":
        from edgellm.memory.tensorrt import TensorRtFootprint
        from edgellm.tensorrt.engine_files import PLAN_FILE, plan_record

        return TensorRtFootprint(
            spec=directory.spec,
            build=directory.build,
            plan=plan_record(directory),
            plan_bytes=directory.config.edgellm.files[PLAN_FILE].bytes,
            unified=is_unified(root),
            max_queue=server.max_queue,
            max_message_bytes=server.max_message_bytes,
        )
    weights = directory.config.edgellm.weights
    if not weights:
        raise EngineError(
            f"{directory.path} does not say what its weights are (edgellm.weights in config.json); "
            "build the engine again"
        )
    return CpuFootprint(
        spec=directory.spec,
        weights=weights,
        compute=directory.compute,
        kv_cache=directory.kv_cache,
        threads=threads,
        max_queue=server.max_queue,
        max_message_bytes=server.max_message_bytes,
    )


def cuda_footprint(
    checkpoint: Checkpoint, *, kv_cache: str, sms: Sequence[int] = (), root: Path = Path("/")
) -> CudaFootprint:
    """What the CUDA executor would take; no matrix is read.

    Args:
        sms: compute capabilities, 87 for 8.7, of the devices that it may run on; none: of usual ones.

    Raises:
        BuildError: it has no kernel for a part of the network.
        ValueError: no device of a compute capability is known.
    """
    from edgellm.executor.cuda_build import cache_kind
    from edgellm.executor.cuda_kernels import devices_of
    from edgellm.memory.arena import aligned
    from edgellm.memory.cuda import DEVICES, CudaFootprint
    from edgellm.model.decoder import build_decoder
    from edgellm.model.kernels import KernelGraph

    graph = KernelGraph()
    build_decoder(graph, checkpoint)
    return CudaFootprint(
        spec=checkpoint.spec,
        network=graph.network(),
        weights_bytes=sum(aligned(entry.bytes) for entry in graph.entries),
        kv_cache=cache_kind(kv_cache),
        unified=is_unified(root),
        devices=tuple(device for sm in sms for device in devices_of(sm)) or DEVICES,
    )


def tensorrt_estimate(
    checkpoint: Checkpoint, *, sms: Sequence[int] = (), root: Path = Path("/")
) -> TensorRtEstimate:
    """What the TensorRT executor would take, about; no matrix is read, and no TensorRT needed.

    Args:
        sms: compute capabilities that the plan would be for; none: the one of the device it is built on.

    Raises:
        BuildError: TensorRT has no form for a part of the network.
    """
    from edgellm.memory.tensorrt_estimate import TensorRtEstimate
    from edgellm.model.inventory import take_inventory

    weights = take_inventory(checkpoint)
    return TensorRtEstimate(checkpoint.spec, weights, tuple(sms) or (87,), unified=is_unified(root))


def is_unified(root: Path) -> bool:
    """Whether a GPU here shares the host's DRAM: on every Tegra, and nowhere else."""
    return identify_board(root).family is not Family.GENERIC

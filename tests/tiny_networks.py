"""Small networks for the CUDA executor's tests, one of each family, with random weights."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgellm.checkpoint.random import QUANTS, RandomCheckpoint
from edgellm.checkpoint.random_models import TINY
from edgellm.cuda.launch import Device
from edgellm.engine_config import BuildConfig
from edgellm.executor.cuda_build import cache_kind
from edgellm.executor.cuda_programs import Lowering
from edgellm.memory.plan import Shape
from edgellm.model.kernels import emit
from edgellm.model.network import read_network
from edgellm.model.weights_file import read_weights_header

ORIN = Device(87, 16, 163 << 10)
SHAPE = Shape(3, 100, 64)

NETWORKS = {name.removeprefix("tiny-"): spec for name, spec in TINY.items()}


def build(network: str, quant: str, directory: Path, *, layers: int | None = None) -> RandomCheckpoint:
    """Write the network's files into the directory."""
    spec = NETWORKS[network]
    if layers is not None:
        spec = msgspec.structs.replace(spec, num_hidden_layers=layers)
    kind = next(each for each in QUANTS if each == quant)
    checkpoint = RandomCheckpoint(spec, network, kind, 3)
    emit(checkpoint, directory, build_config(), progress=lambda _what, _done: None)
    return checkpoint


def build_config() -> BuildConfig:
    """Of SHAPE."""
    return BuildConfig(
        max_input_len=SHAPE.max_seq_len - 1,
        max_seq_len=SHAPE.max_seq_len,
        max_batch_size=SHAPE.max_batch_size,
        max_num_tokens=SHAPE.max_num_tokens,
        opt_batch_size=SHAPE.max_batch_size,
        opt_num_tokens=SHAPE.max_batch_size,
    )


def lowering(
    directory: Path,
    network: str,
    *,
    device: Device = ORIN,
    kv_cache: str = "fp16",
    layers: int | None = None,
) -> Lowering:
    """What makes the launches of a network that `build` wrote."""
    spec = NETWORKS[network]
    if layers is not None:
        spec = msgspec.structs.replace(spec, num_hidden_layers=layers)
    weights = read_weights_header(directory / "weights.safetensors")
    return Lowering(
        read_network(directory / "network.json"),
        spec,
        SHAPE,
        kv_cache=cache_kind(kv_cache),
        device=device,
        weights=weights.offsets,
        weights_bytes=weights.bytes,
    )

"""The network of a CUDA engine, as plain data: what `model/kernels.py` wrote and the executor launches.

Every string names a tensor of `weights.safetensors`. Nothing here depends on the device, on batch sizes or on
how long a slot is, so one engine serves every GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from edgellm.errors import EngineError
from edgellm.kernels.elementwise import Table
from edgellm.kernels.packing import PackedShape

NETWORK_FILE: Final = "network.json"
LAYOUT_VERSION: Final = 1
"""Of packed weights and of this file: an engine with another one is refused."""


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the network."""


class Embedding(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rows picked by the tokens; scales and offsets where `table` has some."""

    table: Table
    elements: str
    scales: str | None = None
    offsets: str | None = None


class Norm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """RMSNorm; `gain` is float32 [width]."""

    gain: str
    epsilon: float


class Linear(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One or several projections of the same input, packed as one; `bias` as `pack_bias` gives it."""

    shape: PackedShape
    weights: str
    bias: str | None = None


class AttentionPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What attention has apart from its projections; gains are float32 [head_size]."""

    scale: float
    q_gain: str | None = None
    k_gain: str | None = None


class Mlp(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mlp"):
    """The gated MLP: gate and up interleaved, then down."""

    gate_up: Linear
    down: Linear


class Mixture(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mixture"):
    """A mixture of experts. The shapes of `gate_up` and `down` are one expert's; their tensors hold all, one
    behind the other."""

    top_k: int
    normalize: bool
    router: Linear
    gate_up: Linear
    down: Linear


class Layer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One block of the decoder; both halves add to the residual."""

    attention_norm: Norm
    qkv: Linear
    attention: AttentionPart
    output: Linear
    mlp_norm: Norm
    mlp: Mlp | Mixture


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it.

    Attributes:
        layout: LAYOUT_VERSION of the edgellm that wrote it.
        rotary: radians per position of each pair of a head, head_size / 2 of them.
        rotary_length: factor on cos and sin.
    """

    layout: int
    embedding: Embedding
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    rotary: tuple[float, ...]
    rotary_length: float = 1.0


def encode_network(network: Network) -> bytes:
    """As `network.json` holds it."""
    return msgspec.json.encode(network) + b"\n"


def decode_network(raw: bytes, where: str) -> Network:
    """The network in `network.json`.

    Args:
        where: the file, for messages.

    Raises:
        EngineError: it is of another layout, or damaged.
    """
    try:
        layout = msgspec.json.decode(raw, type=_Layout).layout
        if layout == LAYOUT_VERSION:
            return msgspec.json.decode(raw, type=Network)
    except msgspec.DecodeError as error:
        raise EngineError(f"{where} is damaged: {error}; build the engine again") from error
    raise EngineError(
        f"{where} has weights in layout {layout}, this edgellm reads {LAYOUT_VERSION}; build the engine "
        "again with this edgellm (edgellm build --executor cuda)"
    )


def read_network(path: Path) -> Network:
    """Read `network.json`.

    Raises:
        EngineError: it is missing, damaged, or of another layout.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}; build the engine again") from error
    return decode_network(raw, str(path))


class _Layout(msgspec.Struct):
    layout: int

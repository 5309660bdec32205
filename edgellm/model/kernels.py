"""The network for the CUDA executor: packed weights and a description of what is launched over them.

What is fused: q, k and v; gate and up; a residual sum with the linear in front of it; a norm with the linear
behind it. What is launched, and how it is cut, is decided on the device: `executor/cuda_programs.py`.
"""

# ruff: noqa: ARG002 - the Graph's names

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.base import Checkpoint
from edgellm.engine_config import BuildConfig
from edgellm.executor.base import Progress
from edgellm.kernels.elementwise import table_of, table_rows
from edgellm.kernels.moe_shape import require_mixture
from edgellm.kernels.packing import pack, pack_bias, packed_shape
from edgellm.model.decoder import Attention, Expert, build_decoder, require_context
from edgellm.model.network import (
    LAYOUT_VERSION,
    NETWORK_FILE,
    AttentionPart,
    Embedding,
    Layer,
    Linear,
    Mixture,
    Mlp,
    Network,
    Norm,
    encode_network,
)
from edgellm.model.rotary import Rotary
from edgellm.model.weights import Weight
from edgellm.model.weights_file import WEIGHTS_FILE, Entry, Pieces, constant, write_weights


def emit(
    checkpoint: Checkpoint, directory: Path, build: BuildConfig, *, progress: Progress
) -> dict[str, str]:
    """Write `weights.safetensors` and `network.json` into the directory, a piece at a time.

    Returns:
        File name → SHA-256 in hex, of what was hashed while it was written.

    Raises:
        BuildError: the network or a weight's layout has no kernel.
        CheckpointError: a tensor is missing or damaged.
        OSError: the files cannot be written.
    """
    require_context(checkpoint.spec, build.max_seq_len)
    graph = KernelGraph()
    build_decoder(graph, checkpoint)
    network = graph.network()
    (directory / NETWORK_FILE).write_bytes(encode_network(network))
    digest = write_weights(directory / WEIGHTS_FILE, graph.entries, progress)
    progress("model", 1.0)
    return {WEIGHTS_FILE: digest}


@dataclass(frozen=True, slots=True)
class Value:
    """A handle: what has been written of the value so far.

    Attributes:
        norm: the norm in front of whoever reads this; None: the value is as it is.
    """

    norm: Norm | None = None


@dataclass(slots=True)
class _Draft:
    """A layer as far as it has come."""

    attention_norm: Norm
    qkv: Linear
    attention: AttentionPart | None = None
    output: Linear | None = None
    mlp_norm: Norm | None = None
    gate_up: Linear | None = None


@dataclass(slots=True)
class KernelGraph:
    """The decoder's `Graph`; notes every tensor once and puts the layers together.

    Attributes:
        entries: tensors to write, in the order in which a step reads them.
    """

    entries: list[Entry] = field(default_factory=list)
    _layers: list[Layer] = field(default_factory=list)
    _draft: _Draft | None = None
    _embedding: Embedding | None = None
    _norm: Norm | None = None
    _head: Linear | None = None
    _rotary: Rotary | None = None

    def network(self) -> Network:
        """All that was written, once `logits` has been."""
        assert self._embedding and self._norm and self._head and self._rotary, "the network has no end"
        return Network(
            layout=LAYOUT_VERSION,
            embedding=self._embedding,
            layers=tuple(self._layers),
            norm=self._norm,
            head=self._head,
            rotary=tuple(self._rotary.frequencies.tolist()),
            rotary_length=self._rotary.length,
        )

    def embed(self, weight: Weight) -> Value:
        table = table_of(weight)
        rows = _TableRows(weight)
        self._add("embedding", table.element_bytes, rows.elements)
        scales = offsets = None
        if table.scale_bytes:
            scales = self._add("embedding.scales", table.scale_bytes, lambda: rows.scales)
            if table.offsets:
                offsets = self._add("embedding.offsets", table.scale_bytes, lambda: rows.offsets)
        self._embedding = Embedding(table=table, elements="embedding", scales=scales, offsets=offsets)
        return Value()

    def norm(self, x: Value, gain: Weight, epsilon: float) -> Value:
        if self._draft is None:
            name = f"layers.{len(self._layers)}.attention_norm"
        else:
            name = f"layers.{len(self._layers)}.mlp_norm"
        # Which norm is the last one shows at `logits`.
        return Value(Norm(gain=self._vector(name, gain), epsilon=epsilon))

    def qkv(self, x: Value, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> Value:
        assert x.norm is not None
        qkv = self._linear(f"layers.{len(self._layers)}.qkv", weights, biases)
        self._draft = _Draft(attention_norm=x.norm, qkv=qkv)
        return Value()

    def attention(self, qkv: Value, attention: Attention) -> Value:
        assert self._draft is not None
        here = f"layers.{len(self._layers)}"
        q, k = attention.q_norm, attention.k_norm
        self._draft.attention = AttentionPart(
            scale=attention.scale,
            q_gain=None if q is None else self._vector(f"{here}.q_norm", q),
            k_gain=None if k is None else self._vector(f"{here}.k_norm", k),
        )
        self._rotary = attention.rotary
        return Value()

    def linear(self, x: Value, weight: Weight, bias: Weight | None, residual: Value) -> Value:
        draft = self._draft
        assert draft is not None
        here = f"layers.{len(self._layers)}"
        if draft.output is None:
            draft.output = self._linear(f"{here}.output", [weight], [bias])
            return Value()
        assert draft.gate_up, "the layer has another order"
        down = self._linear(f"{here}.down", [weight], [bias])
        return self._end_layer(Mlp(gate_up=draft.gate_up, down=down))

    def swiglu(self, x: Value, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> Value:
        assert self._draft is not None
        self._draft.mlp_norm = x.norm
        self._draft.gate_up = self._linear(
            f"layers.{len(self._layers)}.gate_up", [gate, up], biases, swiglu=True
        )
        return Value()

    def moe(
        self,
        x: Value,
        router: Weight,
        experts: Sequence[Expert],
        top_k: int,
        *,
        normalize: bool,
        residual: Value,
    ) -> Value:
        assert self._draft is not None
        self._draft.mlp_norm = x.norm
        here = f"layers.{len(self._layers)}"
        mixture = Mixture(
            top_k=top_k,
            normalize=normalize,
            router=self._linear(f"{here}.router", [router], [None]),
            gate_up=self._experts(
                f"{here}.experts.gate_up", [[expert.gate, expert.up] for expert in experts], swiglu=True
            ),
            down=self._experts(f"{here}.experts.down", [[expert.down] for expert in experts]),
        )
        require_mixture(mixture.router.shape.n, top_k, router.name)
        return self._end_layer(mixture)

    def rows(self, x: Value) -> Value:
        return x

    def logits(self, x: Value, weight: Weight) -> Value:
        assert x.norm is not None
        self._norm = x.norm
        self._head = self._linear("head", [weight], [None])
        return Value()

    def _end_layer(self, mlp: Mlp | Mixture) -> Value:
        draft = self._draft
        assert draft and draft.attention and draft.output and draft.mlp_norm, "the layer has another order"
        self._layers.append(
            Layer(
                attention_norm=draft.attention_norm,
                qkv=draft.qkv,
                attention=draft.attention,
                output=draft.output,
                mlp_norm=draft.mlp_norm,
                mlp=mlp,
            )
        )
        self._draft = None
        return Value()

    def _experts(self, name: str, experts: Sequence[Sequence[Weight]], *, swiglu: bool = False) -> Linear:
        """All experts' parts, packed alike: in the narrowest form that holds every one of them."""
        rows = sum(part.shape[0] for part in experts[0])
        together = packed_shape([part for expert in experts for part in expert])
        shape = replace(together, n=rows, swiglu=swiglu)
        self._add(
            name,
            shape.nbytes * len(experts),
            lambda: (piece for parts in experts for piece in pack(parts, shape)),
        )
        return Linear(shape=shape, weights=name)

    def _linear(
        self, name: str, weights: Sequence[Weight], biases: Sequence[Weight | None], *, swiglu: bool = False
    ) -> Linear:
        shape = packed_shape(weights, swiglu=swiglu)
        self._add(name, shape.nbytes, lambda: pack(weights, shape))
        bias = None
        # Biases are as long as a row of activations: small enough to be held until they are written.
        if (values := pack_bias(biases, weights, shape)) is not None:
            bias = self._add(f"{name}.bias", values.nbytes, constant(values))
        return Linear(shape=shape, weights=name, bias=bias)

    def _vector(self, name: str, weight: Weight) -> str:
        values = np.ascontiguousarray(weight.dequantize(), np.float32)
        return self._add(name, values.nbytes, constant(values))

    def _add(self, name: str, size: int, pieces: Pieces) -> str:
        self.entries.append(Entry(name, size, pieces))
        return name


class _TableRows:
    """An embedding on its way into the file: its scales and offsets, small, are kept until theirs come."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self.scales: list[NDArray[np.float16]] = []
        self.offsets: list[NDArray[np.float16]] = []

    def elements(self) -> Iterator[NDArray[np.uint8]]:
        for rows in table_rows(self._weight):
            if rows.scales is not None:
                self.scales.append(rows.scales)
            if rows.offsets is not None:
                self.offsets.append(rows.offsets)
            yield rows.elements

"""The network as a TensorRT INetworkDefinition: strongly typed, without plugins, without ONNX.

    inputs   tokens i32 [B, T] · positions i32 [B, T] · past i32 [B] (where new keys and values go) · lengths
             i32 [B] (past + T; only where attention takes lengths) · last i32 [B] (which of the T positions
             is wanted) · past.{layer}.{key,value} f16 [B, kv_heads, max_seq_len, head_size]
    outputs  logits f32 [B, vocab] · present.{layer}.{key,value}, the same memory as the past

T is exact, never padded: a plan has a profile for one prompt's chunk (1 × 1 … max_num_tokens) and one for a
decode step (1 … max_batch_size × 1). Activations are float16; the residual stream and what a norm computes
are float32, so that no real model overflows. Attention's scale is in the cosines and sines that turn q, whose
rounding to float16 is as good as before: q is not scaled anywhere else. What is fused here: q, k and v; gate
and up. The rest is TensorRT's to fuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.checkpoint.base import Checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.errors import BuildError
from edgellm.executor.base import Progress
from edgellm.model.decoder import Attention, Expert, build_decoder, require_context
from edgellm.model.spec import ModelSpec
from edgellm.model.trt_linear import TrtLinears, Value
from edgellm.model.trt_moe import add_mixture
from edgellm.model.trt_network import Compute, Tensor, TrtNetwork
from edgellm.model.weights import Weight
from edgellm.tensorrt.api import Api

MAX_HEAD_SIZE = 256
"""Attention of TensorRT-RTX 1.7 builds heads of 64, 80 and 256; 512 only decomposed, odd sizes not at all."""


def emit_network(
    checkpoint: Checkpoint,
    api: Api,
    network: Any,
    build: BuildConfig,
    *,
    compute: Compute = "fp16",
    progress: Progress,
) -> TrtNetwork:
    """Write the checkpoint's network; the result owns the constants and must outlive the build.

    Raises:
        BuildError: the network or a weight's layout has no TensorRT form here.
        CheckpointError: a tensor is missing or damaged.
    """
    require_context(checkpoint.spec, build.max_seq_len)
    _require_attention(checkpoint.spec)
    net = TrtNetwork(api, network, compute)
    build_decoder(
        TrtGraph(net, checkpoint.spec, max_seq_len=build.max_seq_len, progress=progress), checkpoint
    )
    progress("network", 1.0)
    return net


class TrtGraph:
    """The decoder's `Graph`, adding layers as they come."""

    def __init__(self, net: TrtNetwork, spec: ModelSpec, *, max_seq_len: int, progress: Progress) -> None:
        self._net = net
        self._spec = spec
        self._max_seq_len = max_seq_len
        self._progress = progress
        self._linears = TrtLinears(net)
        self._counters: dict[str, itertools.count[int]] = {}
        trt = net.trt
        self._half, self._float = net.half, trt.float32
        self._tokens = net.input("tokens", trt.int32, (-1, -1))
        self._positions = net.input("positions", trt.int32, (-1, -1))
        self._past = net.input("past", trt.int32, (-1,))
        self._last = net.input("last", trt.int32, (-1,))
        self._lengths: Tensor | None = None
        self._mask: Tensor | None = None
        if net.api.has_lengths:
            self._lengths = net.input("lengths", trt.int32, (-1,))
        else:
            self._mask = self._causal_mask()

    def embed(self, weight: Weight) -> Value:
        rows = self._linears.embed(self._tokens, weight, "embed")
        return Value(self._net.cast("embed.float", rows.tensor, self._float), rows.width)

    def norm(self, x: Value, gain: Weight, epsilon: float) -> Value:
        return Value(self._norm(self._name("norm"), x.tensor, gain, epsilon), x.width)

    def qkv(self, x: Value, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> Value:
        return self._linears.project(x, weights, biases, self._name("qkv"))

    def attention(self, qkv: Value, attention: Attention) -> Value:
        net, spec, layer = self._net, self._spec, attention.layer
        heads, kv_heads, size = spec.num_attention_heads, spec.num_key_value_heads, spec.head_size
        y = self._name("attention")
        shape = (0, 0, heads + 2 * kv_heads, size)
        split = net.reshape(f"{y}.heads", qkv.tensor, shape, after=(0, 2, 1, 3))
        query = net.slice(f"{y}.q", split, 1, 0, heads)
        key = net.slice(f"{y}.k", split, 1, heads, kv_heads)
        value = net.slice(f"{y}.v", split, 1, heads + kv_heads, kv_heads)
        if attention.q_norm is not None:
            query = self._norm(f"{y}.q.norm", query, attention.q_norm, spec.norm_epsilon)
        if attention.k_norm is not None:
            key = self._norm(f"{y}.k.norm", key, attention.k_norm, spec.norm_epsilon)
        query = self._rotate(f"{y}.q.rotated", query, attention, attention.scale)
        key = self._rotate(f"{y}.k.rotated", key, attention, 1.0)
        caches = []
        for part, new in (("key", key), ("value", value)):
            shape = (-1, kv_heads, self._max_seq_len, size)
            past = net.input(f"past.{layer}.{part}", self._half, shape)
            present = net.append(f"{y}.{part}", past, new, self._past)
            net.output(present, f"present.{layer}.{part}")
            caches.append(present)
        attended = net.attend(y, query, *caches, mask=self._mask, lengths=self._lengths)
        joined = net.reshape(f"{y}.joined", attended, (0, 0, heads * size), before=(0, 2, 1, 3))
        self._progress("network", (layer + 1) / (spec.num_hidden_layers + 1))
        return Value(joined, heads * size)

    def linear(self, x: Value, weight: Weight, bias: Weight | None, residual: Value) -> Value:
        product = self._linears.project(x, [weight], [bias], self._name("linear"))
        return Value(self._sum(product.tensor, residual), product.width)

    def swiglu(self, x: Value, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> Value:
        net, width = self._net, gate.shape[0]
        both = self._linears.project(x, [gate, up], biases, self._name("gate_up")).tensor
        y, axis = self._name("swiglu"), len(both.shape) - 1
        left = net.slice(f"{y}.gate", both, axis, 0, width)
        right = net.slice(f"{y}.up", both, axis, width, width)
        silu = net.multiply(f"{y}.silu", left, net.sigmoid(f"{y}.sigmoid", left))
        return Value(net.multiply(y, silu, right), width)

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
        mixed = add_mixture(
            self._net,
            self._linears,
            x,
            router=router,
            experts=experts,
            top_k=top_k,
            normalize=normalize,
            name=self._name("moe"),
        )
        return Value(self._sum(mixed, residual), residual.width)

    def rows(self, x: Value) -> Value:
        net, y = self._net, self._name("rows")
        indices = net.reshape(f"{y}.indices", self._last, (0, 1))
        picked = net.gather(y, x.tensor, indices, 1, batched=True)
        return Value(net.reshape(f"{y}.flat", picked, (0, x.width)), x.width)

    def logits(self, x: Value, weight: Weight) -> Value:
        y = self._linears.project(x, [weight], [None], "head")
        logits = self._net.cast("head.float", y.tensor, self._float)
        self._net.output(logits, "logits")
        return Value(logits, y.width)

    def _sum(self, product: Tensor, residual: Value) -> Tensor:
        y = self._name("residual")
        return self._net.add(y, residual.tensor, self._net.cast(f"{y}.float", product, self._float))

    def _norm(self, name: str, x: Tensor, gain: Weight, epsilon: float) -> Tensor:
        """RMSNorm over the last axis, computed in float32: TensorRT's normalization takes the mean off."""
        net, last = self._net, len(x.shape) - 1
        ones = (1,) * last
        wide = net.cast(f"{name}.float", x, self._float)
        square = net.multiply(f"{name}.square", wide, wide)
        mean = net.mean(f"{name}.mean", square, last, keep=True)
        small = net.constant(f"epsilon.{last}.{epsilon}", np.full((*ones, 1), epsilon, np.float32))
        root = net.unary(f"{name}.root", "SQRT", net.add(f"{name}.stable", mean, small))
        unit = net.elementwise(f"{name}.unit", "DIV", wide, root)
        gains = net.constant(f"{name}.gain", gain.dequantize().reshape(*ones, -1))
        return net.cast(f"{name}.half", net.multiply(name, unit, gains), self._half)

    def _rotate(self, name: str, x: Tensor, attention: Attention, scale: float) -> Tensor:
        tables = attention.rotary.tables(self._max_seq_len)
        cos, sin = (
            self._net.weight(f"rotary.{part}.{scale}", table * scale)
            for part, table in zip(("cos", "sin"), tables, strict=True)
        )
        return self._net.rotate(name, x, cos, sin, self._positions)

    def _causal_mask(self) -> Tensor:
        """bool [B, 1, T, S]: whether a token at position p sees cache position s, s ≤ p."""
        net = self._net
        slots = np.arange(self._max_seq_len, dtype=np.int32).reshape(1, 1, 1, -1)
        here = net.reshape("mask.positions", self._positions, (0, 1, -1, 1))
        later = net.elementwise("mask.later", "GREATER", net.constant("mask.slots", slots), here)
        return net.unary("mask", "NOT", later)

    def _name(self, kind: str) -> str:
        return f"{kind}.{next(self._counters.setdefault(kind, itertools.count()))}"


def _require_attention(spec: ModelSpec) -> None:
    """What TensorRT's attention and rotary layers refuse, in the model's words."""
    if spec.head_size % 8 or spec.head_size > MAX_HEAD_SIZE:
        raise BuildError(
            f"head_size {spec.head_size}: TensorRT's attention takes multiples of 8 up to {MAX_HEAD_SIZE}; "
            "use `--executor cpu`"
        )

"""The network as an ONNX model for ONNX Runtime's CPU provider: what `executor/cpu.py` runs.

    inputs   input_ids i32[B, S] · seqlens_k i32[B] (tokens after this run, − 1) · total_sequence_length i32[]
             (the largest of them, + 1) · logits_rows i64[R] (which of the B·S positions are wanted)
             past_key_values.{layer}.{key,value} f32 or f16 [B, kv_heads, M, head_size], M ≤ max_seq_len
    outputs  logits f32[R, vocab] · present.{layer}.{key,value}, to be bound to the same memory as the past

What is fused: q, k and v (norms part them again); gate and up; a residual sum with the norm that follows it.
How a linear computes is `onnx_linear.py`, how a mixture of experts does `onnx_moe.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgellm.checkpoint.base import Checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.errors import BuildError
from edgellm.executor.base import Progress
from edgellm.model.decoder import Attention, Expert, build_decoder, require_context
from edgellm.model.kv_cache import KV_DTYPES, KvCache
from edgellm.model.onnx_file import CONTRIB, Dimension, OnnxFile, onnx_type
from edgellm.model.onnx_linear import Compute, Linears, Value
from edgellm.model.onnx_moe import Mixtures
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Weight, scaled

MODEL_FILE: Final = "model.onnx"
DATA_FILE: Final = f"{MODEL_FILE}.data"


def emit(
    checkpoint: Checkpoint,
    directory: Path,
    build: BuildConfig,
    *,
    compute: Compute,
    kv_cache: KvCache = "fp32",
    progress: Progress,
) -> dict[str, str]:
    """Write `model.onnx` and `model.onnx.data` into the directory, a few rows at a time.

    Gives the SHA-256, in hex, of the files that were hashed while they were written.

    With a `fp16` cache attention alone computes in float16; the rest of the network does not change.

    Raises:
        BuildError: the network or a weight's layout has no ONNX form here.
        CheckpointError: a tensor is missing or damaged.
        OSError: the files cannot be written.
    """
    require_context(checkpoint.spec, build.max_seq_len)
    require_head_size(checkpoint.spec)
    file = OnnxFile(directory / MODEL_FILE)
    try:
        graph = OnnxGraph(
            file,
            checkpoint.spec,
            max_seq_len=build.max_seq_len,
            compute=compute,
            kv_cache=kv_cache,
            progress=progress,
        )
        build_decoder(graph, checkpoint)
        digest = file.close()
    finally:
        file.abandon()
    progress("model", 1.0)
    return {DATA_FILE: digest}


def require_head_size(spec: ModelSpec) -> None:
    """That GroupQueryAttention takes the model's heads: it says no otherwise, but only when it is first run.

    Raises:
        BuildError: their size is no multiple of 16.
    """
    if spec.head_size % 16:
        raise BuildError(
            f"head_size is {spec.head_size}; the CPU executor computes attention for multiples of 16 only"
        )


class OnnxGraph:
    """The decoder's `Graph`, writing nodes and tensors to a file as they come."""

    def __init__(
        self,
        file: OnnxFile,
        spec: ModelSpec,
        *,
        max_seq_len: int,
        compute: Compute,
        kv_cache: KvCache = "fp32",
        progress: Progress,
    ) -> None:
        self._file = file
        self._spec = spec
        self._max_seq_len = max_seq_len
        self._linears = Linears(file, compute)
        self._mixtures = Mixtures(file, self._linears)
        self._kv_dtype = KV_DTYPES[kv_cache]
        self._progress = progress
        self._counters: dict[str, itertools.count[int]] = {}
        self._projections: dict[str, tuple[Value, Sequence[Weight], Sequence[Weight | None]]] = {}
        file.input("input_ids", np.int32, ["B", "S"])
        file.input("seqlens_k", np.int32, ["B"])
        file.input("total_sequence_length", np.int32, [])
        file.input("logits_rows", np.int64, ["R"])

    def embed(self, weight: Weight) -> Value:
        return self._linears.embed("input_ids", weight, self._name("embed"))

    def norm(self, x: Value, gain: Weight, epsilon: float) -> Value:
        y = self._name("norm")
        gamma = self._file.constant(f"{y}.gain", gain.dequantize())
        if x.terms is not None:
            a, b = x.terms
            x.terms = None
            self._file.node(
                "SkipSimplifiedLayerNormalization",
                [a, b, gamma],
                [y, "", "", x.name],
                domain=CONTRIB,
                epsilon=epsilon,
            )
        else:
            self._file.node(
                "SimplifiedLayerNormalization", [x.name, gamma], [y], axis=-1, epsilon=epsilon, stash_type=1
            )
        return Value(y, x.rank, x.width)

    def qkv(self, x: Value, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> Value:
        y = self._name("qkv")
        # Written by `attention`, which knows the scale.
        self._projections[y] = x, weights, biases
        return Value(y, x.rank, sum(weight.shape[0] for weight in weights))

    def attention(self, qkv: Value, attention: Attention) -> Value:
        spec, layer = self._spec, attention.layer
        heads = self._heads(qkv, attention)
        y = self._name("attention")
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        # M, not max_seq_len: a daemon may give its slots less than the engine was built for.
        cache: list[Dimension] = ["B", spec.num_key_value_heads, "M", spec.head_size]
        for name in past:
            self._file.input(name, self._kv_dtype, cache)
        for name in present:
            self._file.output(name, self._kv_dtype, cache)
        # The operator's activations have the type of its caches.
        cast = self._kv_dtype != np.float32
        attended = f"{y}.attended" if cast else y
        if cast:
            heads = [self._cast(name, f"{y}.heads.{i}", self._kv_dtype) for i, name in enumerate(heads)]
        # With q, k and v packed into the first input, key and value are left out.
        query, key, value = heads if len(heads) == 3 else (*heads, "", "")
        self._file.node(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_sequence_length", *self._rotary(attention)],
            [attended, *present],
            domain=CONTRIB,
            num_heads=spec.num_attention_heads,
            kv_num_heads=spec.num_key_value_heads,
            scale=1.0,
            do_rotary=1,
            rotary_interleaved=0,
        )
        if cast:
            self._cast(attended, y, np.float32)
        self._progress("model", (layer + 1) / (spec.num_hidden_layers + 1))
        return Value(y, 3, spec.num_attention_heads * spec.head_size)

    def _heads(self, qkv: Value, attention: Attention) -> list[str]:
        """Write the projections; gives q, k and v in one tensor, or in three where there are norms.

        Attention's scale is in what makes q: q·k needs no factor then, and ONNX Runtime has a kernel for one
        row times a transposed matrix that takes none. In a norm's gain it rounds once; in q's weights it is
        exact where it is a power of two, as for heads of 64, otherwise it rounds the float32 scales of their
        groups once.
        """
        x, weights, biases = self._projections.pop(qkv.name)
        if attention.q_norm is None and attention.k_norm is None:
            bias = biases[0]
            weights = [scaled(weights[0], attention.scale), *weights[1:]]
            biases = [None if bias is None else scaled(bias, attention.scale), *biases[1:]]
            self._linears.project(x, weights, biases, qkv.name)
            return [qkv.name]

        # A norm would undo a scale in q's weights. GroupQueryAttention has inputs for these norms, which its
        # CPU kernel refuses.
        assert attention.q_norm is not None
        assert attention.k_norm is not None
        self._linears.project(x, weights, biases, qkv.name)
        parts = [f"{qkv.name}.{part}" for part in "qkv"]
        widths = np.array([weight.shape[0] for weight in weights], np.int64)
        sizes = self._file.constant("heads.widths", widths)
        self._file.node("Split", [qkv.name, sizes], parts, axis=-1)
        query, key, value = parts
        return [
            self._normed_heads(query, scaled(attention.q_norm, attention.scale)),
            self._normed_heads(key, attention.k_norm),
            value,
        ]

    def _normed_heads(self, x: str, gain: Weight) -> str:
        """RMSNorm over each head of x [B, S, heads · head_size]."""
        size, y = self._spec.head_size, f"{x}.normed"
        heads = self._file.constant("heads.split", np.array([0, 0, -1, size], np.int64))
        joined = self._file.constant("heads.joined", np.array([0, 0, -1], np.int64))
        gamma = self._file.constant(f"{y}.gain", gain.dequantize())
        self._file.node("Reshape", [x, heads], [f"{x}.heads"])
        self._file.node(
            "SimplifiedLayerNormalization",
            [f"{x}.heads", gamma],
            [f"{y}.heads"],
            axis=-1,
            epsilon=self._spec.norm_epsilon,
            stash_type=1,
        )
        self._file.node("Reshape", [f"{y}.heads", joined], [y])
        return y

    def _cast(self, x: str, y: str, dtype: type[np.number[Any]]) -> str:
        self._file.node("Cast", [x], [y], to=onnx_type(dtype))
        return y

    def linear(self, x: Value, weight: Weight, bias: Weight | None, residual: Value) -> Value:
        product = self._linears.project(x, [weight], [bias], self._name("linear"))
        return Value(self._name("sum"), x.rank, product.width, (product.name, self._computed(residual)))

    def swiglu(self, x: Value, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> Value:
        both = self._linears.project(x, [gate, up], biases, self._name("gate_up"))
        y, width = self._name("swiglu"), gate.shape[0]
        halves = self._file.constant(f"halves.{width}", np.array([width, width], np.int64))
        self._file.node("Split", [both.name, halves], [f"{y}.gate", f"{y}.up"], axis=-1)
        # x · sigmoid(1 · x) is SiLU.
        self._file.node("QuickGelu", [f"{y}.gate"], [f"{y}.silu"], domain=CONTRIB, alpha=1.0)
        self._file.node("Mul", [f"{y}.silu", f"{y}.up"], [y])
        return Value(y, x.rank, width)

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
        y = self._mixtures.mix(x, router, experts, top_k, self._name("moe"), normalize=normalize)
        return Value(self._name("sum"), x.rank, y.width, (y.name, self._computed(residual)))

    def rows(self, x: Value) -> Value:
        y = self._name("rows")
        shape = self._file.constant(f"flat.{x.width}", np.array([-1, x.width], np.int64))
        self._file.node("Reshape", [self._computed(x), shape], [f"{y}.flat"])
        self._file.node("Gather", [f"{y}.flat", "logits_rows"], [y], axis=0)
        return Value(y, 2, x.width)

    def logits(self, x: Value, weight: Weight) -> Value:
        y = self._linears.project(x, [weight], [None], "logits")
        self._file.output("logits", np.float32, ["R", y.width])
        return y

    def _computed(self, x: Value) -> str:
        """The name of x, adding its terms if nobody has."""
        if x.terms is not None:
            self._file.node("Add", x.terms, [x.name])
            x.terms = None
        return x.name

    def _rotary(self, attention: Attention) -> tuple[str, str]:
        """Tensors [max_seq, head_size / 2]: cos and sin."""
        tables = attention.rotary.tables(self._max_seq_len)
        cos, sin = (
            self._file.constant(f"rotary.{name}", table.astype(self._kv_dtype))
            for name, table in zip(("cos", "sin"), tables, strict=True)
        )
        return cos, sin

    def _name(self, kind: str) -> str:
        return f"{kind}.{next(self._counters.setdefault(kind, itertools.count()))}"

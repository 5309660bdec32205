"""What a step launches: the network over named buffers, for a bucket of decode rows or of a prompt's tokens.

Buffers of two kinds. Lasting ones keep something between steps: weights, caches, the slots' last tokens and
sampling parameters, what the host uploads, counters. All others live from the first launch that names them to
the last; programs never run at the same time, so they share one piece of memory.

    decode    embed → [qkv · attention · output · gate and up · down] × layers → head → sample;
              of a mixture of experts [… · norm · router · route · gate and up · down · combine]
    prefill   embed → [norm · qkv · rotate, append · attention · output · norm · gate and up · down] × layers
              → head → sample; after the last attention the last token's row alone, as decode does it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal

from edgellm.cuda.launch import At, Device, Launch
from edgellm.executor.buckets import MOST_ROWS, decode_buckets, prefill_buckets
from edgellm.executor.cuda_caches import Caches
from edgellm.executor.program import Program
from edgellm.executor.sampling_launches import sampling_buffers, tokens_of_logits
from edgellm.kernels.attention_decode import decode_attention
from edgellm.kernels.attention_decode import decode_workspace as attention_workspace
from edgellm.kernels.attention_prefill import (
    prefill_attention,
    prefill_attention_workspace,
    rope_and_append,
)
from edgellm.kernels.attention_shape import CacheKind, HeadNorms
from edgellm.kernels.elementwise import embed_chunk, embed_rows, last_row, rms_norm
from edgellm.kernels.gemm import prefill_linear, prefill_workspace
from edgellm.kernels.linear import Epilogue, decode_linear, decode_workspace
from edgellm.kernels.moe import chunk_mixture, mixture_workspace, router_workspace, row_mixture
from edgellm.kernels.moe_shape import MixtureShape, MixtureWeights, Tokens
from edgellm.kernels.norm import Norm as FusedNorm
from edgellm.kernels.norm import NormAhead
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.memory.arena import Buffer
from edgellm.memory.plan import Shape
from edgellm.model.network import Layer, Linear, Mixture, Network, Norm
from edgellm.model.spec import ModelSpec

# What passes from the writers of the residual to the linears behind norms (kernels/norm.py). Scales
# alternate: those that a layer's attention norm leaves are for its MLP's, that one's for the next layer's.
_SCALED: Final = At("scaled")
_SQUARES: Final = At("squares")
_AFTER_ATTENTION_NORM: Final = At("scales.attention")
_AFTER_MLP_NORM: Final = At("scales.mlp")

ChunkEpilogue = Literal["store", "residual", "swiglu"]


class Lowering:
    """Makes programs of a network.

    Args:
        network: of the engine.
        spec: the model's numbers.
        shape: slots, their length, tokens in a step.
        kv_cache: what the caches hold.
        device: that launches are cut for.
        weights: offset of every tensor in the buffer `weights`, and the size of all.

    Attributes:
        caches: of keys and values.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        shape: Shape,
        *,
        kv_cache: CacheKind,
        device: Device,
        weights: Mapping[str, int],
        weights_bytes: int,
    ) -> None:
        self._network = network
        self._spec = spec
        self._shape = shape
        self._device = device
        self._weights = weights
        self._weights_bytes = weights_bytes
        self.caches = Caches(network, spec, shape, kv_cache)
        self._linear_workspace = 0
        self._prefill_workspace = 0
        self._attention_workspace = 0

    def decode(self, rows: int) -> Program:
        """One token for each of `rows` rows, `rows` ROWs in the buffer `rows`; tokens go to `results`."""
        return Program.of(self._decode(rows), self._sizes(rows))

    def prefill(self, tokens: int) -> Program:
        """Up to `tokens` tokens of a slot: `chunk` holds a CHUNK, then the ids; a token goes to `results`."""
        return Program.of(self._prefill(tokens), self._sizes(tokens))

    def lasting(self) -> tuple[Buffer, ...]:
        """Buffers that keep something between steps, once all programs have been made."""
        shape, attention = self._shape, self.caches.any_attention
        rows = min(MOST_ROWS, decode_buckets(shape.max_batch_size)[-1])
        sizes = {
            "weights": self._weights_bytes,
            "kv_cache": self.caches.bytes,
            "rope": attention.max_seq * attention.head_size * 4,
            "rows": rows * ROW.itemsize,
            "chunk": CHUNK.itemsize + prefill_buckets(shape)[-1] * 4,
            "linear_workspace": self._linear_workspace,
            "prefill_workspace": self._prefill_workspace,
            "attention_workspace": self._attention_workspace,
        }
        own = (Buffer(name, size) for name, size in sizes.items())
        return (*own, *sampling_buffers(self._spec.vocab_size, slots=shape.max_batch_size, rows=rows))

    def _sizes(self, rows: int) -> dict[str, int]:
        spec, attention = self._spec, self.caches.any_attention
        mixtures = [layer.mlp for layer in self._network.layers if isinstance(layer.mlp, Mixture)]
        mixture = max((self._mixture_bytes(each, rows) for each in mixtures), default=0)
        inner = max(layer.mlp.gate_up.shape.outputs for layer in self._network.layers)
        heads = attention.heads * attention.head_size
        return {
            "residual": rows * spec.hidden_size * 4,
            "normed": rows * spec.hidden_size * 2,
            "scaled": min(rows, MOST_ROWS) * spec.hidden_size * 2,
            "squares": min(rows, MOST_ROWS) * (spec.hidden_size // 16) * 4,
            "scales": min(rows, MOST_ROWS) * 4,
            "qkv": rows * attention.qkv_width * 2,
            "attended": rows * heads * 2,
            "inner": rows * inner * 2,
            "mixture": mixture,
            "last_residual": spec.hidden_size * 4,
            "last_attended": heads * 2,
            "logits": min(rows, MOST_ROWS) * spec.vocab_size * 4,
        }

    def _decode(self, rows: int) -> Iterator[Launch]:
        network, table = self._network, self._network.embedding
        residual = At("residual")
        yield from embed_rows(
            table.table,
            rows=rows,
            rows_at=At("rows"),
            last_token=At("last_token"),
            elements=self._tensor(table.elements),
            scales=self._optional(table.scales),
            offsets=self._optional(table.offsets),
            out=residual,
            epsilon=self._spec.norm_epsilon,
            ahead=self._ahead(self._norm_behind(-1), _AFTER_MLP_NORM),
        )
        for index, layer in enumerate(network.layers):
            qkv, attended = At(f"qkv.{index}"), At(f"attended.{index}")
            norm = self._found(layer.attention_norm, _AFTER_MLP_NORM, _AFTER_ATTENTION_NORM)
            yield from self._row_linear(layer.qkv, rows, _SCALED, qkv, norm=norm, epilogue="store")
            attention = self.caches.attention[index]
            size = attention_workspace(attention, rows=rows, device=self._device)
            self._attention_workspace = max(self._attention_workspace, size)
            yield from decode_attention(
                attention,
                rows=rows,
                device=self._device,
                qkv=qkv,
                rows_at=At("rows"),
                rope=At("rope"),
                norms=self._head_norms(layer),
                cache=self.caches.of(index),
                out=attended,
                workspace=At("attention_workspace"),
            )
            yield from self._after_attention(index, rows, attended, residual, At("rows"))
        yield from self._end(rows, At("rows"))

    def _prefill(self, tokens: int) -> Iterator[Launch]:
        network, table = self._network, self._network.embedding
        residual, chunk = At("residual"), At("chunk")
        yield from embed_chunk(
            table.table,
            tokens=tokens,
            chunk=chunk,
            ids=At("chunk", CHUNK.itemsize),
            elements=self._tensor(table.elements),
            scales=self._optional(table.scales),
            offsets=self._optional(table.offsets),
            out=residual,
        )
        for index, layer in enumerate(network.layers):
            qkv, attended, normed = (At(f"{name}.{index}") for name in ("qkv", "attended", "normed"))
            yield from self._norm(layer.attention_norm, tokens, residual, normed, chunk)
            yield from self._chunk_linear(layer.qkv, tokens, normed, "store", qkv)
            attention, cache = self.caches.attention[index], self.caches.of(index)
            yield from rope_and_append(
                attention,
                tokens=tokens,
                chunk=chunk,
                qkv=qkv,
                rope=At("rope"),
                norms=self._head_norms(layer),
                cache=cache,
            )
            size = prefill_attention_workspace(attention, tokens=tokens, device=self._device)
            self._attention_workspace = max(self._attention_workspace, size)
            yield from prefill_attention(
                attention,
                tokens=tokens,
                device=self._device,
                chunk=chunk,
                qkv=qkv,
                cache=cache,
                out=attended,
                workspace=At("attention_workspace") if size else None,
            )
            if index == len(network.layers) - 1:
                break
            yield from self._chunk_linear(layer.output, tokens, attended, "residual", residual)
            yield from self._chunk_mlp(index, tokens, residual)
        # Nothing after the last attention looks at other tokens.
        index = len(network.layers) - 1
        yield from last_row(
            self._spec.hidden_size,
            network.layers[index].output.shape.k,
            chunk=chunk,
            x=residual,
            h=At(f"attended.{index}"),
            epsilon=self._spec.norm_epsilon,
            x_out=At("last_residual"),
            h_out=At("last_attended"),
            scales=_AFTER_ATTENTION_NORM,
        )
        yield from self._after_attention(index, 1, At("last_attended"), At("last_residual"), chunk)
        yield from self._end(1, chunk)

    def _after_attention(
        self, index: int, rows: int, attended: At, residual: At, rows_at: At
    ) -> Iterator[Launch]:
        """The output projection and the MLP, of decode rows."""
        layer, inner = self._network.layers[index], At(f"inner.{index}")
        behind = self._ahead(self._norm_behind(index), _AFTER_MLP_NORM)
        if isinstance(layer.mlp, Mixture):
            yield from self._row_linear(layer.output, rows, attended, residual, epilogue="residual")
            normed = At(f"normed.{index}.mlp")
            yield from self._norm(layer.mlp_norm, rows, residual, normed, None, scales=_AFTER_MLP_NORM)
            shape = _mixture_shape(layer.mlp)
            size = router_workspace(shape, rows, self._device, chunk=False)
            self._linear_workspace = max(self._linear_workspace, size)
            yield from row_mixture(
                shape,
                Tokens(rows, rows_at=rows_at),
                device=self._device,
                x=normed,
                weights=self._mixture_weights(layer.mlp),
                residual=residual,
                ahead=behind,
                workspace=At(f"mixture.{index}"),
                linear_workspace=At("linear_workspace") if size else None,
            )
            return
        ahead = self._ahead(layer.mlp_norm, _AFTER_ATTENTION_NORM)
        yield from self._row_linear(layer.output, rows, attended, residual, epilogue="residual", ahead=ahead)
        norm = self._found(layer.mlp_norm, _AFTER_ATTENTION_NORM, _AFTER_MLP_NORM)
        yield from self._row_linear(layer.mlp.gate_up, rows, _SCALED, inner, norm=norm, epilogue="swiglu")
        yield from self._row_linear(layer.mlp.down, rows, inner, residual, epilogue="residual", ahead=behind)

    def _chunk_mlp(self, index: int, tokens: int, residual: At) -> Iterator[Launch]:
        """The MLP of a chunk."""
        layer, normed, inner = self._network.layers[index], At(f"normed.{index}.mlp"), At(f"inner.{index}")
        yield from self._norm(layer.mlp_norm, tokens, residual, normed, At("chunk"))
        if not isinstance(layer.mlp, Mixture):
            yield from self._chunk_linear(layer.mlp.gate_up, tokens, normed, "swiglu", inner)
            yield from self._chunk_linear(layer.mlp.down, tokens, inner, "residual", residual)
            return
        shape = _mixture_shape(layer.mlp)
        size = router_workspace(shape, tokens, self._device, chunk=True)
        self._prefill_workspace = max(self._prefill_workspace, size)
        yield from chunk_mixture(
            shape,
            tokens,
            device=self._device,
            chunk=At("chunk"),
            x=normed,
            weights=self._mixture_weights(layer.mlp),
            residual=residual,
            workspace=At(f"mixture.{index}"),
            linear_workspace=At("prefill_workspace") if size else None,
        )

    def _mixture_weights(self, mixture: Mixture) -> MixtureWeights:
        parts = (mixture.router, mixture.gate_up, mixture.down)
        return MixtureWeights(*(self._tensor(part.weights) for part in parts))

    def _mixture_bytes(self, mixture: Mixture, rows: int) -> int:
        shape = _mixture_shape(mixture)
        # After the last attention a chunk is one row.
        return max(mixture_workspace(shape, count, self._device) for count in (1, rows))

    def _end(self, rows: int, rows_at: At) -> Iterator[Launch]:
        """The head, and a token of its logits."""
        network = self._network
        norm = self._found(network.norm, _AFTER_MLP_NORM, None)
        yield from self._row_linear(network.head, rows, _SCALED, At("logits"), norm=norm, epilogue="logits")
        yield from tokens_of_logits(self._spec.vocab_size, rows, rows_at, self._device)

    def _norm_behind(self, index: int) -> Norm:
        """The norm behind a layer; of -1, behind the embedding."""
        layers = self._network.layers
        return self._network.norm if index + 1 == len(layers) else layers[index + 1].attention_norm

    def _ahead(self, norm: Norm, scales: At) -> NormAhead:
        """What a writer of the residual leaves for a norm."""
        return NormAhead(self._tensor(norm.gain), scales, _SCALED, _SQUARES)

    def _found(self, norm: Norm, scales: At, next_scales: At | None) -> FusedNorm:
        """The same as the linear behind the norm finds it."""
        return FusedNorm(norm.epsilon, _SQUARES, scales, next_scales)

    def _row_linear(
        self,
        linear: Linear,
        rows: int,
        x: At,
        out: At,
        *,
        epilogue: Epilogue,
        norm: FusedNorm | None = None,
        ahead: NormAhead | None = None,
    ) -> Iterator[Launch]:
        size = decode_workspace(linear.shape, rows, self._device)
        self._linear_workspace = max(self._linear_workspace, size)
        yield from decode_linear(
            linear.shape,
            rows=rows,
            device=self._device,
            x=x,
            norm=norm,
            weights=self._tensor(linear.weights),
            bias=self._optional(linear.bias),
            epilogue=epilogue,
            out=out,
            workspace=At("linear_workspace") if size else None,
            ahead=ahead,
        )

    def _chunk_linear(
        self, linear: Linear, tokens: int, x: At, epilogue: ChunkEpilogue, out: At
    ) -> Iterator[Launch]:
        size = prefill_workspace(linear.shape, tokens, self._device)
        self._prefill_workspace = max(self._prefill_workspace, size)
        yield from prefill_linear(
            linear.shape,
            tokens=tokens,
            device=self._device,
            chunk=At("chunk"),
            x=x,
            weights=self._tensor(linear.weights),
            bias=self._optional(linear.bias),
            epilogue=epilogue,
            out=out,
            workspace=At("prefill_workspace") if size else None,
        )

    def _norm(
        self, norm: Norm, rows: int, x: At, out: At, chunk: At | None, *, scales: At | None = None
    ) -> Iterator[Launch]:
        yield from rms_norm(
            self._spec.hidden_size,
            rows=rows,
            x=x,
            gain=self._tensor(norm.gain),
            epsilon=norm.epsilon,
            out=out,
            chunk=chunk,
            scales=scales,
        )

    def _head_norms(self, layer: Layer) -> HeadNorms:
        part = layer.attention
        return HeadNorms(self._optional(part.q_gain), self._optional(part.k_gain))

    def _tensor(self, name: str) -> At:
        return At("weights", self._weights[name])

    def _optional(self, name: str | None) -> At | None:
        return None if name is None else self._tensor(name)


def _mixture_shape(mixture: Mixture) -> MixtureShape:
    return MixtureShape(
        mixture.top_k,
        mixture.normalize,
        mixture.router.shape,
        mixture.gate_up.shape,
        mixture.down.shape,
    )

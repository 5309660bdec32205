"""The network, once: a decoder-only transformer on an abstract graph that every executor's emitter writes.

Tokens are flat, [T, ...], however an emitter arranges them into rows of a batch; token ids, positions, caches
and which positions are wanted are the emitter's inputs. Values are handles that an emitter may leave
unevaluated until it sees who uses them: a sum can wait for the norm that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from edgellm.checkpoint.base import Checkpoint
from edgellm.errors import BuildError
from edgellm.model.rotary import Rotary, make_rotary
from edgellm.model.spec import ModelSpec, Normalization
from edgellm.model.weights import Dense, Weight

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "QWenLMHeadModel",
)
"""What `build_decoder` knows, by Hugging Face's class names. ModelSpec's numbers tell them apart:
Qwen2 and the first Qwen have biases on q, k and v, Qwen3 norms on q and k, Qwen3Moe mixtures of experts
besides; Mistral may have a window."""

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention, apart from its projections.

    Attributes:
        layer: index of the layer, whose caches it uses.
        scale: factor on q·k before the softmax.
        rotary: how far each pair turns; with Hugging Face's halves: element j pairs with j + head_size / 2.
        q_norm, k_norm: [head_size] gains of an RMSNorm on every head before the rotation, or None.
    """

    layer: int
    scale: float
    rotary: Rotary
    q_norm: Weight | None = None
    k_norm: Weight | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """One gated MLP of a mixture: gate and up [F, D], down [D, F]."""

    gate: Weight
    up: Weight
    down: Weight


class Graph(Protocol[V]):
    """What an emitter implements. E vocabulary, D hidden size, F MLP width, H query heads, d head size."""

    def embed(self, weight: Weight) -> V:
        """Rows of `weight` [E, D] picked by the input tokens → [T, D]."""
        ...

    def norm(self, x: V, gain: Weight, epsilon: float) -> V:
        """RMSNorm: x · gain / sqrt(mean(x²) + epsilon), over the last axis (Zhang and Sennrich 2019)."""
        ...

    def qkv(self, x: V, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> V:
        """The three projections of attention, opaque: only `attention` takes them."""
        ...

    def attention(self, qkv: V, attention: Attention) -> V:
        """Rotate q and k, append k and v to the layer's cache, causal attention over it → [T, H·d]."""
        ...

    def linear(self, x: V, weight: Weight, bias: Weight | None, residual: V) -> V:
        """x · weightᵀ + bias + residual."""
        ...

    def swiglu(self, x: V, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> V:
        """silu(x · gateᵀ) · (x · upᵀ) → [T, F] (Shazeer 2020)."""
        ...

    def moe(
        self,
        x: V,
        router: Weight,
        experts: Sequence[Expert],
        top_k: int,
        *,
        normalize: bool,
        residual: V,
    ) -> V:
        """Σ_e p_e · down_e(silu(x · gate_eᵀ) · (x · up_eᵀ)) + residual, over each token's top_k experts
        (Shazeer et al. 2017; transformers' Qwen3MoeSparseMoeBlock).

        p = softmax(x · routerᵀ), in float32 over all experts, router [experts, D]; the top_k largest count,
        of equal ones those of lower index, and with `normalize` they are divided by their sum.
        """
        ...

    def rows(self, x: V) -> V:
        """The positions whose logits are wanted, [T, ...] → [R, ...]; what follows works on those alone."""
        ...

    def logits(self, x: V, weight: Weight) -> V:
        """x · weightᵀ → float32 [R, E]."""
        ...


def build_decoder(graph: Graph[V], checkpoint: Checkpoint) -> V:
    """Write the checkpoint's network on `graph`; gives its logits.

    Raises:
        BuildError: the network has a part that is not written here, or tensors that its numbers deny.
        CheckpointError: a tensor is missing.
    """
    spec = checkpoint.spec
    _require_supported(spec)

    def weight(name: str, *shape: int) -> Weight:
        return _shaped(checkpoint.tensor(name), shape)

    def bias(name: str, size: int) -> Weight | None:
        return weight(f"{name}.bias", size) if checkpoint.has(f"{name}.bias") else None

    rotary = _rotary(spec)
    hidden, mlp = spec.hidden_size, spec.intermediate_size
    query, key = spec.num_attention_heads * spec.head_size, spec.num_key_value_heads * spec.head_size

    embedding = weight("embed_tokens", spec.vocab_size, hidden)
    x = graph.embed(embedding)
    for layer in range(spec.num_hidden_layers):
        here = f"layers.{layer}"
        attn, ffn = f"{here}.self_attn", f"{here}.mlp"
        for name in (f"{attn}.{part}_proj.bias" for part in "qkv"):
            _require_agreement(checkpoint, name, "attn_bias", expected=spec.attn_bias)
        for name in (f"{attn}.{part}_norm" for part in "qk"):
            _require_agreement(checkpoint, name, "qk_layernorm", expected=spec.qk_layernorm)

        h = graph.norm(x, weight(f"{here}.input_layernorm", hidden), spec.norm_epsilon)
        parts = {f"{attn}.q_proj": query, f"{attn}.k_proj": key, f"{attn}.v_proj": key}
        h = graph.qkv(
            h, [weight(p, n, hidden) for p, n in parts.items()], [bias(p, n) for p, n in parts.items()]
        )
        h = graph.attention(
            h,
            Attention(
                layer=layer,
                scale=spec.head_size**-0.5,
                rotary=rotary,
                q_norm=weight(f"{attn}.q_norm", spec.head_size) if spec.qk_layernorm else None,
                k_norm=weight(f"{attn}.k_norm", spec.head_size) if spec.qk_layernorm else None,
            ),
        )
        if layer == spec.num_hidden_layers - 1:
            # Nothing after the last attention looks at other positions, so prefill skips most of this layer.
            h, x = graph.rows(h), graph.rows(x)
        o = f"{attn}.o_proj"
        x = graph.linear(h, weight(o, hidden, query), bias(o, hidden), residual=x)

        h = graph.norm(x, weight(f"{here}.post_attention_layernorm", hidden), spec.norm_epsilon)
        if spec.moe is not None and spec.is_mixture(layer):
            inner = spec.moe_intermediate_size
            x = graph.moe(
                h,
                weight(f"{ffn}.gate", spec.moe.num_experts, hidden),
                [
                    Expert(
                        weight(f"{ffn}.experts.{e}.gate_proj", inner, hidden),
                        weight(f"{ffn}.experts.{e}.up_proj", inner, hidden),
                        weight(f"{ffn}.experts.{e}.down_proj", hidden, inner),
                    )
                    for e in range(spec.moe.num_experts)
                ],
                spec.moe.top_k,
                normalize=spec.moe.normalization_mode == Normalization.RENORMALIZE,
                residual=x,
            )
            continue
        gate, up, down = f"{ffn}.gate_proj", f"{ffn}.up_proj", f"{ffn}.down_proj"
        h = graph.swiglu(
            h, weight(gate, mlp, hidden), weight(up, mlp, hidden), [bias(gate, mlp), bias(up, mlp)]
        )
        x = graph.linear(h, weight(down, hidden, mlp), bias(down, hidden), residual=x)

    x = graph.norm(x, weight("norm", hidden), spec.norm_epsilon)
    # The same object when tied, so that an emitter can see that one tensor serves both.
    head = weight("lm_head", spec.vocab_size, hidden) if checkpoint.has("lm_head") else embedding
    return graph.logits(x, head)


def _require_supported(spec: ModelSpec) -> None:
    if spec.architecture not in ARCHITECTURES:
        raise BuildError(
            f"architecture {spec.architecture} cannot be built yet; edgellm builds {', '.join(ARCHITECTURES)}"
        )
    if spec.hidden_act != "silu":
        raise BuildError(f"hidden_act {spec.hidden_act!r} cannot be built; only 'silu' can")
    if spec.position_embedding_type != "rope_gpt_neox":
        raise BuildError(
            f"position_embedding_type {spec.position_embedding_type!r} cannot be built; "
            "only 'rope_gpt_neox' can"
        )
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise BuildError(
            f"{spec.num_attention_heads} query heads cannot share "
            f"{spec.num_key_value_heads} key/value heads evenly"
        )
    if spec.moe is not None and not 0 < spec.moe.top_k <= spec.moe.num_experts:
        raise BuildError(f"a token cannot go through {spec.moe.top_k} of {spec.moe.num_experts} experts")


def _require_agreement(checkpoint: Checkpoint, name: str, field: str, *, expected: bool) -> None:
    """That a tensor is there if and only if the model's numbers say so: it is never left out silently."""
    if checkpoint.has(name) != expected:
        there = "lacks" if expected else "has"
        raise BuildError(f"the checkpoint {there} {name}, but its {field} is {expected}")


def _rotary(spec: ModelSpec) -> Rotary:
    try:
        return make_rotary(spec.head_size, spec.rotary_base, spec.rotary_scaling)
    except ValueError as error:
        raise BuildError(f"rotary_scaling makes no sense: {error}") from error


def require_context(spec: ModelSpec, max_seq_len: int) -> None:
    """For emitters: a context must fit into what is computed here: no sliding windows, no lengths that scale.

    Raises:
        BuildError: it does not.
    """
    if spec.architecture == "QWenLMHeadModel" and max_seq_len > spec.max_position_embeddings:
        raise BuildError(
            f"beyond {spec.max_position_embeddings} tokens the model scales its queries and rotary "
            "frequencies by the length of the text, which edgellm does not do; "
            f"build it for at most that, not for {max_seq_len}"
        )
    window = spec.sliding_window
    if window is not None and max_seq_len > window:
        raise BuildError(
            f"the model attends through a sliding window of {window} tokens, which edgellm does not do; "
            f"build it for at most that, not for {max_seq_len}"
        )


def _shaped(weight: Weight, shape: tuple[int, ...]) -> Weight:
    if weight.shape != shape:
        expected, found = (" × ".join(map(str, s)) for s in (shape, weight.shape))
        raise BuildError(f"{weight.name} is {found}, but the model's numbers ask for {expected}")
    if len(shape) == 1 and not isinstance(weight, Dense):
        raise BuildError(f"{weight.name} is quantized; norms and biases must be F32, F16 or BF16")
    return weight

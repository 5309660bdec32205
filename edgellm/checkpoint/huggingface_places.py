"""Where a model's tensors are in a Hugging Face directory, under transformers' names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from edgellm.checkpoint.huggingface_config import Family
from edgellm.checkpoint.place import Place, fused
from edgellm.model.spec import ModelSpec

FUSED_GATE_UP: Final = ".mlp.experts.gate_up_proj"
"""All experts' gate and up in one tensor [E, 2F, D], as transformers 5 holds them and can save them."""
_FUSED_DOWN: Final = ".mlp.experts.down_proj"


def places_of(spec: ModelSpec, family: Family, *, fused_experts: bool) -> Iterator[tuple[str, Place]]:
    """Canonical names, and where they are, in the order in which a model uses them.

    Args:
        fused_experts: whether each layer's experts are in two tensors.
    """
    for name, shape in _shapes(spec, family):
        layer, is_expert, rest = name.partition(".mlp.experts.")
        stored = name if name == "lm_head" else f"model.{name}"
        if is_expert and fused_experts:
            assert spec.moe is not None
            number, part = rest.split(".")
            yield name, _fused_expert(f"model.{layer}", part, int(number), spec.moe.num_experts, shape)
        else:
            yield name, Place(stored, shape)


def _fused_expert(layer: str, part: str, number: int, experts: int, shape: tuple[int, ...]) -> Place:
    n, k = shape
    if part == "down_proj":
        return Place(f"{layer}{_FUSED_DOWN}", (experts, n, k), number * n, n)
    one = fused("", part, {"gate_proj": shape, "up_proj": shape})
    return Place(f"{layer}{FUSED_GATE_UP}", (experts, *one.shape), number * one.shape[0] + one.first, n)


def _shapes(spec: ModelSpec, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(canonical name, shape) of every tensor, in the order in which a model uses them."""
    hidden, inner, head = spec.hidden_size, spec.intermediate_size, spec.head_size
    queries, keys = spec.num_attention_heads * head, spec.num_key_value_heads * head
    attention: dict[str, tuple[int, int]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    dense = {f"mlp.{part}": shape for part, shape in _mlp(inner, hidden).items()}
    mixture: dict[str, tuple[int, int]] = {}
    if spec.moe is not None:
        mixture["mlp.gate"] = (spec.moe.num_experts, hidden)
        for expert in range(spec.moe.num_experts):
            for part, shape in _mlp(spec.moe_intermediate_size, hidden).items():
                mixture[f"mlp.experts.{expert}.{part}"] = shape

    def biased(linear: str) -> bool:
        if linear.startswith("mlp."):
            return spec.mlp_bias
        return spec.attn_bias and not (family.qkv_bias and linear == "self_attn.o_proj")

    yield "embed_tokens", (spec.vocab_size, hidden)
    for layer in range(spec.num_hidden_layers):
        here = f"layers.{layer}"
        yield f"{here}.input_layernorm", (hidden,)
        yield f"{here}.post_attention_layernorm", (hidden,)
        if spec.qk_layernorm:
            yield f"{here}.self_attn.q_norm", (head,)
            yield f"{here}.self_attn.k_norm", (head,)
        mlp = mixture if spec.is_mixture(layer) else dense
        for linear, shape in (attention | mlp).items():
            yield f"{here}.{linear}", shape
            if biased(linear):
                yield f"{here}.{linear}.bias", shape[:1]
    yield "norm", (hidden,)
    if not spec.tie_word_embeddings:
        yield "lm_head", (spec.vocab_size, hidden)


def _mlp(inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Projection → shape, of one gated MLP."""
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}

"""Where a model's tensors are in a GGUF file, under llama.cpp's names (gguf-py's constants.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from edgellm.checkpoint.gguf_spec import Architecture
from edgellm.checkpoint.place import Place, fused
from edgellm.model.spec import ModelSpec

TOP: Final = {
    "embed_tokens": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
"""Canonical name → GGUF's."""
_LAYER: Final = {
    "input_layernorm": "attn_norm.weight",
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm": "attn_q_norm.weight",
    "self_attn.k_norm": "attn_k_norm.weight",
    "post_attention_layernorm": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}
_QKV: Final = tuple(f"self_attn.{part}_proj{suffix}" for suffix in ("", ".bias") for part in "qkv")
BIASES: Final = frozenset(_QKV[3:])
HEAD_NORMS: Final = frozenset({"self_attn.q_norm", "self_attn.k_norm"})


def places_of(spec: ModelSpec, architecture: Architecture) -> Iterator[tuple[str, Place]]:
    """Canonical names, and where they are, in the order in which a model uses them."""
    vocabulary = spec.vocab_size, spec.hidden_size
    yield "embed_tokens", Place(TOP["embed_tokens"], vocabulary)
    layer = dict(_layer(spec, architecture))
    for number in range(spec.num_hidden_layers):
        for part, place in layer.items():
            yield f"layers.{number}.{part}", replace(place, stored=f"blk.{number}.{place.stored}")
    yield "norm", Place(TOP["norm"], (spec.hidden_size,))
    yield "lm_head", Place(TOP["lm_head"], vocabulary)


def _layer(spec: ModelSpec, architecture: Architecture) -> Iterator[tuple[str, Place]]:
    """The same of a layer, without its number."""
    shapes = _shapes(spec)
    for part, stored in _LAYER.items():
        if part in HEAD_NORMS and not spec.qk_layernorm:
            continue
        if part.startswith("mlp.") and spec.moe is not None:
            continue
        if architecture.fused_qkv and part in _QKV:
            suffix = ".bias" if part in BIASES else ""
            parts = {one: shapes[one] for one in _QKV if (one in BIASES) == (part in BIASES)}
            yield part, fused(f"attn_qkv{suffix or '.weight'}", part, parts)
        else:
            yield part, Place(stored, shapes[part])
    if spec.moe is None:
        return
    hidden, inner, experts = spec.hidden_size, spec.moe_intermediate_size, spec.moe.num_experts
    yield "mlp.gate", Place("ffn_gate_inp.weight", (experts, hidden))
    for part, (n, k) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
        for expert in range(experts):
            place = Place(f"ffn_{part}_exps.weight", (experts, n, k), expert * n, n)
            yield f"mlp.experts.{expert}.{part}_proj", place


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = spec.hidden_size, spec.intermediate_size, spec.head_size
    queries, keys = spec.num_attention_heads * head, spec.num_key_value_heads * head
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

"""Networks of each family, small enough for float32 numpy: what an executor's steps are compared on."""

from __future__ import annotations

from typing import Final

from edgellm.model.spec import Mixture, ModelSpec


def _mixture(experts: int, top_k: int) -> ModelSpec:
    return ModelSpec(
        architecture="Qwen3MoeForCausalLM",
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_size=64,
        intermediate_size=512,
        norm_epsilon=1e-6,
        max_position_embeddings=2048,
        rotary_base=1e6,
        qk_layernorm=True,
        moe=Mixture(num_experts=experts, top_k=top_k),
        moe_intermediate_size=192,
    )


SMALL: Final[dict[str, ModelSpec]] = {
    "llama, 6/2 heads of 64, tied": ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_size=64,
        intermediate_size=1024,
        norm_epsilon=1e-5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "qwen2, 7/1 heads of 64, biases": ModelSpec(
        architecture="Qwen2ForCausalLM",
        vocab_size=777,
        hidden_size=448,
        num_hidden_layers=2,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_size=64,
        intermediate_size=640,
        norm_epsilon=1e-6,
        max_position_embeddings=2048,
        rotary_base=1e6,
        attn_bias=True,
    ),
    "qwen3, 8/2 heads of 128, head norms": ModelSpec(
        architecture="Qwen3ForCausalLM",
        vocab_size=2048,
        hidden_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_size=128,
        intermediate_size=1536,
        norm_epsilon=1e-6,
        max_position_embeddings=2048,
        rotary_base=1e6,
        qk_layernorm=True,
    ),
    "qwen3 moe, 4 of 24 experts": _mixture(24, 4),
    "qwen3 moe, all of 6 experts": _mixture(6, 6),
}

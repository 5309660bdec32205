"""The first generation of Qwen (Qwen-7B-Chat), whose config.json and tensors have names of their own.

Its code came with the checkpoints (modeling_qwen.py, configuration_qwen.py). With H the hidden size:
    transformer.wte · transformer.h.{i}.{ln_1, ln_2} · transformer.ln_f · lm_head
    transformer.h.{i}.attn.c_attn [3H, H] with bias: q, k and v one below the other · attn.c_proj [H, H]
    transformer.h.{i}.mlp.c_proj(w1(x) · silu(w2(x))): w2 is the gate; each is half of intermediate_size wide
From seq_length tokens on, queries are multiplied by log_seq_length(position) (`use_logn_attn`) and rotary
frequencies depend on the length of the text (`use_dynamic_ntk`). Up to there neither does anything, so that
is how far edgellm runs these models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from edgellm.checkpoint.config_file import ConfigFile
from edgellm.checkpoint.huggingface_config import NO_ARITHMETIC
from edgellm.checkpoint.place import Place, fused
from edgellm.errors import CheckpointError
from edgellm.model.spec import ModelSpec

ARCHITECTURE: Final = "QWenLMHeadModel"

_READ: Final = frozenset(
    {
        "architectures",
        "eos_token_id",
        "hidden_size",
        "intermediate_size",
        "kv_channels",
        "layer_norm_epsilon",
        "max_position_embeddings",
        "model_type",
        "no_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "quantization_config",
        "rotary_emb_base",
        "rotary_pct",
        "scale_attn_weights",
        "seq_length",
        "tie_word_embeddings",
        "vocab_size",
        # What they do begins at seq_length.
        "use_dynamic_ntk",
        "use_logn_attn",
    }
)
_HOW_TO_RUN: Final = frozenset(
    {
        "attn_dropout_prob",
        "auto_map",
        "bf16",
        "emb_dropout_prob",
        "fp16",
        "fp32",
        "onnx_safe",
        "softmax_in_fp32",
        "use_cache_kernel",
        "use_flash_attn",
    }
)
_LAYER: Final = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.gate_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj",
}


def is_qwen(config: ConfigFile) -> bool:
    """Whether the config is one of these models'."""
    return config.values.get("architectures") == [ARCHITECTURE]


def read_qwen(config: ConfigFile) -> ModelSpec:
    """The model's numbers.

    Raises:
        CheckpointError: a value is missing or makes no sense, or asks for what edgellm does not do.
    """
    config.require_known(_READ | _HOW_TO_RUN | NO_ARITHMETIC)
    for key in ("no_bias", "scale_attn_weights"):
        if not config.boolean(key, True):
            raise config.unsupported(key)
    if config.positive("rotary_pct", 1.0) != 1:
        raise config.unsupported("rotary_pct")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head = config.integer("kv_channels")
    if heads * head != hidden:
        raise CheckpointError(
            f"{config.where}: kv_channels {head} · num_attention_heads {heads} is not hidden_size {hidden}"
        )
    inner = config.integer("intermediate_size")
    if head % 2 or inner % 2:
        key, value = ("kv_channels", head) if head % 2 else ("intermediate_size", inner)
        raise CheckpointError(f"{config.where}: {key} is {value}, an odd number")
    return ModelSpec(
        architecture=ARCHITECTURE,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_size=head,
        intermediate_size=inner // 2,
        norm_epsilon=config.positive("layer_norm_epsilon"),
        max_position_embeddings=config.integer("seq_length"),
        rotary_base=config.positive("rotary_emb_base", 10000.0),
        attn_bias=True,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
    )


def qwen_places(spec: ModelSpec) -> Iterator[tuple[str, Place]]:
    """Canonical names, and where they are, in the order in which a model uses them."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    projections: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkv"}
    biases: dict[str, tuple[int, ...]] = {f"{name}.bias": (hidden,) for name in projections}
    yield "embed_tokens", Place("transformer.wte", (spec.vocab_size, hidden))
    for layer in range(spec.num_hidden_layers):
        here, stored = f"layers.{layer}", f"transformer.h.{layer}"
        for parts, name in ((projections, "attn.c_attn"), (biases, "attn.c_attn.bias")):
            for part in parts:
                yield f"{here}.{part}", fused(f"{stored}.{name}", part, parts)
        for part, name in _LAYER.items():
            yield f"{here}.{part}", Place(f"{stored}.{name}", shapes[part])
    yield "norm", Place("transformer.ln_f", (hidden,))
    if not spec.tie_word_embeddings:
        yield "lm_head", Place("lm_head", (spec.vocab_size, hidden))

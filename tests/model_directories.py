"""Tiny models as Hugging Face directories, written by `safetensors` and `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from ggufs import CONTROL_TOKENS, MERGES, TEMPLATE, tokens
from numpy.typing import NDArray
from tiny_llama import TinyLlama, joined_qkv

Tensors = dict[str, NDArray[Any]]


def stored_name(name: str) -> str:
    """transformers' name of a canonical one, without `.weight`."""
    return name if name == "lm_head" else f"model.{name}"


_QWEN = {
    "embed_tokens": "transformer.wte",
    "norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
}


def stored_weights(tiny: TinyLlama) -> dict[str, NDArray[np.float32]]:
    """The tensors under the names of the family's own code, without `.weight`."""
    weights = tiny.weights()
    if tiny.family != "Qwen":
        return {stored_name(name): values for name, values in weights.items()}
    return {_qwen_name(name): values for name, values in joined_qkv(weights).items()}


def _qwen_name(name: str) -> str:
    if not name.startswith("layers."):
        return _QWEN.get(name, name)
    _, layer, part = name.split(".", 2)
    bias = ".bias" if part.endswith(".bias") else ""
    return f"transformer.h.{layer}.{_QWEN[part.removesuffix('.bias')]}{bias}"


def qwen_config(tiny: TinyLlama) -> dict[str, Any]:
    """A config.json as Qwen-7B-Chat's; its context is TinyLlama's 4096."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": tiny.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * tiny.inner,
        "kv_channels": tiny.head_size,
        "layer_norm_epsilon": tiny.epsilon,
        "max_position_embeddings": 32768,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "onnx_safe": None,
        "rotary_emb_base": int(tiny.rotary_base),
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 4096,
        "tie_word_embeddings": tiny.tied,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": tiny.vocab,
    }


def config_of(tiny: TinyLlama) -> dict[str, Any]:
    """A config.json as transformers writes it."""
    if tiny.family == "Qwen":
        return qwen_config(tiny)
    return {
        "architectures": [f"{tiny.family}ForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.51.0",
        "use_cache": True,
        **tiny.transformers_config(),
    }


def tokenizer_json() -> str:
    """A byte-level BPE tokenizer with the tokens of `ggufs.tokens`."""
    vocabulary = {token: number for number, token in enumerate(tokens())}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(CONTROL_TOKENS)
    text: str = made.to_str()
    return text


Store = Callable[[str, NDArray[np.float32]], Tensors]
"""How a linear layer is stored: (its name, its weight [N, K]) → tensors."""


def write_directory(
    path: Path,
    tiny: TinyLlama,
    *,
    config: Mapping[str, Any] = {},
    tensors: Mapping[str, NDArray[Any] | None] = {},
    files: Mapping[str, Any] = {},
    dtype: Any = np.float32,
    linear: Store | None = None,
) -> Path:
    """Write the model; None removes a config key, a tensor or a file.

    Args:
        config, tensors: changes to them, by their names there.
        files: JSON by file name; strings and bytes are written as they are.
        dtype: of what `linear` does not store.
    """
    path.mkdir(exist_ok=True)
    stored: Tensors = {}
    for name, values in stored_weights(tiny).items():
        if name.endswith(".bias"):
            stored[name] = values.astype(dtype)
        elif linear is not None and name.endswith(("_proj", ".c_attn", ".w1", ".w2")):
            stored |= linear(name, values)
        else:
            stored[f"{name}.weight"] = values.astype(dtype)
    changed = {name: values for name, values in (stored | dict(tensors)).items() if values is not None}
    safetensors.numpy.save_file(changed, path / "model.safetensors", {"format": "pt"})
    settings = {key: value for key, value in (config_of(tiny) | dict(config)).items() if value is not None}
    contents = {
        "config.json": settings,
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>", "special": True},
            "chat_template": TEMPLATE,
        },
        "generation_config.json": {"eos_token_id": [2]},
    }
    for name, content in (contents | dict(files)).items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        elif content is not None:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path

"""Tiny llama models whose random weights are the same everywhere, as GGUF files and for transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TinyLlama:
    """A shape; sizes as in ModelSpec. Attributes that need a word:

    Attributes:
        vocab: as many tokens as `ggufs.tokens` has, so that the file can carry a vocabulary.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    tied: bool
    rotary_base: float
    layers: int = 2
    vocab: int = 265
    epsilon: float = 1e-5
    seed: int = 1

    def weights(self) -> dict[str, Array]:
        """Canonical name → float32, rows in Hugging Face's order. RandomState's stream never changes."""
        chance = np.random.RandomState(self.seed)
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (self.vocab, self.hidden)}
        for i in range(self.layers):
            shapes |= {
                f"layers.{i}.input_layernorm": (self.hidden,),
                f"layers.{i}.self_attn.q_proj": (query, self.hidden),
                f"layers.{i}.self_attn.k_proj": (key, self.hidden),
                f"layers.{i}.self_attn.v_proj": (key, self.hidden),
                f"layers.{i}.self_attn.o_proj": (self.hidden, query),
                f"layers.{i}.post_attention_layernorm": (self.hidden,),
                f"layers.{i}.mlp.gate_proj": (self.inner, self.hidden),
                f"layers.{i}.mlp.up_proj": (self.inner, self.hidden),
                f"layers.{i}.mlp.down_proj": (self.hidden, self.inner),
            }
        shapes["norm"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head"] = (self.vocab, self.hidden)
        made = {}
        for name, shape in shapes.items():
            values = chance.standard_normal(shape)
            # Sizes at which queries attend to something and the residual stream neither dies nor explodes.
            made[name] = (1 + values / 10 if len(shape) == 1 else 2 * values / np.sqrt(shape[1])).astype(
                np.float32
            )
        return made

    def write_gguf(self, path: Path, linear: str = "F32", embedding: str = "F32") -> Path:
        """Write the model as a GGUF file with the `gguf` package; types by their names there."""
        import gguf
        from ggufs import MERGES, token_types, tokens

        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(self.layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_rope_freq_base(self.rotary_base)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens())
        writer.add_token_types(token_types())
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(2)
        for name, values in self.weights().items():
            kind = "F32" if values.ndim == 1 else embedding if name == "embed_tokens" else linear
            dtype = gguf.GGMLQuantizationType[kind]
            stored = gguf.quants.quantize(self._as_gguf(name, values), dtype)
            writer.add_tensor(_gguf_name(name), stored, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def transformers_config(self) -> dict[str, Any]:
        """Arguments of transformers.LlamaConfig."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.rotary_base,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
        }

    def _as_gguf(self, name: str, values: Array) -> Array:
        """Rows of q and k in llama.cpp's order (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.rsplit(".", 1)[-1])
        if heads is None:
            return values
        split = values.reshape(heads, 2, self.head_size // 2, -1)
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def _gguf_name(name: str) -> str:
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if name in top:
        return f"{top[name]}.weight"
    parts = {
        "input_layernorm": "attn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    fields = name.split(".")
    return f"blk.{fields[1]}.{parts[fields[-1]]}.weight"


TINY = {
    "3/1 heads of 64, tied": TinyLlama(96, 3, 1, 64, 128, tied=True, rotary_base=1e4),
    "9/3 heads of 16, untied": TinyLlama(72, 9, 3, 16, 80, tied=False, rotary_base=1e5, seed=2),
}

"""Tiny models, llama and its relatives, whose random weights are the same everywhere: as GGUF files and for
transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf_blocks import random_blocks
from numpy.typing import NDArray

Array = NDArray[np.float32]

ARCHITECTURES = {
    "Llama": "llama",
    "Mistral": "llama",
    "Qwen": "qwen",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3Moe": "qwen3moe",
}
"""transformers' family → GGUF's general.architecture."""


@dataclass(frozen=True)
class TinyLlama:
    """A shape; sizes as in ModelSpec. Attributes that need a word:

    Attributes:
        vocab: as many tokens as `ggufs.tokens` has, so that the file can carry a vocabulary.
        family: Qwen and Qwen2 have biases on q, k and v, Qwen3 norms on query and key heads.
        scaling: transformers' rope_parameters, without theta.
        experts: in each layer but the dense ones, of width `inner`; the dense layers are twice as wide.
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
    family: str = "Llama"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 0
    top_k: int = 0
    normalize: bool = True
    dense_layers: tuple[int, ...] = ()

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
            }
            if self.experts and i not in self.dense_layers:
                shapes[f"layers.{i}.mlp.gate"] = (self.experts, self.hidden)
                for e in range(self.experts):
                    shapes |= self._mlp(f"layers.{i}.mlp.experts.{e}", self.inner)
            else:
                shapes |= self._mlp(f"layers.{i}.mlp", self.dense_inner)
            if self.family in ("Qwen", "Qwen2"):
                shapes |= {
                    f"layers.{i}.self_attn.{p}_proj.bias": (query if p == "q" else key,) for p in "qkv"
                }
            if self.family.startswith("Qwen3"):
                shapes |= {f"layers.{i}.self_attn.{p}_norm": (self.head_size,) for p in "qk"}
        shapes["norm"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head"] = (self.vocab, self.hidden)
        made = {}
        for name, shape in shapes.items():
            values = chance.standard_normal(shape)
            # Sizes at which queries attend to something and the residual stream neither dies nor explodes.
            if name.endswith(".bias"):
                values = values / 2
            elif len(shape) == 1:
                # A norm on heads sets how sharp attention is.
                values = 1 + values / (2 if "self_attn" in name else 10)
            else:
                values = 2 * values / np.sqrt(shape[1])
            made[name] = values.astype(np.float32)
        return made

    @property
    def dense_inner(self) -> int:
        """Width of an MLP that is no expert."""
        return self.inner * (2 if self.experts else 1)

    def _mlp(self, name: str, inner: int) -> dict[str, tuple[int, ...]]:
        shapes = {"gate_proj": (inner, self.hidden), "up_proj": (inner, self.hidden)}
        return {
            f"{name}.{part}": shape for part, shape in (shapes | {"down_proj": (self.hidden, inner)}).items()
        }

    def write_gguf(
        self,
        path: Path,
        linear: str = "F32",
        embedding: str = "F32",
        others: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the model as a GGUF file with the `gguf` package; types by their names there.

        Args:
            others: types of some parts, such as `v_proj`, where files mix them.
        """
        import gguf
        from ggufs import MERGES, token_types, tokens

        architecture = ARCHITECTURES[self.family]
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(self.layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.dense_inner * (2 if self.family == "Qwen" else 1))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_rope_freq_base(self.rotary_base)
        writer.add_rope_dimension_count(self.head_size)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(self.top_k)
            writer.add_expert_feed_forward_length(self.inner)
        self._add_scaling(writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens())
        writer.add_token_types(token_types())
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(2)
        for name, kind, stored in self._stored_in_gguf(linear, embedding, others or {}):
            writer.add_tensor(_gguf_name(name), stored, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def gguf_weights(
        self, linear: str, embedding: str, others: Mapping[str, str] | None = None
    ) -> dict[str, Array]:
        """The weights of that file, as the `gguf` package dequantizes them; canonical, like `weights`."""
        import gguf

        joined = {}
        for name, kind, stored in self._stored_in_gguf(linear, embedding, others or {}):
            values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
            joined[name] = self._as_gguf(name, values.astype(np.float32), back=True)
        return self.parted(joined)

    def _stored_in_gguf(
        self, linear: str, embedding: str, others: Mapping[str, str]
    ) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Name, type and what is stored; joined as the file joins them."""
        import gguf

        for index, (name, values) in enumerate(self._gguf_tensors().items()):
            unquantized = values.ndim == 1 or name.endswith("mlp.gate")
            kind = "F32" if unquantized else embedding if name == "embed_tokens" else linear
            kind = others.get(name.rsplit(".", 1)[-1], kind)
            if kind.endswith("_K"):
                # The package cannot quantize to these; other random values of the same size do as well.
                *rows, columns = values.shape
                shape = int(np.prod(rows)), columns
                stored = random_blocks(kind, shape, 2 / np.sqrt(columns), self.seed + index)
                stored = stored.reshape(*rows, -1)
            else:
                stored = gguf.quants.quantize(self._as_gguf(name, values), gguf.GGMLQuantizationType[kind])
            yield name, kind, stored

    def parted(self, joined: Mapping[str, Array]) -> dict[str, Array]:
        """Canonical weights of tensors that are joined as `joined_qkv` or a GGUF file's experts are."""
        canonical: dict[str, Array] = {}
        for name, values in joined.items():
            if "qkv_proj" in name:
                for part, some in zip("qkv", np.split(values, 3), strict=True):
                    canonical[name.replace("qkv", part)] = some
            elif values.ndim == 3:
                layer, part = name.split(".experts.")
                canonical |= {f"{layer}.experts.{e}.{part}": some for e, some in enumerate(values)}
            else:
                canonical[name] = values
        return canonical

    def _gguf_tensors(self) -> dict[str, Array]:
        return joined_qkv(self.weights()) if self.family == "Qwen" else _stacked_experts(self.weights())

    def transformers_config(self) -> dict[str, Any]:
        """Arguments of transformers' config class of the family."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "rms_norm_eps": self.epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rotary_base, **self.scaling},
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            **self._mixture(),
        }

    def _mixture(self) -> dict[str, Any]:
        if not self.experts:
            return {}
        return {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.inner,
            "norm_topk_prob": self.normalize,
            "mlp_only_layers": list(self.dense_layers),
            "decoder_sparse_step": 1,
        }

    def _as_gguf(self, name: str, values: Array, *, back: bool = False) -> Array:
        """Rows of llama's q and k in llama.cpp's order (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.rsplit(".", 1)[-1])
        if heads is None or ARCHITECTURES[self.family] != "llama":
            return values
        halves = (self.head_size // 2, 2) if back else (2, self.head_size // 2)
        split = values.reshape(heads, *halves, -1)
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))

    def _add_scaling(self, writer: Any) -> None:
        """The keys of linear and YaRN; llama3's factors as a tensor, as convert_hf_to_gguf.py has them."""
        import gguf

        scaling = self.scaling
        match scaling.get("rope_type"):
            case "linear" | "yarn" as kind:
                writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
                writer.add_rope_scaling_factor(scaling["factor"])
                if kind == "yarn":
                    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
            case "llama3":
                low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
                context = scaling["original_max_position_embeddings"]
                factors = []
                for j in range(0, self.head_size, 2):
                    wavelength = 2 * np.pi * self.rotary_base ** (j / self.head_size)
                    if wavelength < context / high:
                        factors.append(1.0)
                    elif wavelength > context / low:
                        factors.append(scaling["factor"])
                    else:
                        smooth = (context / wavelength - low) / (high - low)
                        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
                writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def joined_qkv(weights: Mapping[str, Array]) -> dict[str, Array]:
    """q, k and v of a layer, and their biases, one below the other, as `qkv_proj`."""
    joined: dict[str, list[Array]] = {}
    for name, values in weights.items():
        joined.setdefault(re.sub(r"\b[qkv]_proj", "qkv_proj", name), []).append(values)
    return {name: np.concatenate(parts) for name, parts in joined.items()}


def _stacked_experts(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Each part of all experts of a layer in one array, [E, N, K]."""
    stacked: dict[str, list[Array]] = {}
    for name, values in weights.items():
        layer, experts, rest = name.partition(".experts.")
        stacked.setdefault(f"{layer}.experts.{rest.split('.')[1]}" if experts else name, []).append(values)
    return {name: np.stack(some) if ".experts." in name else some[0] for name, some in stacked.items()}


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
        "gate": "ffn_gate_inp",
        "qkv_proj": "attn_qkv",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    }
    fields = name.split(".")
    kind = "bias" if fields[-1] == "bias" else "weight"
    part = parts[fields[3] if kind == "bias" else fields[-1]]
    return f"blk.{fields[1]}.{part}{'_exps' if 'experts' in fields else ''}.{kind}"


# Of so short an original context that the twelve tokens of the golden files see the difference.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

TINY = {
    "3/1 heads of 64, tied": TinyLlama(96, 3, 1, 64, 128, tied=True, rotary_base=1e4),
    "9/3 heads of 16, untied": TinyLlama(72, 9, 3, 16, 80, tied=False, rotary_base=1e5, seed=2),
    "mistral": TinyLlama(64, 4, 2, 32, 96, tied=False, rotary_base=1e6, seed=4, family="Mistral"),
    "qwen2, 7/1 heads, tied": TinyLlama(
        112, 7, 1, 16, 96, tied=True, rotary_base=1e6, seed=5, family="Qwen2"
    ),
    "qwen2, untied": TinyLlama(64, 4, 4, 16, 80, tied=False, rotary_base=1e6, seed=6, family="Qwen2"),
    # Heads are wider than the residual stream together, as in Qwen3-4B.
    "qwen3, tied": TinyLlama(64, 5, 1, 32, 96, tied=True, rotary_base=1e6, seed=7, family="Qwen3"),
    "qwen3, untied": TinyLlama(96, 4, 2, 64, 80, tied=False, rotary_base=1e6, seed=8, family="Qwen3"),
    "llama3 scaling": TinyLlama(64, 4, 2, 32, 96, tied=True, rotary_base=5e5, seed=9, scaling=LLAMA3),
    "linear scaling": TinyLlama(64, 4, 2, 32, 96, tied=True, rotary_base=1e4, seed=10, scaling=LINEAR),
    "yarn scaling": TinyLlama(64, 4, 2, 32, 96, tied=True, rotary_base=1e4, seed=11, scaling=YARN),
    "qwen3, yarn": TinyLlama(
        64, 2, 1, 64, 96, tied=True, rotary_base=1e6, seed=12, family="Qwen3", scaling=YARN
    ),
    "qwen": TinyLlama(96, 3, 3, 32, 80, tied=False, rotary_base=1e4, seed=16, family="Qwen"),
    "qwen3moe, tied": TinyLlama(
        64, 5, 1, 32, 48, tied=True, rotary_base=1e6, seed=13, family="Qwen3Moe", experts=6, top_k=2
    ),
    "qwen3moe, 3 of 12, untied": TinyLlama(
        72, 6, 2, 16, 40, tied=False, rotary_base=1e6, seed=14, family="Qwen3Moe", experts=12, top_k=3
    ),
    "qwen3moe, not normalized, one dense layer": TinyLlama(
        64,
        4,
        2,
        32,
        48,
        tied=False,
        rotary_base=1e6,
        layers=3,
        seed=15,
        family="Qwen3Moe",
        experts=7,
        top_k=3,
        normalize=False,
        dense_layers=(1,),
    ),
}

TINY_GGUF = {name: tiny for name, tiny in TINY.items() if tiny.normalize and not tiny.dense_layers}
"""Those that a GGUF file can hold: llama.cpp has no other mixtures."""

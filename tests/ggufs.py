"""Tiny llama GGUF files, written by the `gguf` package: an independent implementation of the format."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96
HEAD = HIDDEN // HEADS
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w"]
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def gguf_reader(path: Path) -> gguf.GGUFReader:
    """A file that does not change, as the `gguf` package reads it; seconds for a real vocabulary."""
    return gguf.GGUFReader(path)


def alphabet() -> list[str]:
    """GPT-2's 256 characters, as `tokenizers` has them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def tokens() -> list[str]:
    """Control tokens, the alphabet, and what the merges make."""
    return [*CONTROL_TOKENS, *alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def token_types() -> list[int]:
    """gguf's TokenType of each of `tokens()`."""
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    return [control if token in CONTROL_TOKENS else normal for token in tokens()]


def shapes() -> dict[str, tuple[int, ...]]:
    """GGUF tensor name → shape, slowest dimension first."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens()), HIDDEN)}
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
        }
    return found | {"output_norm.weight": (HIDDEN,)}


@dataclass
class Llama:
    """What to write; `keys` override or, with None, remove what is written by default.

    Attributes:
        linear: type of the linear layers; the embedding is Q8_0, norms are F32.
        extra: further tensors, or other shapes.
        without: tensors to leave out.
    """

    linear: Type = Type.Q4_1
    keys: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    architecture: str = "llama"
    big_endian: bool = False
    alignment: int | None = None

    def write(self, path: Path) -> dict[str, NDArray[np.float32]]:
        """Write the file; gives each tensor as `gguf` dequantizes it, in the file's order of rows."""
        endian = gguf.GGUFEndian.BIG if self.big_endian else gguf.GGUFEndian.LITTLE
        writer = gguf.GGUFWriter(path, self.architecture, endianess=endian)
        if self.alignment is not None:
            writer.add_custom_alignment(self.alignment)
        for key, value in {**_keys(self.architecture), **self.keys}.items():
            if value is not None:
                _add(writer, key, value)
        chance = np.random.default_rng(7)
        expected = {}
        for name, shape in {**shapes(), **self.extra}.items():
            if name in self.without:
                continue
            values = chance.normal(0, 0.5, shape).astype(np.float32)
            kind = self._type(name)
            raw = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
            expected[name] = gguf.quants.dequantize(raw, kind).reshape(shape).astype(np.float32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return expected

    def _type(self, name: str) -> Type:
        if "norm" in name or name.endswith(".bias") or name == "rope_freqs.weight":
            return Type.F32
        return Type.Q8_0 if name == "token_embd.weight" else self.linear


def _keys(architecture: str) -> dict[str, Any]:
    sizes = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD,
    }
    return {f"{architecture}.{name}": value for name, value in sizes.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": token_types(),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

"""A llama-family decoder in float64 numpy, straight from the formulas: slow, cacheless, easy to check.

Only the scaled rotary frequencies are edgellm's own; `tests/model/test_rotary.py` checks those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm.model.rotary import Rotary, make_rotary
from edgellm.model.spec import ModelSpec

Array = NDArray[np.float64]


class Tensors(Protocol):
    """What the decoder needs of a checkpoint."""

    @property
    def spec(self) -> ModelSpec: ...
    def has(self, name: str) -> bool: ...
    def tensor(self, name: str) -> Dequantized: ...


class Dequantized(Protocol):
    """A weight."""

    def dequantize(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Given:
    """Weights of another origin than edgellm's readers."""

    spec: ModelSpec
    weights: Mapping[str, NDArray[np.float32]]

    def has(self, name: str) -> bool:
        return name in self.weights

    def tensor(self, name: str) -> Dequantized:
        return _Values(self.weights[name])


@dataclass(frozen=True)
class _Values:
    values: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        return self.values


def reference_logits(checkpoint: Tensors, tokens: Sequence[int]) -> Array:
    """Logits float64 [T, vocab] of every position, from dequantized weights."""
    spec = checkpoint.spec

    def tensor(name: str) -> Array:
        return checkpoint.tensor(name).dequantize().astype(np.float64)

    def linear(x: Array, name: str) -> Array:
        y: Array = x @ tensor(name).T
        return y + tensor(f"{name}.bias") if checkpoint.has(f"{name}.bias") else y

    def norm(x: Array, name: str) -> Array:
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        scaled: Array = x / np.sqrt(mean_square + spec.norm_epsilon) * tensor(name)
        return scaled

    def mlp(h: Array, name: str) -> Array:
        gate = linear(h, f"{name}.gate_proj")
        return linear(gate / (1 + np.exp(-gate)) * linear(h, f"{name}.up_proj"), f"{name}.down_proj")

    def mixture(h: Array, name: str) -> Array:
        assert spec.moe is not None
        scores = np.exp(linear(h, f"{name}.gate"))
        out = np.zeros_like(h)
        for token, row in enumerate(scores / scores.sum(axis=-1, keepdims=True)):
            chosen = np.argsort(-row)[: spec.moe.top_k]
            total = row[chosen].sum() if spec.moe.normalization_mode else 1
            for e in chosen:
                out[token] += row[e] / total * mlp(h[token], f"{name}.experts.{e}")
        return out

    size = spec.head_size
    rotary = Rotary(spec.rotary_base ** (-2 * np.arange(size // 2) / size))
    if spec.rotary_scaling is not None:
        rotary = make_rotary(size, spec.rotary_base, spec.rotary_scaling)

    x = tensor("embed_tokens")[list(tokens)]
    for i in range(spec.num_hidden_layers):
        h = norm(x, f"layers.{i}.input_layernorm")
        q, k, v = (
            linear(h, f"layers.{i}.self_attn.{part}_proj").reshape(len(tokens), -1, spec.head_size)
            for part in "qkv"
        )
        if checkpoint.has(f"layers.{i}.self_attn.q_norm"):
            q, k = norm(q, f"layers.{i}.self_attn.q_norm"), norm(k, f"layers.{i}.self_attn.k_norm")
        heads = _attention(_rotated(q, rotary), _rotated(k, rotary), v)
        x = x + linear(heads, f"layers.{i}.self_attn.o_proj")

        h = norm(x, f"layers.{i}.post_attention_layernorm")
        x = x + (mixture if checkpoint.has(f"layers.{i}.mlp.gate") else mlp)(h, f"layers.{i}.mlp")
    x = norm(x, "norm")
    return linear(x, "lm_head" if checkpoint.has("lm_head") else "embed_tokens")


def _rotated(x: Array, rotary: Rotary) -> Array:
    """[T, heads, d]: at position p, elements j and j + d/2 turn by p times the frequency of j."""
    size = x.shape[-1]
    turned = np.empty_like(x)
    for position in range(len(x)):
        for j in range(size // 2):
            angle = position * rotary.frequencies[j]
            a, b = x[position, :, j], x[position, :, j + size // 2]
            turned[position, :, j] = a * np.cos(angle) - b * np.sin(angle)
            turned[position, :, j + size // 2] = a * np.sin(angle) + b * np.cos(angle)
    return turned * rotary.length


def _attention(q: Array, k: Array, v: Array) -> Array:
    """q [T, H, d], k and v [T, G, d]; query head h uses key head h // (H / G) → [T, H·d]."""
    count, heads, size = q.shape
    out = np.empty_like(q)
    for head in range(heads):
        shared = head // (heads // k.shape[1])
        scores = q[:, head] @ k[:, shared].T / np.sqrt(size)
        scores[np.triu_indices(count, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, shared]
    return out.reshape(count, -1)

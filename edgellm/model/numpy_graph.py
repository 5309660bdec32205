"""The network computed as it is written, in float32 numpy: what calibration and comparisons run.

Values are arrays with a row for each token of all sequences, which are equally long: [B · S, width]. Weights
are read by blocks of rows and forgotten, so memory holds one layer's activations and one block, however large
the model is. It is no executor: there are no caches, and every call begins at position 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.executor.base import Progress
from edgellm.model.decoder import Attention, Expert
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Float, Weight

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Logits:
    """The last layer's output and the head, not multiplied yet: all logits at once could be gigabytes.

    Attributes:
        x: float32 [B · S, hidden].
        head: [vocab, hidden].
    """

    x: Float
    head: Weight

    def blocks(self) -> Iterator[Float]:
        """The logits of some words after the others: float32 [B · S, words]."""
        for begin, end in self.head.blocks():
            yield self.x @ self.head.dequantize(begin, end).T

    def all(self) -> Float:
        """Every logit, float32 [B · S, vocab]."""
        return np.concatenate(list(self.blocks()), axis=1)


class NumpyGraph:
    """The decoder's `Graph` over arrays.

    Args:
        tokens: int32 [B, S].
        progress: told after each layer.
    """

    def __init__(
        self, spec: ModelSpec, tokens: Tokens, progress: Progress = lambda _name, _fraction: None
    ) -> None:
        self._spec = spec
        self._tokens = tokens
        self._progress = progress
        self.logits_of: Logits | None = None

    def embed(self, weight: Weight) -> Float:
        ids = self._tokens.reshape(-1)
        x = np.empty((len(ids), weight.shape[1]), np.float32)
        for begin, end in weight.blocks():
            here = np.flatnonzero((ids >= begin) & (ids < end))
            if len(here):
                x[here] = weight.dequantize(begin, end)[ids[here] - begin]
        return x

    def norm(self, x: Float, gain: Weight, epsilon: float) -> Float:
        return _normed(x, gain.dequantize(), epsilon)

    def qkv(self, x: Float, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> Float:
        return np.concatenate(
            [product(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], axis=1
        )

    def attention(self, qkv: Float, attention: Attention) -> Float:
        spec, (batch, length) = self._spec, self._tokens.shape
        size, heads, shared = spec.head_size, spec.num_attention_heads, spec.num_key_value_heads
        split = qkv.reshape(batch, length, -1, size)
        cos, sin = (table.astype(np.float32) for table in attention.rotary.tables(length))
        q = _normed_heads(split[:, :, :heads], attention.q_norm, spec.norm_epsilon)
        k = _normed_heads(split[:, :, heads : heads + shared], attention.k_norm, spec.norm_epsilon)
        q, k, v = _rotated(q, cos, sin), _rotated(k, cos, sin), split[:, :, heads + shared :]
        later = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        out = np.empty((batch, length, heads, size), np.float32)
        for sequence in range(batch):
            for head in range(heads):
                of_key = head // spec.queries_per_key
                scores = q[sequence, :, head] @ k[sequence, :, of_key].T * np.float32(attention.scale)
                scores += later
                scores -= scores.max(axis=1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=1, keepdims=True)
                out[sequence, :, head] = scores @ v[sequence, :, of_key]
        self._progress("layers", (attention.layer + 1) / spec.num_hidden_layers)
        return out.reshape(batch * length, heads * size)

    def linear(self, x: Float, weight: Weight, bias: Weight | None, residual: Float) -> Float:
        return product(x, weight, bias) + residual

    def swiglu(self, x: Float, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> Float:
        y: Float = _silu(product(x, gate, biases[0])) * product(x, up, biases[1])
        return y

    def moe(
        self,
        x: Float,
        router: Weight,
        experts: Sequence[Expert],
        top_k: int,
        *,
        normalize: bool,
        residual: Float,
    ) -> Float:
        chosen, shares = _routed(product(x, router), top_k, normalize=normalize)
        y: Float = residual.copy()
        for number, expert in enumerate(experts):
            tokens, places = np.nonzero(chosen == number)
            if len(tokens):
                y[tokens] += shares[tokens, places][:, None] * self.expert(x[tokens], expert)
        return y

    def expert(self, x: Float, expert: Expert) -> Float:
        """What one expert gives for the tokens that chose it."""
        return product(self.swiglu(x, expert.gate, expert.up, (None, None)), expert.down)

    def rows(self, x: Float) -> Float:
        return x

    def logits(self, x: Float, weight: Weight) -> Float:
        self.logits_of = Logits(x, weight)
        return x


def product(x: Float, weight: Weight, bias: Weight | None = None) -> Float:
    """x · weightᵀ + bias, float32 [rows, N]."""
    y = np.empty((len(x), weight.shape[0]), np.float32)
    for begin, end in weight.blocks():
        np.matmul(x, weight.dequantize(begin, end).T, out=y[:, begin:end])
    if bias is not None:
        y += bias.dequantize()
    return y


def _routed(scores: Float, top_k: int, *, normalize: bool) -> tuple[NDArray[np.int64], Float]:
    """The experts that each token chose, most likely first, and their shares: [tokens, top_k] each."""
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    chosen = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
    shares = np.take_along_axis(shares, chosen, axis=1)
    if normalize:
        shares /= shares.sum(axis=1, keepdims=True)
    return chosen, shares


def _normed(x: Float, gain: Float, epsilon: float) -> Float:
    mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    y: Float = x / np.sqrt(mean + np.float32(epsilon)) * gain
    return y


def _normed_heads(x: Float, gain: Weight | None, epsilon: float) -> Float:
    return x if gain is None else _normed(x, gain.dequantize(), epsilon)


def _silu(x: Float) -> Float:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, the quotient then rightly 0
        y: Float = x / (1 + np.exp(-x))
    return y


def _rotated(x: Float, cos: Float, sin: Float) -> Float:
    """[B, S, heads, d]: element j pairs with j + d / 2."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

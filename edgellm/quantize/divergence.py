"""How far a quantized model's predictions are from the unquantized one's, on a text."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.base import Checkpoint
from edgellm.executor.base import Progress
from edgellm.model.decoder import build_decoder
from edgellm.model.numpy_graph import Logits, NumpyGraph, Tokens

_Numbers = NDArray[np.float64]


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Of the next token's distribution, over the positions of a text; p unquantized, q quantized.

    Attributes:
        tokens: positions compared.
        kl: mean of KL(p ‖ q), in nats.
        largest_kl: of a position.
        agreement: part of the positions whose most likely token is the same.
        perplexity: of the quantized model on the text.
        unquantized_perplexity: of the other.
    """

    tokens: int
    kl: float
    largest_kl: float
    agreement: float
    perplexity: float
    unquantized_perplexity: float


def measure_divergence(
    reference: Checkpoint,
    other: Checkpoint,
    tokens: Tokens,
    progress: Progress = lambda _name, _fraction: None,
) -> Divergence:
    """Run both networks in float32, so that they differ in their weights alone.

    Args:
        tokens: int32 [B, S], S at least 2.

    Raises:
        BuildError: the architecture is none that edgellm builds.
        CheckpointError: a tensor is missing or damaged.
    """
    logits = []
    for part, checkpoint in enumerate((reference, other)):
        graph = NumpyGraph(
            checkpoint.spec,
            tokens,
            lambda _name, done, before=part: progress("divergence", (before + done) / 2),  # type: ignore[misc]
        )
        build_decoder(graph, checkpoint)
        assert graph.logits_of is not None
        logits.append(graph.logits_of)
    p, q = logits
    return _compare(p, q, tokens)


def _compare(p: Logits, q: Logits, tokens: Tokens) -> Divergence:
    # What follows each position; nothing follows the last of a sequence.
    targets = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], -1)], axis=1).reshape(-1)
    p_sum, q_sum = _Sum(targets), _Sum(targets)
    excess = np.zeros(len(targets))  # Σ exp(p − top) · (p − q)
    for begin, end in p.head.blocks():
        p_block, q_block = (
            (side.x @ side.head.dequantize(begin, end).T).astype(np.float64) for side in (p, q)
        )
        shrink, raised = p_sum.add(p_block, begin)
        q_sum.add(q_block, begin)
        excess = excess * shrink + np.einsum("tv,tv->t", raised, p_block - q_block)
    kl = np.maximum(excess / p_sum.total - p_sum.log() + q_sum.log(), 0)
    return Divergence(
        tokens=len(targets),
        kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        agreement=float((p_sum.best == q_sum.best).mean()),
        perplexity=q_sum.perplexity(),
        unquantized_perplexity=p_sum.perplexity(),
    )


class _Sum:
    """Σ exp(logits) of each position, over blocks of words: exp(top) · total; and which logit was the top."""

    def __init__(self, targets: Tokens) -> None:
        self._targets = targets
        self._target_logits = np.zeros(len(targets))
        self._top = np.full(len(targets), -np.inf)
        self.total: _Numbers = np.zeros(len(targets))
        self.best = np.zeros(len(targets), np.int64)

    def add(self, block: _Numbers, begin: int) -> tuple[_Numbers, _Numbers]:
        """Add the logits [T, words] of words from `begin` on; gives by how much earlier terms shrink, since
        the top is higher now, and exp(block − top)."""
        best = block.argmax(axis=1)
        most = np.take_along_axis(block, best[:, None], axis=1)[:, 0]
        self.best = np.where(most > self._top, best + begin, self.best)
        top = np.maximum(self._top, most)
        shrink = np.exp(self._top - top)
        raised = np.exp(block - top[:, None])
        self.total = self.total * shrink + raised.sum(axis=1)
        self._top = top
        here = np.flatnonzero((self._targets >= begin) & (self._targets < begin + block.shape[1]))
        self._target_logits[here] = block[here, self._targets[here] - begin]
        return shrink, raised

    def log(self) -> _Numbers:
        """log Σ exp(logits)."""
        return self._top + np.log(self.total)

    def perplexity(self) -> float:
        """exp of the mean surprise at what follows."""
        known = self._targets >= 0
        return float(np.exp((self.log() - self._target_logits)[known].mean()))

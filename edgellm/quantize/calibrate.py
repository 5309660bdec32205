"""Activation-aware quantization: what matters to the outputs is quantized with less error.

AWQ (Lin et al. 2023): columns of a weight that meet large activations matter more. Multiplied by s > 1 they
are rounded more finely for their size, and what makes the activations is divided by s, so that the float
network does not change:
    norm → q, k, v        s goes out of the norm's gain
    norm → gate, up       likewise, and the router and every expert with them
    v → o                 s goes out of the rows (and bias) of v; query heads that share a v share s
    up → down             s goes out of the rows (and bias) of up; each expert has its own
s is the activations' mean magnitude to a power: each of POWERS is tried, 0 among them, and that with the
least error of the outputs is taken, on a sample of rows and of tokens. Within groups, too, errors of columns
are weighted by their activations' mean square (`groups.py`).

The network runs once, unquantized and layer by layer; only vectors are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgellm.checkpoint.base import Checkpoint
from edgellm.executor.base import Progress
from edgellm.model.decoder import Attention, Expert, build_decoder
from edgellm.model.numpy_graph import NumpyGraph, Tokens, product
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Float, Grouped, Weight
from edgellm.quantize.checkpoint import Adjustments
from edgellm.quantize.groups import quantize
from edgellm.quantize.named import Named
from edgellm.quantize.recipe import BITS, Recipe

POWERS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WIDEST: Final = 64.0
"""s lies between 1 / WIDEST and WIDEST, so that no float16 activation can overflow or vanish by it."""
SAMPLE_ROWS: Final = 256
SAMPLE_TOKENS: Final = 512
FEWEST_TOKENS: Final = 32
"""An expert that fewer tokens went through keeps its scales: so few say nothing about it."""
_SPAN: Final = 16
"""Rows of a sample that are neighbours."""


def calibrate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: Tokens,
    progress: Progress = lambda _name, _fraction: None,
) -> Adjustments:
    """Find what to adjust before quantizing.

    Args:
        tokens: int32 [B, S], text of the kind that the model will meet.

    Raises:
        BuildError: the architecture is none that edgellm builds.
        CheckpointError: a tensor is missing or damaged.
    """
    graph = _Calibration(checkpoint.spec, recipe, tokens, progress)
    build_decoder(graph, Named(checkpoint))
    return graph.found


class _Calibration(NumpyGraph):
    """The network, which looks at what each linear is given before it computes it."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, tokens: Tokens, progress: Progress) -> None:
        super().__init__(spec, tokens, progress)
        self._recipe = recipe
        self._source: _Source | None = None
        self._value: Weight | None = None
        self.found = Adjustments({}, {}, {})

    def norm(self, x: Float, gain: Weight, epsilon: float) -> Float:
        y = super().norm(x, gain, epsilon)
        self._source = _Source(y, gain.name)
        return y

    def qkv(self, x: Float, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> Float:
        self._look(x, weights)
        self._value = weights[2]
        return super().qkv(x, weights, biases)

    def attention(self, qkv: Float, attention: Attention) -> Float:
        y = super().attention(qkv, attention)
        assert self._value is not None
        self._source = _Source(y, self._value.name, self._spec.head_size, self._spec.queries_per_key)
        return y

    def linear(self, x: Float, weight: Weight, bias: Weight | None, residual: Float) -> Float:
        self._look(x, [weight])
        return super().linear(x, weight, bias, residual)

    def swiglu(self, x: Float, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> Float:
        self._look(x, [gate, up])
        y = super().swiglu(x, gate, up, biases)
        self._source = _Source(y, up.name)
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
        gates, ups = [expert.gate for expert in experts], [expert.up for expert in experts]
        self._look(x, [*gates, *ups], [router])
        return super().moe(x, router, experts, top_k, normalize=normalize, residual=residual)

    def expert(self, x: Float, expert: Expert) -> Float:
        h = super().swiglu(x, expert.gate, expert.up, (None, None))
        if len(h) >= FEWEST_TOKENS:
            self._source = _Source(h, expert.up.name)
            self._look(h, [expert.down])
        return product(h, expert.down)

    def logits(self, x: Float, weight: Weight) -> Float:
        if weight.name == "lm_head":  # a tied one is an embedding, too, to which no activation comes
            self.found.importance[weight.name] = _mean_square(x)
        return super().logits(x, weight)

    def _look(self, x: Float, weights: Sequence[Weight], unquantized: Sequence[Weight] = ()) -> None:
        """Find the scales of columns that weights with one input share, and how much each column matters."""
        source, self._source = self._source, None
        assert source is not None
        assert source.y is x
        square, found = _mean_square(x), self.found
        factors = self._best_factors(x, square, weights, source)
        if factors is not None:
            columns = source.widened(factors)
            square = square / columns**2
            found.columns.update((weight.name, columns) for weight in (*weights, *unquantized))
            found.rows[source.name] = found.rows[f"{source.name}.bias"] = factors
        found.importance.update((weight.name, square) for weight in weights)

    def _best_factors(
        self, x: Float, square: Float, weights: Sequence[Weight], source: _Source
    ) -> Float | None:
        """s for each row of the source; None: as they are."""
        rows = _sample_rows(weights)
        tokens = x[:: max(1, len(x) // SAMPLE_TOKENS)]
        magnitude = source.narrowed(np.abs(x).mean(axis=0))
        best, least = None, np.inf
        for power in POWERS:
            factors = _factors(magnitude, power)
            columns = source.widened(factors)
            made = self._quantized(rows * columns, square / columns**2)
            difference = tokens @ (made / columns - rows).T
            error = float(np.vdot(difference, difference))
            if error < least:
                best, least = factors if power else None, error
        return best

    def _quantized(self, rows: Float, importance: Float) -> Float:
        """What quantizing makes of some rows."""
        bits = BITS[self._recipe.linear]
        assert bits is not None
        groups = quantize(rows, bits=bits, group=self._recipe.group, importance=importance).groups
        made = Grouped("", (len(rows), rows.shape[1]), bits, self._recipe.group, True, lambda _b, _e: groups)
        return made.dequantize()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a linear's input comes from: each of its columns is in proportion to a row of some tensor.

    Attributes:
        y: the input, [tokens, K].
        name: the tensor's, [N].
        size, sharers: columns are in heads of this size, and so many heads in a row come from the same rows.
    """

    y: Float
    name: str
    size: int = 1
    sharers: int = 1

    def narrowed(self, of_columns: Float) -> Float:
        """The mean of what belongs to the columns of a row: [K] → [N]."""
        of_rows: Float = of_columns.reshape(-1, self.sharers, self.size).mean(axis=1).reshape(-1)
        return of_rows

    def widened(self, of_rows: Float) -> Float:
        """What belongs to a row for each of its columns: [N] → [K]."""
        repeated: Float = np.repeat(of_rows.reshape(-1, 1, self.size), self.sharers, axis=1)
        return repeated.reshape(-1)


def _factors(magnitude: Float, power: float) -> Float:
    """magnitude^power, about 1."""
    raised = np.maximum(magnitude, 1e-4) ** np.float32(power)
    factors: Float = np.clip(raised / np.sqrt(raised.max() * raised.min()), 1 / WIDEST, WIDEST)
    return factors


def _mean_square(x: Float) -> Float:
    square: Float = np.einsum("tk,tk->k", x, x) / np.float32(len(x))
    return square


def _sample_rows(weights: Sequence[Weight]) -> Float:
    """About SAMPLE_ROWS rows of the weights together, in spans all over them."""
    weights = weights[:: -(-len(weights) * _SPAN // SAMPLE_ROWS)]
    share = SAMPLE_ROWS // len(weights)
    parts = []
    for weight in weights:
        rows = weight.shape[0]
        spans = max(1, min(share, rows) // _SPAN)
        begins = np.linspace(0, max(0, rows - _SPAN), spans).astype(int).tolist()
        parts += [weight.dequantize(begin, min(begin + _SPAN, rows)) for begin in begins]
    return np.concatenate(parts)

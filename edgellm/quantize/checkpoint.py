"""A checkpoint that quantizes as it is read: to whoever builds it, one like any other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from edgellm.checkpoint.base import Checkpoint
from edgellm.errors import CheckpointError
from edgellm.model.quantization import Quantization
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight
from edgellm.quantize.groups import LARGEST, Bits, quantize
from edgellm.quantize.recipe import Recipe, matrices_of
from edgellm.quantize.wrapped import WrappedCheckpoint

_BLOCK: Final = 1 << 22
"""Numbers that are quantized at a time."""


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What calibration found, by canonical name; for tensors that are not named there is nothing to do.

    A tensor w [N, K] becomes w · columns / rows, and is quantized with column errors weighted by importance.
    In the network these cancel: what divides the rows of one tensor multiplies the columns of the next.

    Attributes:
        columns: float32 [K].
        rows: float32 [N]; also of norms and biases.
        importance: float32 [K], of the adjusted columns.
    """

    columns: dict[str, Float] = field(default_factory=dict)
    rows: dict[str, Float] = field(default_factory=dict)
    importance: dict[str, Float] = field(default_factory=dict)

    def apply(self, name: str, weight: Dense) -> Dense:
        """The adjusted tensor, as float32; itself if there is nothing to do."""
        columns, rows = self.columns.get(name), self.rows.get(name)
        if columns is None and rows is None:
            return weight

        def read_rows(begin: int, end: int) -> Float:
            values = weight.read(begin, end)
            if columns is not None:
                values = values * columns
            if rows is not None:
                here = rows[begin:end]
                values = values / (here if values.ndim == 1 else here[:, None])
            return values

        return Dense(weight.name, weight.shape, "f32", read_rows)


@dataclass(slots=True)
class WeightError:
    """What quantizing one matrix cost.

    Attributes:
        name: canonical.
        bits, group: how it is stored.
        rows, columns: its shape.
        error: Σ (w − ŵ)² of the rows that were read.
        energy: Σ w² of them.
        seen: how many these are.
    """

    name: str
    bits: Bits
    group: int
    rows: int
    columns: int
    error: float = 0.0
    energy: float = 0.0
    seen: int = 0

    @property
    def relative(self) -> float:
        """Root of Σ (w − ŵ)² / Σ w²; 0 for a matrix of zeros."""
        return float(np.sqrt(self.error / self.energy)) if self.energy else 0.0

    def note(self, begin: int, end: int, error: float, energy: float) -> None:
        """Count rows begin … end − 1 if they come next; beginning again before the end counts anew."""
        if begin == 0 and self.seen < self.rows:
            self.error = self.energy = 0.0
            self.seen = 0
        if begin == self.seen:
            self.error, self.energy, self.seen = self.error + error, self.energy + energy, end


class QuantizedCheckpoint(WrappedCheckpoint):
    """Another checkpoint's weights, quantized when they are read; see `Checkpoint`.

    Raises:
        BuildError: the architecture is none that edgellm builds.
        CheckpointError: a tensor is missing or quantized already; by `read()`, when it is damaged or has
            numbers beyond float16.
        UsageError: the recipe's group does not divide a row.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        *,
        threads: int | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self._recipe = recipe
        self._names = matrices_of(checkpoint, recipe)
        self._adjustments: Adjustments | None = None
        self._threads = threads or len(os.sched_getaffinity(0))
        self._errors: dict[str, WeightError] = {}

    @property
    def quantization(self) -> Quantization:
        """What the recipe makes of the linear layers."""
        return self._recipe.quantization(self._names, calibrated=self._adjustments is not None)

    def adjust(self, adjustments: Adjustments) -> None:
        """Quantize by what calibration found; before any tensor is asked for."""
        self._adjustments = adjustments

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name: quantized if the recipe says so, adjusted in any case."""
        weight = super().tensor(name)
        if not isinstance(weight, Dense):
            return weight
        if self._adjustments is not None:
            weight = self._adjustments.apply(name, weight)
        bits = self._recipe.bits(name) if len(weight.shape) == 2 else None
        return weight if bits is None else self._quantized(name, weight, bits)

    def errors(self) -> Iterator[WeightError]:
        """Of the matrices that were read whole, in the order of their use."""
        for name in self._names:
            found = self._errors.get(name)
            if found is not None and found.seen == found.rows:
                yield found

    def _quantized(self, name: str, weight: Dense, bits: Bits) -> Grouped:
        rows, columns = weight.shape
        group = self._recipe.group
        importance = None if self._adjustments is None else self._adjustments.importance.get(name)
        record = self._errors.setdefault(name, WeightError(name, bits, group, rows, columns))
        step = max(1, _BLOCK // columns)

        def read_rows(begin: int, end: int) -> Groups:
            q = np.empty((end - begin, columns), np.uint8 if bits == 4 else np.int8)
            scale = np.empty((end - begin, columns // group), np.float32)
            offset = np.empty_like(scale) if bits == 4 else None
            for first in range(begin, end, step):
                last = min(first + step, end)
                made = quantize(
                    _within_float16(weight, first, last),
                    bits=bits,
                    group=group,
                    importance=importance,
                    threads=self._threads,
                )
                here = slice(first - begin, last - begin)
                q[here], scale[here] = made.groups.q, made.groups.scale
                if offset is not None:
                    assert made.groups.offset is not None
                    offset[here] = made.groups.offset
                record.note(first, last, float(made.error.sum()), float(made.energy.sum()))
            return Groups(q, scale, offset)

        return Grouped(weight.name, (rows, columns), bits, group, asymmetric=bits == 4, read_rows=read_rows)


def _within_float16(weight: Dense, begin: int, end: int) -> Float:
    values = weight.read(begin, end)
    if values.size and max(values.max(), -values.min()) > LARGEST:
        raise CheckpointError(
            f"{weight.name} has numbers beyond ±{LARGEST:.0f}, which the float16 scales of quantized weights "
            "cannot reach; use --quant none"
        )
    return values

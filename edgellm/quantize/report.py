"""What quantizing cost: quantization.json of an engine."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from edgellm.quantize.checkpoint import WeightError
from edgellm.quantize.divergence import Divergence
from edgellm.quantize.recipe import Recipe

_LAYER: Final = re.compile(r"layers\.(\d+)\.")


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """One quantized matrix.

    Attributes:
        name: canonical.
        bits, rows, columns: how it is stored, and its shape.
        error: relative root mean square, sqrt(Σ (w − ŵ)² / Σ w²), of the matrix as it is stored: of a
            calibrated one, after its columns were scaled.
        energy: Σ w², by which errors of several are weighed.
    """

    name: str
    bits: int
    rows: int
    columns: int
    error: float
    energy: float


class QuantizationReport(msgspec.Struct, frozen=True, kw_only=True):
    """quantization.json.

    Attributes:
        linear, ends, group_size: the recipe.
        calibration_tokens: how many the scales were found with; 0: none.
        error: relative root mean square over all quantized matrices.
        layers: that of each layer.
        matrices: that of each matrix.
        divergence: from the unquantized model, or None if there was no text.
    """

    linear: str
    ends: str
    group_size: int
    calibration_tokens: int
    error: float
    layers: tuple[float, ...]
    matrices: tuple[Matrix, ...]
    divergence: Divergence | None


def make_report(
    recipe: Recipe,
    errors: Iterable[WeightError],
    *,
    calibration_tokens: int,
    divergence: Divergence | None,
) -> QuantizationReport:
    """Add up what was found."""
    matrices = tuple(
        Matrix(
            name=one.name,
            bits=one.bits,
            rows=one.rows,
            columns=one.columns,
            error=one.relative,
            energy=one.energy,
        )
        for one in errors
    )
    by_layer: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        layer, _ = place_of(matrix.name)
        if layer is not None:
            by_layer.setdefault(layer, []).append(matrix)
    return QuantizationReport(
        linear=recipe.linear,
        ends=recipe.ends,
        group_size=recipe.group,
        calibration_tokens=calibration_tokens,
        error=relative_error(matrices),
        layers=tuple(relative_error(by_layer[layer]) for layer in sorted(by_layer)),
        matrices=matrices,
        divergence=divergence,
    )


def place_of(name: str) -> tuple[int | None, str]:
    """The layer of a canonical name, and what it is there: `layers.3.mlp.experts.7.up_proj` → 3, `up`."""
    found = _LAYER.match(name)
    return (int(found[1]) if found else None), name.rsplit(".", 1)[-1].removesuffix("_proj")


def relative_error(matrices: Sequence[Matrix]) -> float:
    """sqrt(Σ (w − ŵ)² / Σ w²) over all of them; 0 of nothing."""
    energy = sum(one.energy for one in matrices)
    return math.sqrt(sum(one.error**2 * one.energy for one in matrices) / energy) if energy else 0.0

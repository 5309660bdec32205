"""From float32 to groups of 4 or 8 bits with the least error: pure numbers, no model.

    4 bits  w ≈ scale · q + offset, q = 0…15      8 bits  w ≈ scale · q, q = −127…127

Scale and offset are float16 numbers, so that every executor has them exactly. The error of a group is
Σ_k h[k] · (w[k] − ŵ[k])², where h is how much a column matters (1 without calibration).

The search: for a fixed q the best scale and offset are a straight line through the points (q, w), which sums
over the group give. So q is made from the group's range shrunk by several factors, each with its line; from
the best of them q and the line improve each other a few times (Lloyd 1982); then scale and offset are rounded
to float16 and q is made for good. Where the plain range, as rounding to nearest has it, comes out better, it
is taken: no group is worse than that.

Arrays are laid out [group, B], a group down each of B columns, in tiles that stay in a core's cache: sums
over a group are sums of rows, which numpy does at full width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.model.weights import Float, Groups

Bits = Literal[4, 8]

LARGEST: Final = 65504.0
"""The largest float16: what a scale or an offset can be."""
SHRINKS: Final[dict[Bits, tuple[float, ...]]] = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.72), 8: (1.0,)}
"""Parts of a group's range that are tried."""
ROUNDS: Final[dict[Bits, int]] = {4: 3, 8: 1}
"""How often q and its line improve each other."""

_TILE: Final = 1 << 15
"""Numbers in a tile: 128 KiB, of which a core works on four."""
_Q_MAX: Final[dict[Bits, int]] = {4: 15, 8: 127}


@dataclass(frozen=True, slots=True)
class Quantized:
    """What `quantize` gives.

    Attributes:
        groups: the arrays; scale and offset hold float16 numbers.
        error: Σ (w − ŵ)² of each row, float64 [N].
        energy: Σ w² of each row, float64 [N].
    """

    groups: Groups
    error: NDArray[np.float64]
    energy: NDArray[np.float64]


def quantize(
    w: Float, *, bits: Bits, group: int, importance: Float | None = None, threads: int = 1
) -> Quantized:
    """Quantize the rows of w.

    Args:
        w: float32 [N, K], finite, no number beyond LARGEST.
        group: elements of a row that share a scale; divides K.
        importance: float32 [K], h above: not negative; or None. Scaling all of it changes nothing.
    """
    rows, columns = w.shape
    if bits not in _Q_MAX or columns % group:
        raise ValueError(f"{bits} bits in groups of {group} of {columns} columns")
    q = np.empty((rows, columns), np.uint8 if bits == 4 else np.int8)
    scale = np.empty((rows, columns // group), np.float32)
    offset = np.empty_like(scale) if bits == 4 else None
    error, energy = np.empty(rows), np.empty(rows)
    step = max(1, _TILE // columns)
    weights = None if importance is None else _importance_tile(importance, min(step, rows), group)

    def work(bounds: tuple[int, int]) -> None:
        begin, end = bounds
        tile = _Tile(w[begin:end], bits, group, weights)
        tile.search()
        here = slice(begin, end)
        q[here], scale[here] = tile.numbers(), tile.scale.reshape(end - begin, -1)
        if offset is not None:
            offset[here] = tile.offset.reshape(end - begin, -1)
        error[here], energy[here] = tile.error(), tile.energy

    _for_each(work, ((begin, min(begin + step, rows)) for begin in range(0, rows, step)), threads)
    return Quantized(Groups(q, scale, offset), error, energy)


def _for_each(
    work: Callable[[tuple[int, int]], None], tiles: Iterator[tuple[int, int]], threads: int
) -> None:
    if threads == 1:
        for bounds in tiles:
            work(bounds)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, tiles):
            pass


def _importance_tile(importance: Float, rows: int, group: int) -> Float:
    """h as [group, rows · K / group], of mean 1; where all of a group is 0, all of it counts."""
    of_groups = importance.reshape(-1, group).astype(np.float64)
    mean = of_groups.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(mean > 0, of_groups / mean, 1.0)
    return np.ascontiguousarray(np.tile(relative.astype(np.float32).T, rows))


class _Tile:
    """Some rows, every group of them a column of [group, B], and the best scale and offset so far."""

    def __init__(self, rows: Float, bits: Bits, group: int, weights: Float | None) -> None:
        self._bits, self._group, self._rows = bits, group, len(rows)
        self._low, self._high = (0, 15) if bits == 4 else (-127, 127)
        w = self._w = np.ascontiguousarray(rows.reshape(-1, group).T)
        self.energy = np.einsum("nk,nk->n", rows, rows).astype(np.float64)
        self._h = None if weights is None else weights[:, : w.shape[1]]
        self._q, self._t = np.empty_like(w), np.empty_like(w)
        if bits == 4:
            least, most = w.min(axis=0), w.max(axis=0)
            self._middle, self._range = (least + most) / 2, most - least
            self._plain = _float16(self._range / 15), _float16(least)
        else:
            self._range = np.abs(w, out=self._t).max(axis=0)
            self._middle = np.zeros_like(self._range)
            self._plain = _float16(self._range / 127), self._middle
        # Sums of squares lose nothing where numbers are centred.
        self._c = w - self._middle if bits == 4 else w
        self._hc = self._c if self._h is None else self._c * self._h
        self._sum_h = np.float32(group) if self._h is None else self._h.sum(axis=0)
        self._sum_c = self._hc.sum(axis=0)
        self.scale, self.offset = self._plain

    def search(self) -> None:
        """Find `scale` and `offset`, and q for them."""
        best, slope, start = None, self._range, self._range
        for shrink in SHRINKS[self._bits]:
            self._round(_inverse(self._range * np.float32(shrink / self._steps)), self._centre)
            gain, line, begin = self._line()
            if best is None:
                best, slope, start = gain, line, begin
            else:
                better = gain > best
                best = np.where(better, gain, best)
                slope, start = np.where(better, line, slope), np.where(better, begin, start)
        for _ in range(ROUNDS[self._bits]):
            inverse = _inverse(slope)
            self._round(inverse, -start * inverse)
            _, slope, start = self._line()
        self._settle(_float16(np.maximum(slope, 0)), _float16(start + self._middle))

    @property
    def _steps(self) -> int:
        return 15 if self._bits == 4 else 127

    @property
    def _centre(self) -> Any:
        return np.float32(7.5 if self._bits == 4 else 0)

    def _round(self, inverse: Float, shift: Any) -> None:
        """q = c · inverse + shift, rounded into range."""
        q = np.multiply(self._c, inverse, out=self._q)
        q += shift
        np.rint(q, out=q)
        np.clip(q, self._low, self._high, out=q)

    def _line(self) -> tuple[Float, Float, Float]:
        """Of the line through (q, c): what it explains of Σ h c², its slope, and its value at q = 0."""
        q, t = self._q, self._t
        sum_qc = np.multiply(q, self._hc, out=t).sum(axis=0)
        hq = q if self._h is None else np.multiply(q, self._h, out=t)
        sum_q = hq.sum(axis=0)
        sum_qq = np.multiply(hq, q, out=t).sum(axis=0)
        if self._bits == 8:
            slope = _divide(sum_qc, sum_qq)
            return slope * sum_qc, slope, np.zeros_like(slope)
        variance = sum_qq - sum_q * sum_q / self._sum_h
        covariance = sum_qc - sum_q * self._sum_c / self._sum_h
        slope = _divide(covariance, variance)
        return slope * covariance, slope, (self._sum_c - slope * sum_q) / self._sum_h

    def _settle(self, scale: Float, offset: Float) -> None:
        """Take these, or the plain ones where they are better; q is made for what is taken."""
        if self._bits == 8:
            offset = self._plain[1]
        found = self._loss(scale, offset)
        plain = self._loss(*self._plain)
        better = found < plain
        self.scale = np.where(better, scale, self._plain[0])
        self.offset = np.where(better, offset, self._plain[1])
        self._make(self.scale, self.offset)

    def _loss(self, scale: Float, offset: Float) -> Float:
        self._make(scale, offset)
        difference = self._difference(scale, offset)
        squares = np.multiply(difference, difference, out=difference)
        if self._h is not None:
            squares *= self._h
        loss: Float = squares.sum(axis=0)
        return loss

    def _make(self, scale: Float, offset: Float) -> None:
        """q = (w − offset) / scale, rounded into range."""
        q = self._w if self._bits == 8 else np.subtract(self._w, offset, out=self._q)
        q = np.multiply(q, _inverse(scale), out=self._q)
        np.rint(q, out=q)
        np.clip(q, self._low, self._high, out=q)

    def _difference(self, scale: Float, offset: Float) -> Float:
        """ŵ − w, as executors compute ŵ, in the scratch tile."""
        t: Float = np.multiply(self._q, scale, out=self._t)
        if self._bits == 4:
            t += offset
        t -= self._w
        return t

    def error(self) -> NDArray[np.float64]:
        """Σ (ŵ − w)² of each row."""
        difference = self._difference(self.scale, self.offset)
        of_groups = np.multiply(difference, difference, out=difference).sum(axis=0)
        of_rows: NDArray[np.float64] = of_groups.reshape(self._rows, -1).sum(axis=1, dtype=np.float64)
        return of_rows

    def numbers(self) -> NDArray[Any]:
        """q of the rows, [rows, K]."""
        dtype = np.uint8 if self._bits == 4 else np.int8
        q: NDArray[Any] = self._q.astype(dtype).T.reshape(self._rows, -1)
        return q


def _float16(x: Float) -> Float:
    """The nearest float16 number that is not infinite."""
    nearest: Float = np.clip(x, -LARGEST, LARGEST).astype(np.float16).astype(np.float32)
    return nearest


def _inverse(scale: Float) -> Float:
    """1 / scale; 0 where that is infinite or there is no scale: every q is then the same."""
    return _divide(np.ones_like(scale), scale)


def _divide(a: Float, b: Float) -> Float:
    """a / b, or 0 where that is not finite or b is not positive."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = a / b
    return np.where((b > 0) & np.isfinite(quotient), quotient, np.float32(0)).astype(np.float32, copy=False)

"""Linear layers and the embedding for TensorRT: 4-bit weights stay packed, asymmetric ones stay exact.

TensorRT multiplies by symmetric INT4 blocks. With 4-bit numbers q = c + 8 and w = s·q + o,
    x · w = x · (s·c) + mean_group(x) · (g · (o + 8s)),
the second product smaller than the first by the size g of a group; a mean where the ONNX form has a sum, so
that float16 cannot overflow (g is a power of two, so the factor rounds nothing). Eight-bit numbers are a
pair, q − 8 = 16·hi + lo with hi and lo in −8 … 7: two INT4 products, since TensorRT would turn an INT8 block
matrix back into float16 in every step. What rounds: o + 8s to float16, and scales that are no float16
(K-quants').
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import BuildError
from edgellm.model.trt_network import Tensor, TrtNetwork
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight

GROUPS: Final = (16, 32, 64, 128)
"""INT4 blocks that TensorRT has kernels for."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor [B, T, width] or [B, width] of the network.

    Attributes:
        tensor: float16, or float32 in the residual stream.
        width: size of the last axis.
    """

    tensor: Tensor
    width: int


class TrtLinears:
    """Writes linears and the embedding into a network."""

    def __init__(self, net: TrtNetwork) -> None:
        self._net = net
        self._means: dict[tuple[str, int], Tensor] = {}
        self._gathered: dict[tuple[str, bytes], Tensor] = {}

    def embed(self, ids: Tensor, weight: Weight, name: str) -> Value:
        """Rows of `weight` [E, D] picked by `ids` [B, T], float16 [B, T, D]."""
        net, width = self._net, weight.shape[1]
        if isinstance(weight, Dense):
            table = net.weight(f"{name}.weight", weight.dequantize())
            return Value(net.gather(name, table, ids, 0), width)
        if weight.perm is not None:
            raise BuildError(f"{weight.name} is an embedding in act-order, which no format has")
        self._require_group(weight)
        groups = weight.read()
        scale = net.weight(f"{name}.scale", groups.scale)
        if weight.bits == 8:
            table, rest = net.constant(f"{name}.q", groups.q), groups.offsets()
        else:
            table, rest = net.int4(f"{name}.q", _centred(groups)), groups.offsets() + 8 * groups.scale
        rows = net.gather(name, net.dequantize(f"{name}.table", table, scale), ids, 0)
        if rest.any():
            split = net.reshape(f"{name}.groups", rows, (0, 0, width // weight.group, weight.group))
            offsets = net.gather(f"{name}.offsets", net.weight(f"{name}.rest", rest), ids, 0)
            offsets = net.reshape(f"{name}.offsets.groups", offsets, (0, 0, width // weight.group, 1))
            joined = net.add(f"{name}.offset", split, offsets)
            rows = net.reshape(f"{name}.joined", joined, (0, 0, width))
        return Value(rows, width)

    def project(
        self, x: Value, weights: Sequence[Weight], biases: Sequence[Weight | None], name: str
    ) -> Value:
        """x · [weights]ᵀ + [biases], the parts side by side; neighbours of one layout become one product."""
        net = self._net
        alike = [list(group) for _, group in itertools.groupby(weights, _layout)]
        parts = [
            self._multiply(x, group, name if len(alike) == 1 else f"{name}.{i}")
            for i, group in enumerate(alike)
        ]
        rank = len(x.tensor.shape)
        y = parts[0] if len(parts) == 1 else net.concat(f"{name}.concat", parts, rank - 1)
        if any(bias is not None for bias in biases):
            values = [
                np.zeros(weight.shape[0], np.float32) if bias is None else bias.dequantize()
                for weight, bias in zip(weights, biases, strict=True)
            ]
            row = np.concatenate(values).reshape((1,) * (rank - 1) + (-1,))
            y = net.add(f"{name}.biased", y, net.weight(f"{name}.bias", row))
        return Value(y, sum(weight.shape[0] for weight in weights))

    def _multiply(self, x: Value, weights: Sequence[Weight], name: str) -> Tensor:
        """x · [weights]ᵀ, for weights of one layout."""
        net, first = self._net, weights[0]
        if isinstance(first, Dense):
            w = np.concatenate([weight.dequantize() for weight in weights]).T
            return net.matmul(name, x.tensor, net.weight(f"{name}.weight", w))

        self._require_group(first)
        if first.perm is not None:
            x = Value(self._gather(x, first.perm), x.width)
        groups = [weight.read() for weight in weights if isinstance(weight, Grouped)]
        scale = np.concatenate([part.scale for part in groups])
        rest = np.concatenate([part.offsets() for part in groups]) + 8 * scale
        if first.bits == 4:
            y = self._int4(name, x.tensor, np.concatenate([_centred(part) for part in groups]), scale)
        else:
            hi, lo = _pair(np.concatenate([part.q for part in groups]))
            y = net.add(
                f"{name}.pair",
                self._int4(f"{name}.hi", x.tensor, hi, 16 * scale),
                self._int4(f"{name}.lo", x.tensor, lo, scale),
            )
        if rest.any():
            factors = net.weight(f"{name}.rest", (rest * np.float32(first.group)).T)
            offsets = net.matmul(f"{name}.offsets", self._mean(x, first.group), factors)
            y = net.add(f"{name}.sum", y, offsets)
        return y

    def _int4(self, name: str, x: Tensor, q: NDArray[np.int8], scale: Float) -> Tensor:
        """x · (q · scale)ᵀ for q [N, K] in −8 … 7 and scale [N, K / group]."""
        net = self._net
        w = net.dequantize(
            f"{name}.dequantized", net.int4(f"{name}.q", q.T), net.weight(f"{name}.scale", scale.T)
        )
        return net.matmul(name, x, w)

    def _mean(self, x: Value, group: int) -> Tensor:
        """mean_group(x): [..., width] → [..., width / group], once for all that read x."""
        key = (x.tensor.name, group)
        if key not in self._means:
            net, rank = self._net, len(x.tensor.shape)
            shape = [0] * (rank - 1) + [x.width // group, group]
            split = net.reshape(f"{x.tensor.name}.groups.{group}", x.tensor, shape)
            self._means[key] = net.mean(f"{x.tensor.name}.means.{group}", split, rank, keep=False)
        return self._means[key]

    def _gather(self, x: Value, order: NDArray[np.int32]) -> Tensor:
        """The columns of x in another order, once for all that read them so."""
        net, raw = self._net, order.tobytes()
        key = (x.tensor.name, raw)
        if key not in self._gathered:
            columns = net.constant(f"columns.{hashlib.sha256(raw).hexdigest()[:16]}", order)
            name = f"{x.tensor.name}.gathered.{len(self._gathered)}"
            self._gathered[key] = net.gather(name, x.tensor, columns, len(x.tensor.shape) - 1)
        return self._gathered[key]

    def _require_group(self, weight: Grouped) -> None:
        if weight.group not in GROUPS:
            raise BuildError(
                f"{weight.name} has groups of {weight.group}; TensorRT multiplies by groups of "
                f"{', '.join(map(str, GROUPS))}. Use `--executor cuda`"
            )


def _layout(weight: Weight) -> tuple[int, int, bytes] | None:
    """What the parts of one product have in common: bits, group, order of columns; None is dense."""
    if isinstance(weight, Dense):
        return None
    return weight.bits, weight.group, b"" if weight.perm is None else weight.perm.tobytes()


def _centred(groups: Groups) -> NDArray[np.int8]:
    """4-bit numbers minus 8: int8 [N, K] in −8 … 7."""
    centred: NDArray[np.int8] = groups.q.astype(np.int8) - np.int8(8)
    return centred


def _pair(q: NDArray[np.uint8] | NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """hi, lo in −8 … 7 with q − 8 = 16·hi + lo."""
    shifted = q.astype(np.int16) - 8
    lo = ((shifted + 8) & 15) - 8
    hi = (shifted - lo) >> 4
    return hi.astype(np.int8), lo.astype(np.int8)

"""Linear layers and the embedding for TensorRT: 4-bit weights stay packed, asymmetric ones stay exact.

TensorRT multiplies by symmetric INT4 blocks. With 4-bit numbers q = c + 8 and w = s·q + o,
    x · w = x · (s·c) + mean_group(x) · (g · (o + 8s)),
the second product smaller than the first by the size g of a group; a mean where the ONNX form has a sum, so
that float16 cannot overflow (g is a power of two, so the factor rounds nothing). Eight-bit numbers are a
pair, q − 8 = 16·hi + lo with hi and lo in −8 … 7: two INT4 products, since TensorRT would turn an INT8 block
matrix back into float16 in every step. What rounds: o + 8s to float16, and scales that are no float16
(K-quants').

Weights are read some rows at a time into what TensorRT is given: beside that, no matrix is ever whole.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
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
            elements = np.empty(weight.shape, net.dtype)
            for begin, end in weight.blocks():
                elements[begin:end] = net.rounded(weight.name, weight.read(begin, end))
            return Value(net.gather(name, net.weight(f"{name}.weight", elements), ids, 0), width)
        if weight.perm is not None:
            raise BuildError(f"{weight.name} is an embedding in act-order, which no format has")
        self._require_group(weight)
        table, scale, rest = self._table(weight, name)
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

    def _table(self, weight: Grouped, name: str) -> tuple[Tensor, Tensor, NDArray[np.floating]]:
        """An embedding's numbers, their scales, and what is to be added, [E, D / group]."""
        net, (rows, width) = self._net, weight.shape
        scale, rest = (np.zeros((rows, width // weight.group), net.dtype) for _ in range(2))
        whole = np.empty((rows, width if weight.bits == 8 else 0), np.int8)
        pairs = np.empty((rows, width // 2 if weight.bits == 4 else 0), np.uint8)
        for begin, end in weight.blocks():
            groups = weight.read(begin, end)
            offsets = groups.offsets()
            if weight.bits == 8:
                whole[begin:end] = groups.q
            else:
                pairs[begin:end] = pack_pairs(_centred(groups).T).T
                offsets = offsets + 8 * groups.scale
            scale[begin:end] = net.rounded(weight.name, groups.scale)
            if offsets.any():
                rest[begin:end] = net.rounded(weight.name, offsets)
        if weight.bits == 8:
            table = net.constant(f"{name}.q", whole)
        else:
            table = net.int4(f"{name}.q", weight.shape, pairs.reshape(-1))
        return table, net.weight(f"{name}.scale", scale), rest

    def _multiply(self, x: Value, weights: Sequence[Weight], name: str) -> Tensor:
        """x · [weights]ᵀ, for weights of one layout."""
        net, first = self._net, weights[0]
        outputs, width = sum(weight.shape[0] for weight in weights), first.shape[1]
        if isinstance(first, Dense):
            w = np.empty((width, outputs), net.dtype)
            for begin, rows in _in_blocks(weights):
                assert isinstance(rows, np.ndarray)
                w[:, begin : begin + len(rows)] = net.rounded(name, rows).T
            return net.matmul(name, x.tensor, net.weight(f"{name}.weight", w))

        self._require_group(first)
        if first.perm is not None:
            x = Value(self._gather(x, first.perm), x.width)
        names = [name] if first.bits == 4 else [f"{name}.hi", f"{name}.lo"]
        paired = all(begin % 2 == 0 for begin in _starts(weights)) and outputs % 2 == 0
        parts = [_Int4(net, each, (width, outputs), first.group, paired=paired) for each in names]
        factors = np.zeros((width // first.group, outputs), net.dtype)
        for begin, groups in _in_blocks(weights):
            assert isinstance(groups, Groups)
            if first.bits == 4:
                parts[0].put(begin, _centred(groups), groups.scale)
            else:
                hi, lo = _pair(groups.q)
                parts[0].put(begin, hi, 16 * groups.scale)
                parts[1].put(begin, lo, groups.scale)
            rest = groups.offsets() + 8 * groups.scale
            if rest.any():
                factors[:, begin : begin + len(rest)] = net.rounded(name, rest * np.float32(first.group)).T
        products = [part.multiply(x.tensor) for part in parts]
        y = products[0] if len(products) == 1 else net.add(f"{name}.pair", *products)
        if factors.any():
            means = self._mean(x, first.group)
            offsets = net.matmul(f"{name}.offsets", means, net.weight(f"{name}.rest", factors))
            y = net.add(f"{name}.sum", y, offsets)
        return y

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


class _Int4:
    """A product x · (q · scale)ᵀ, whose q [N, K] in −8 … 7 and scale [N, K / group] come by rows."""

    def __init__(
        self, net: TrtNetwork, name: str, shape: tuple[int, int], group: int, *, paired: bool
    ) -> None:
        self._net = net
        self._name = name
        self._shape = shape
        width, outputs = shape
        self._scale = np.empty((width // group, outputs), net.dtype)
        # Pairs that reach from one block into the next, or one row of the matrix, are made at the end.
        self._packed = np.empty((width, outputs // 2), np.uint8) if paired else None
        self._whole = None if paired else np.empty(shape, np.int8)

    def put(self, begin: int, q: NDArray[np.int8], scale: Float) -> None:
        """Rows `begin` and following."""
        end = begin + len(q)
        self._scale[:, begin:end] = self._net.rounded(self._name, scale).T
        if self._packed is not None:
            self._packed[:, begin // 2 : end // 2] = pack_pairs(q).T
        if self._whole is not None:
            self._whole[:, begin:end] = q.T

    def multiply(self, x: Tensor) -> Tensor:
        """The product, once all rows are there."""
        net, name = self._net, self._name
        packed = self._packed if self._whole is None else pack_pairs(self._whole.reshape(-1, 1))
        assert packed is not None
        q = net.int4(f"{name}.q", self._shape, packed.reshape(-1))
        w = net.dequantize(f"{name}.dequantized", q, net.weight(f"{name}.scale", self._scale))
        return net.matmul(name, x, w)


def pack_pairs(q: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Rows 2i and 2i + 1 of integers in −8 … 7 as one, the first one low."""
    nibbles = np.bitwise_and(q.view(np.uint8), np.uint8(15))
    high = np.left_shift(nibbles[1::2], 4, dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or(nibbles[0::2], high)
    return packed


def _starts(weights: Sequence[Weight]) -> Iterator[int]:
    """Where the blocks begin among the rows of all weights."""
    first = 0
    for weight in weights:
        yield from (first + begin for begin, _ in weight.blocks())
        first += weight.shape[0]


def _in_blocks(weights: Sequence[Weight]) -> Iterator[tuple[int, Groups | Float]]:
    """Rows of all weights, some at a time, and where they begin among all."""
    blocks = ((weight, block) for weight in weights for block in weight.blocks())
    for start, (weight, (begin, end)) in zip(_starts(weights), blocks, strict=True):
        yield start, weight.read(begin, end)


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

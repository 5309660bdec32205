"""Linear layers and the embedding for ONNX Runtime's CPU provider: quantized weights stay so, exactly.

MatMulNBits is fast for symmetric weights alone: float zero points are exact but have no fast kernel, and
integer ones would round the offset. So an offset goes another way. With c = 8 for 4 bits, and for 8 the
middle of what the layout uses of them, which is mostly 0,
    x · (s·q + o) = x · s·(q − c) + Σ_group(x) · (o + c·s)
where the sums of x over each group are shared by all linears that read x, and the second product is smaller
than the first by the size of a group. Where o + c·s is 0 throughout (Q4_0, Q8_0) there is no second product.
Where groups are of scattered columns, those of x are gathered in the same order first.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import BuildError
from edgellm.model.onnx_file import CONTRIB, OnnxFile
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight

Compute = Literal["int8", "fp32"]
"""`int8`: quantized weights meet activations that are quantized to 8 bits group by group; `fp32`: everything
is float32, the reference that other modes and executors are measured against."""

EMBEDDING: Final = "embedding"
"""The base of its tensors' names; a tied head uses the same tensors."""
MIN_GROUP: Final = 16
ACCURACY_INT8: Final = 4
"""MatMulNBits' accuracy_level that lets it quantize activations to 8 bits."""


@dataclass(slots=True)
class Value:
    """A float32 tensor of the graph, or a sum that the norm after it will compute.

    Attributes:
        name: the tensor's; of a sum that nobody has computed yet, the name it will have.
        rank: 3 for [B, S, width], 2 for [R, width].
        width: size of the last axis.
        terms: the two addends of a sum that is still to be computed.
    """

    name: str
    rank: int
    width: int
    terms: tuple[str, str] | None = None


class Linears:
    """Writes linears and the embedding into a model file."""

    def __init__(self, file: OnnxFile, compute: Compute) -> None:
        self._file = file
        self._compute = compute
        self._group_sums: dict[tuple[str, int], str] = {}
        self._gathered: dict[tuple[str, bytes], str] = {}
        self._embedding: Weight | None = None

    def embed(self, ids: str, weight: Weight, name: str) -> Value:
        """Rows of `weight` picked by `ids` [B, S]."""
        self._embedding = weight
        width = weight.shape[1]
        if self._layout(weight) is None:
            self._file.node("Gather", [self._dense([weight], EMBEDDING), ids], [name], axis=0)
            return Value(name, 3, width)

        assert isinstance(weight, Grouped)
        grouped = self._grouped([weight], EMBEDDING)
        table = self._file.alias(
            f"{EMBEDDING}.table", grouped.weight, (weight.shape[0], width * weight.bits // 8)
        )
        main = name if grouped.rest is None else f"{name}.main"
        self._file.node(
            "GatherBlockQuantized",
            [table, ids, grouped.scale],
            [main],
            domain=CONTRIB,
            bits=weight.bits,
            block_size=weight.group,
            gather_axis=0,
            quantize_axis=1,
        )
        if grouped.rest is not None:
            self._add_rest_rows(ids, weight, grouped.rest, main, name)
        return Value(name, 3, width)

    def project(
        self, x: Value, weights: Sequence[Weight], biases: Sequence[Weight | None], name: str
    ) -> Value:
        """x · [weights]ᵀ + [biases], the parts side by side; neighbours of one layout become one product."""
        biased = any(bias is not None for bias in biases)
        product = f"{name}.product" if biased else name
        alike = [list(group) for _, group in itertools.groupby(weights, self._layout)]
        if len(alike) == 1:
            self._multiply(x, weights, name, product)
        else:
            parts = [f"{name}.{i}" for i in range(len(alike))]
            for part, group in zip(parts, alike, strict=True):
                self._multiply(x, group, part, part)
            self._file.node("Concat", parts, [product], axis=-1)
        if biased:
            values = [
                np.zeros(weight.shape[0], np.float32) if bias is None else bias.dequantize()
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self._file.node(
                "Add", [product, self._file.constant(f"{name}.bias", np.concatenate(values))], [name]
            )
        return Value(name, x.rank, sum(weight.shape[0] for weight in weights))

    def project_runs(self, x: Value, sizes: str, weights: Sequence[Sequence[Weight]], name: str) -> Value:
        """Runs of rows of x [R, K], each times its own [weights]ᵀ, one below the other.

        Args:
            sizes: i64 [runs], rows of each; where there are none, its weights are not read.
        """

        def runs(whole: str) -> list[str]:
            parts = [f"{whole}.run.{i}" for i in range(len(weights))]
            self._file.node("Split", [whole, sizes], parts, axis=0)
            return parts

        width = sum(weight.shape[0] for weight in weights[0])
        products = [f"{name}.{i}" for i in range(len(weights))]
        layouts = {self._layout(weight) for parts in weights for weight in parts}
        layout = layouts.pop()
        if layouts or layout is None:
            for run, parts, product in zip(runs(x.name), weights, products, strict=True):
                self.project(Value(run, 2, x.width), parts, [None] * len(parts), product)
            self._file.node("Concat", products, [name], axis=0)
            return Value(name, 2, width)

        _, group, order = layout
        if order:
            x = self._gather(x, order)
        rests = []
        for run, parts, product in zip(runs(x.name), weights, products, strict=True):
            grouped = self._grouped([part for part in parts if isinstance(part, Grouped)], product)
            self._multiply_grouped(Value(run, 2, x.width), parts, grouped, product)
            rests.append(grouped.rest)
        main = f"{name}.main" if any(rests) else name
        self._file.node("Concat", products, [main], axis=0)
        if any(rests):
            # The sums of all rows at once; each expert's offsets are one small product more.
            shape = (width, x.width // group)
            none = self._file.constant("offsets.none.{}.{}".format(*shape), np.zeros(shape, np.float32))
            offsets = [f"{product}.offsets" for product in products]
            for run, rest, product in zip(runs(self._sums(x, group)), rests, offsets, strict=True):
                self._file.node("FusedMatMul", [run, rest or none], [product], domain=CONTRIB, transB=1)
            self._file.node("Concat", offsets, [f"{name}.offsets"], axis=0)
            self._file.node("Add", [main, f"{name}.offsets"], [name])
        return Value(name, 2, width)

    def _layout(self, weight: Weight) -> tuple[int, int, bytes] | None:
        """What the parts of one product have in common: bits, group, order of columns; None is dense."""
        if isinstance(weight, Dense) or self._compute == "fp32":
            return None
        return weight.bits, weight.group, b"" if weight.perm is None else weight.perm.tobytes()

    def _multiply(self, x: Value, weights: Sequence[Weight], name: str, output: str) -> None:
        """output = x · [weights]ᵀ, for weights of one layout."""
        layout = self._layout(weights[0])
        base = EMBEDDING if len(weights) == 1 and weights[0] is self._embedding else name
        if layout is None:
            self._file.node(
                "FusedMatMul", [x.name, self._dense(weights, base)], [output], domain=CONTRIB, transB=1
            )
            return
        _, group, order = layout
        if order:
            x = self._gather(x, order)
        grouped = self._grouped([weight for weight in weights if isinstance(weight, Grouped)], base)
        main = output if grouped.rest is None else f"{output}.main"
        self._multiply_grouped(x, weights, grouped, main)
        if grouped.rest is not None:
            inputs = [self._sums(x, group), grouped.rest]
            self._file.node("FusedMatMul", inputs, [f"{output}.offsets"], domain=CONTRIB, transB=1)
            self._file.node("Add", [main, f"{output}.offsets"], [output])

    def _multiply_grouped(
        self, x: Value, weights: Sequence[Weight], grouped: _GroupedNames, output: str
    ) -> None:
        """output = x · [weights]ᵀ, but for what is left of the offsets."""
        assert isinstance(weights[0], Grouped)
        self._file.node(
            "MatMulNBits",
            [x.name, grouped.weight, grouped.scale],
            [output],
            domain=CONTRIB,
            K=x.width,
            N=sum(weight.shape[0] for weight in weights),
            bits=weights[0].bits,
            block_size=weights[0].group,
            accuracy_level=ACCURACY_INT8,
        )

    def _gather(self, x: Value, order: bytes) -> Value:
        """The columns of x in another order (int32), once for all that read them so."""
        key = (x.name, order)
        if key not in self._gathered:
            columns = self._file.constant(
                f"columns.{hashlib.sha256(order).hexdigest()[:16]}", np.frombuffer(order, np.int32)
            )
            self._gathered[key] = f"{x.name}.gathered.{len(self._gathered)}"
            self._file.node("Gather", [x.name, columns], [self._gathered[key]], axis=-1)
        return Value(self._gathered[key], x.rank, x.width)

    def _sums(self, x: Value, group: int) -> str:
        """Σ_group(x): [..., width] → [..., width / group], once for all that read x."""
        key = (x.name, group)
        if key not in self._group_sums:
            groups = x.width // group
            leading = [0] * (x.rank - 1)
            shape = self._file.constant(
                f"groups.{x.rank}.{groups}", np.array([*leading, groups, group], np.int64)
            )
            last = self._file.constant("axis.last", np.array([-1], np.int64))
            split, sums = f"{x.name}.groups.{group}", f"{x.name}.sums.{group}"
            self._file.node("Reshape", [x.name, shape], [split])
            self._file.node("ReduceSum", [split, last], [sums], keepdims=0)
            self._group_sums[key] = sums
        return self._group_sums[key]

    def _add_rest_rows(self, ids: str, weight: Grouped, rest: str, main: str, name: str) -> None:
        """name = main + the rows' offsets, each repeated over its group."""
        groups, last = (
            weight.shape[1] // weight.group,
            self._file.constant("axis.last", np.array([-1], np.int64)),
        )
        split = self._file.constant("embed.groups", np.array([0, 0, groups, weight.group], np.int64))
        joined = self._file.constant("embed.width", np.array([0, 0, weight.shape[1]], np.int64))
        self._file.node("Gather", [rest, ids], [f"{name}.rest"], axis=0)
        self._file.node("Unsqueeze", [f"{name}.rest", last], [f"{name}.rest.groups"])
        self._file.node("Reshape", [main, split], [f"{main}.groups"])
        self._file.node("Add", [f"{main}.groups", f"{name}.rest.groups"], [f"{name}.groups"])
        self._file.node("Reshape", [f"{name}.groups", joined], [name])

    def _dense(self, weights: Sequence[Weight], base: str) -> str:
        """float32 [N, K]."""
        name = f"{base}.weight"
        if not self._file.has(name):
            rows = self._file.rows(name, np.float32, _stacked(weights))
            for weight in weights:
                for begin, end in weight.blocks():
                    rows.append(weight.dequantize(begin, end))
        return name

    def _grouped(self, weights: Sequence[Grouped], base: str) -> _GroupedNames:
        """A product's tensors: weight uint8 [N, groups, bytes of a group]; scale and rest [N, groups]."""
        weight_name, scale_name, rest_name = (f"{base}.{part}" for part in ("weight", "scale", "rest"))
        if not self._file.has(weight_name):
            group = weights[0].group
            if not has_kernel(group):
                raise BuildError(
                    f"{weights[0].name} has groups of {group}; "
                    f"the CPU executor needs a power of two from {MIN_GROUP} up"
                )
            n, k = _stacked(weights)
            packed = self._file.rows(weight_name, np.uint8, (n, k // group, group * weights[0].bits // 8))
            scale = self._file.rows(scale_name, np.float32, (n, k // group))
            rest = self._file.rows(rest_name, np.float32, (n, k // group))
            for weight in weights:
                centre = 8 if weight.bits == 4 else weight.middle
                for begin, end in weight.blocks():
                    groups = weight.read(begin, end)
                    packed.append(_packed(groups, centre, group))
                    scale.append(groups.scale)
                    rest.append(_rest(groups, centre))
            if rest.all_zero:
                self._file.drop(rest_name)
        return _GroupedNames(weight_name, scale_name, rest_name if self._file.has(rest_name) else None)


@dataclass(frozen=True, slots=True)
class _GroupedNames:
    weight: str
    scale: str
    rest: str | None


def has_kernel(group: int) -> bool:
    """Whether ONNX Runtime multiplies by weights in groups of this size."""
    return group >= MIN_GROUP and not group & (group - 1)


def _stacked(weights: Sequence[Weight]) -> tuple[int, int]:
    """The shape of the parts of a product, one above the other."""
    return sum(weight.shape[0] for weight in weights), weights[0].shape[1]


def _rest(groups: Groups, centre: int) -> Float:
    """o + c·s: what is left of a group's offset when its numbers are centred."""
    rest: Float
    if groups.zero is not None:
        rest = (centre - groups.zero.astype(np.float32)) * groups.scale
    else:
        rest = groups.offsets() + centre * groups.scale
    return rest


def _packed(groups: Groups, centre: int, group: int) -> NDArray[np.uint8]:
    """q as MatMulNBits wants it, uint8 [N, groups, bytes]: 4 bits 2i | 2i+1 << 4, or 8 bits − c + 128."""
    q = groups.q
    if q.dtype == np.uint8:
        # A pair of bytes lo, hi is the little-endian word hi << 8 | lo; the packed byte is its hi << 4 | lo.
        words = np.ascontiguousarray(q).view("<u2")
        packed = (words | words >> 4).astype(np.uint8)
    else:
        packed = (np.ascontiguousarray(q).view(np.uint8) - np.uint8(centre)) ^ np.uint8(0x80)
    result: NDArray[np.uint8] = packed.reshape(len(q), -1, group * packed.shape[1] // q.shape[1])
    return result

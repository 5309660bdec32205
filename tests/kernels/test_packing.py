"""Packed weights read back number by number, by what PTX says of an mma's operand A."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm.errors import BuildError
from edgellm.kernels.packing import PackedShape, Zero, pack, pack_bias, packed_shape
from edgellm.model.weights import Dense, Grouped, Groups, Weight

Array = NDArray[Any]


def unpack(packed: Array, shape: PackedShape) -> Array:
    """float64 [16 · row_blocks, K], in the order of packed rows.

    PTX, mma.m16n8k16 with 16-bit A: lane 4g + t holds in registers 0 … 3 two elements each, of rows g,
    g + 8, g, g + 8; operand B's registers are two elements each of column g. Register i of A meets register
    i // 2 of B, and a lane's B are the four columns of x that begin where the docstring of packing.py says.
    """
    panels = packed.reshape(shape.row_blocks, shape.panels, shape.panel_bytes)
    values = np.full((shape.row_blocks, 16, shape.k), np.nan)
    for panel in range(shape.panels):
        for mma in range(shape.panel // 16):
            chunk, j = divmod(mma, 4)
            for lane in range(32):
                g, t = divmod(lane, 4)
                unit = 16 if shape.bits < 16 and shape.group == 16 else 32
                column = chunk * 64 + (16 * j + 4 * t if unit == 16 else 32 * (j // 2) + 8 * t + 4 * (j % 2))
                for register in range(4):
                    row = g + 8 * (register % 2)
                    for half in range(2):
                        at = column + 2 * (register // 2) + half
                        w = _value(panels[:, panel], shape, chunk, j, lane, register, half)
                        if shape.bits < 16:
                            w = _dequantized(w, panels[:, panel], shape, g, register % 2, at // shape.group)
                        values[:, row, panel * shape.panel + at] = w
    return values.reshape(-1, shape.k)


def _value(
    panel: Array, shape: PackedShape, chunk: int, j: int, lane: int, register: int, half: int
) -> Array:
    """A number of a register, from [row blocks, bytes of a panel]."""
    if shape.bits == 4:
        at = chunk * 512 + lane * 16 + j * 4
        word = np.ascontiguousarray(panel[:, at : at + 4]).view("<u4")[:, 0].astype(np.int64)
        # What the kernel masks out: 4 · register bits up, the second element 16 bits above the first.
        return word >> (4 * register + 16 * half) & 15
    if shape.bits == 8:
        at = chunk * 1024 + (j // 2) * 512 + lane * 16 + 8 * (register % 2) + 4 * (j % 2)
        return panel[:, at + 2 * (register // 2) + half].astype(np.int64) - 128
    at = (chunk * 4 + j) * 512 + lane * 16 + 8 * (register % 2) + 4 * (register // 2) + 2 * half
    return np.ascontiguousarray(panel[:, at : at + 2]).view("<f2")[:, 0].astype(np.float64)


def _dequantized(q: Array, panel: Array, shape: PackedShape, g: int, upper: int, group: int) -> Array:
    count = 4 if shape.zero in ("zero_point", "offset") else 2
    groups = shape.panel // shape.group
    at = shape.number_bytes + (g * groups + group) * count * 2
    values = np.ascontiguousarray(panel[:, at : at + count * 2]).view("<f2").astype(np.float64)
    scale = values[:, upper]
    if shape.zero == "centred":
        return (q - 8) * scale
    if shape.zero == "zero_point":
        return (q - values[:, 2 + upper]) * scale
    return q * scale + (values[:, 2 + upper] if shape.zero == "offset" else 0)


def grouped(
    rng: np.random.Generator, n: int, k: int, bits: Any, group: int, zero: Zero, name: str = "w"
) -> Grouped:
    """A weight whose scales and offsets are float16 numbers."""
    q: Array = (
        rng.integers(0, 16, (n, k), np.uint8) if bits == 4 else rng.integers(-128, 128, (n, k), np.int8)
    )
    scale = rng.uniform(0.01, 1, (n, k // group)).astype(np.float16).astype(np.float32)
    offset = rng.normal(size=scale.shape).astype(np.float16).astype(np.float32) if zero == "offset" else None
    zeros = None
    if zero == "centred":
        zeros = np.full(scale.shape, 8, np.uint8)
    elif zero == "zero_point":
        zeros = rng.integers(-1, 17, scale.shape).astype(np.int16)
    groups = Groups(q, scale, offset, zeros)
    return Grouped(name, (n, k), bits, group, zero != "none", groups.rows, centred=zero == "centred")


def dense(values: Array, name: str = "w") -> Dense:
    return Dense(name, values.shape, "f32", lambda begin, end: values[begin:end])


def packed_rows(parts: list[Weight], shape: PackedShape) -> Array:
    """The rows that `unpack` should give, padded with zeros."""
    values = [part.dequantize().astype(np.float64) for part in parts]
    if not shape.swiglu:
        rows = np.concatenate(values)
        return np.pad(rows, ((0, -len(rows) % 16), (0, 0)))
    gate, up = (np.pad(v, ((0, -len(v) % 8), (0, 0))) for v in values)
    pairs = []
    for begin in range(0, len(gate), 8):
        pairs += [gate[begin : begin + 8], up[begin : begin + 8]]
    return np.concatenate(pairs)


@st.composite
def weights(draw: st.DrawFn) -> tuple[list[Weight], bool]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    group = draw(st.sampled_from([16, 32, 64, 128, 256]))
    k = draw(st.integers(1, 3)) * max(64, group)
    bits = draw(st.sampled_from([4, 8]))
    zeros: list[Zero] = ["none", "offset", "zero_point", *(["centred"] if bits == 4 else [])]  # type: ignore[list-item]
    zero = draw(st.sampled_from(zeros))
    swiglu = draw(st.booleans())
    sizes = (
        [draw(st.integers(1, 70))] * 2
        if swiglu
        else draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    )
    return [grouped(rng, n, k, bits, group, zero, f"part {i}") for i, n in enumerate(sizes)], swiglu


@settings(deadline=None, max_examples=40)
@given(weights())
def test_what_is_packed_is_read_back(case: tuple[list[Weight], bool]) -> None:
    parts, swiglu = case
    shape = packed_shape(parts, swiglu=swiglu)
    packed = np.concatenate(list(pack(parts, shape)))
    assert packed.nbytes == shape.nbytes
    assert unpack(packed, shape) == pytest.approx(packed_rows(parts, shape), rel=1e-6, abs=1e-7)


@given(st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 2**32))
def test_dense_weights_are_float16(n: int, chunks: int, swiglu: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts: list[Weight] = [
        dense(rng.normal(size=(n, 64 * chunks)).astype(np.float32), f"part {i}") for i in range(1 + swiglu)
    ]
    shape = packed_shape(parts, swiglu=swiglu)
    packed = np.concatenate(list(pack(parts, shape)))
    want = packed_rows(parts, shape).astype(np.float16).astype(np.float64)
    assert np.array_equal(unpack(packed, shape), want)


@pytest.mark.parametrize(
    ("kinds", "bits", "group", "zero"),
    [
        ([(4, 128, "centred"), (4, 128, "centred")], 4, 128, "centred"),
        ([(4, 128, "centred"), (4, 64, "zero_point")], 4, 64, "zero_point"),
        ([(4, 128, "centred"), (8, 128, "none")], 8, 128, "zero_point"),
        ([(4, 32, "offset"), (8, 16, "none")], 8, 16, "offset"),
        ([(4, 32, "offset"), (4, 32, "centred")], 4, 32, "offset"),
        ([(4, 256, "none")], 4, 128, "none"),
    ],
)
def test_parts_of_different_kinds_take_the_form_that_holds_all(
    kinds: list[tuple[int, int, Zero]], bits: int, group: int, zero: Zero
) -> None:
    rng = np.random.default_rng(1)
    parts: list[Weight] = [grouped(rng, 24, 256, b, g, z) for b, g, z in kinds]
    shape = packed_shape(parts)
    assert (shape.bits, shape.group, shape.zero) == (bits, group, zero)
    packed = np.concatenate(list(pack(parts, shape)))
    # −8 · scale as a float16 offset is exact, too.
    assert unpack(packed, shape) == pytest.approx(packed_rows(parts, shape), rel=1e-6, abs=1e-7)


def test_a_dense_part_makes_all_dense() -> None:
    rng = np.random.default_rng(2)
    parts: list[Weight] = [
        grouped(rng, 16, 64, 4, 32, "offset"),
        dense(rng.normal(size=(5, 64)).astype(np.float32)),
    ]
    shape = packed_shape(parts)
    assert shape.bits == 16
    packed = np.concatenate(list(pack(parts, shape)))
    assert unpack(packed, shape) == pytest.approx(packed_rows(parts, shape), rel=1e-3)


def test_biases_are_in_the_order_of_rows() -> None:
    gate, up = np.arange(1, 12, dtype=np.float32), np.arange(101, 112, dtype=np.float32)
    rng = np.random.default_rng(3)
    parts: list[Weight] = [grouped(rng, 11, 64, 4, 32, "none") for _ in range(2)]
    shape = packed_shape(parts, swiglu=True)
    packed = pack_bias([dense(gate), dense(up)], parts, shape)
    assert packed is not None
    assert packed.tolist() == [
        *range(1, 9), *range(101, 109),
        *range(9, 12), 0, 0, 0, 0, 0, *range(109, 112), 0, 0, 0, 0, 0,
    ]  # fmt: skip
    stacked = packed_shape(parts)
    one = pack_bias([None, dense(up)], parts, stacked)
    assert one is not None
    assert one.tolist() == [0] * 11 + up.tolist() + [0] * 10
    assert pack_bias([None, None], parts, stacked) is None


def _with(**changes: Any) -> Grouped:
    values: dict[str, Any] = {"n": 16, "k": 128, "bits": 4, "group": 32, "zero": "none", **changes}
    return grouped(np.random.default_rng(4), **values, name="layer 3's o")


def test_what_no_kernel_takes_is_refused_by_name() -> None:
    with pytest.raises(BuildError, match="layer 3's o has 96 columns"):
        packed_shape([_with(k=96)])
    with pytest.raises(BuildError, match="layer 3's o has groups of 8"):
        packed_shape([_with(group=8)])
    with pytest.raises(BuildError, match="layer 3's o has 64 columns, w 128"):
        packed_shape([dense(np.zeros((4, 128), np.float32)), _with(k=64)])
    with pytest.raises(BuildError, match="gate and up"):
        packed_shape([_with(), _with(n=32)], swiglu=True)
    scattered = Grouped(
        "layer 3's o", (16, 64), 4, 32, False, _with(k=64).read_rows, perm=np.arange(64, dtype=np.int32)
    )
    with pytest.raises(BuildError, match=r"layer 3's o has scattered groups \(desc_act\)"):
        packed_shape([scattered])


def test_what_float16_cannot_hold_is_refused_by_name() -> None:
    values = np.ones((16, 64), np.float32)
    values[3, 5] = 7e4
    shape = packed_shape([dense(values, "layer 3's o")])
    with pytest.raises(BuildError, match="layer 3's o has a value beyond ±65504"):
        list(pack([dense(values, "layer 3's o")], shape))
    groups = Groups(np.zeros((16, 64), np.uint8), np.full((16, 2), 1e5, np.float32))
    large = Grouped("layer 3's o", (16, 64), 4, 32, False, groups.rows)
    with pytest.raises(BuildError, match="layer 3's o has a value beyond ±65504"):
        list(pack([large], packed_shape([large])))

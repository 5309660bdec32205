"""Weights in the order in which tensor cores read them, so that a warp's loads are whole lines of memory.

A matrix [N, K] is cut into row blocks of 16 rows, those into panels of 64 or 128 columns. Panels lie row
block by row block, each its numbers first, then the scales of its groups; nothing else is in the file.

A panel's numbers are chunks of 64 columns, for each the operands A of four `mma.m16n8k16`, lane by lane
(lane = 4 · g + t, as PTX calls them). The sum over k may be taken in any order if both operands agree, so a
lane's columns are neighbours: with j the number of the mma in a chunk, its four columns start at

    32 · (j // 2) + 8 · t + 4 · (j % 2)        groups of 32 and more
    16 · j + 4 · t                             groups of 16

and rows g and g + 8 of columns c … c + 3 are
    4 bits    one word: nibbles (g, c) (g+8, c) (g, c+2) (g+8, c+2) (g, c+1) (g+8, c+1) (g, c+3) (g+8, c+3),
              the lowest first; a lane's four words side by side
    8 bits    bytes q + 128; a lane has rows g of mma 0 and 1, rows g + 8 of both, then the same of mma 2
              and 3 512 bytes on
    16 bits   float16; a lane has row g, then row g + 8; mma by mma 512 bytes apart

After the numbers: for each g the panel's groups, each float16 scale of rows g and g + 8 and, where there are
any, both offsets or zero points.

What is rounded: scales and offsets to float16, which is exact for GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 and
for AWQ's and GPTQ's scales; Q4_K's, Q5_K's and Q6_K's products of a scale and a factor round once. Zero
points are exact. Dense bfloat16 and float32 weights round to float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import BuildError
from edgellm.model.weights import Float, Grouped, Groups, Weight

ROW_BLOCK: Final = 16
CHUNK: Final = 64
"""Columns of four mma: what K is a multiple of."""
GROUPS: Final = (16, 32, 64, 128)
"""That kernels know; a larger group becomes several with the same scale."""

Zero = Literal["none", "centred", "zero_point", "offset"]
"""What is added to scale · q: nothing; −8 · scale; −zero · scale; offset."""

_WORK_BYTES: Final = 1 << 19
"""Of numbers permuted at a time, so that they stay in the processor's cache."""

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PackedShape:
    """How a projection's weights are packed.

    Attributes:
        n: out features, of all parts together.
        k: in features.
        bits: 4, 8, or 16 for float16.
        group: columns that share a scale; of no meaning with 16 bits.
        zero: what is added to scale · q.
        swiglu: two parts, gate and up, interleaved: a row block is 8 rows of gate, then the same of up.
    """

    n: int
    k: int
    bits: int
    group: int
    zero: Zero
    swiglu: bool = False

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows, the last one padded with zeros."""
        if self.swiglu:
            return -(-(self.n // 2) // (ROW_BLOCK // 2))
        return -(-self.n // ROW_BLOCK)

    @property
    def outputs(self) -> int:
        """Values that a linear gives for a token: half of n with SwiGLU."""
        return self.n // 2 if self.swiglu else self.n

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return 128 if self.bits < 16 and self.group == 128 else CHUNK

    @property
    def panels(self) -> int:
        """Panels of a row block."""
        return self.k // self.panel

    @property
    def number_bytes(self) -> int:
        """Of a panel, before its scales."""
        return ROW_BLOCK * self.panel * self.bits // 8

    @property
    def panel_bytes(self) -> int:
        """Of a panel with its scales."""
        if self.bits == 16:
            return self.number_bytes
        values = 2 if self.zero in ("zero_point", "offset") else 1
        return self.number_bytes + self.panel // self.group * ROW_BLOCK * 2 * values

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self.row_blocks * self.panels * self.panel_bytes


def packed_shape(parts: Sequence[Weight], *, swiglu: bool = False) -> PackedShape:
    """How these matrices, one above the other, are packed: in the narrowest form that holds all of them.

    Parts of 4 and of 8 bits become 8 bits, groups of different sizes the smallest, both exactly; a dense part
    makes all dense, rounded to float16.

    Args:
        swiglu: the parts are gate and up.

    Raises:
        BuildError: a part that no kernel multiplies by; its name and what would do are in the message.
    """
    n, k = sum(part.shape[0] for part in parts), parts[0].shape[1]
    for part in parts:
        if part.shape[1] != k:
            raise BuildError(f"{part.name} has {part.shape[1]} columns, {parts[0].name} {k}")
        if isinstance(part, Grouped) and part.perm is not None:
            raise BuildError(
                f"{part.name} has scattered groups (desc_act); the CUDA executor needs groups of "
                "neighbouring columns: quantize with desc_act false, or use the CPU executor"
            )
    if k % CHUNK:
        raise BuildError(f"{parts[0].name} has {k} columns; the CUDA executor needs a multiple of {CHUNK}")
    if swiglu and (len(parts) != 2 or parts[0].shape != parts[1].shape):
        raise BuildError(f"{parts[0].name}: gate and up must be two matrices of one shape")

    grouped = [part for part in parts if isinstance(part, Grouped)]
    if len(grouped) < len(parts):
        return PackedShape(n, k, 16, CHUNK, "none", swiglu)
    group = math.gcd(128, *(part.group for part in grouped))
    if group not in GROUPS:
        smallest = min(grouped, key=lambda part: math.gcd(128, part.group))
        raise BuildError(
            f"{smallest.name} has groups of {smallest.group}; "
            f"the CUDA executor needs a multiple of {GROUPS[0]}"
        )
    bits = max(part.bits for part in grouped)
    kinds: set[Zero] = {_zero_of(part) for part in grouped}
    return PackedShape(n, k, bits, group, _zero_for(kinds, bits), swiglu)


def pack(parts: Sequence[Weight], shape: PackedShape) -> Iterator[Bytes]:
    """The packed bytes, piece by piece, each some row blocks.

    Raises:
        CheckpointError: as `read` of the weights.
        BuildError: a scale, offset or weight is beyond float16's range.
    """
    for name, rows in _rows(parts, shape):
        with np.errstate(over="ignore"):
            piece = _pack_dense(rows, shape) if isinstance(rows, np.ndarray) else _pack_groups(rows, shape)
        if piece is None:
            raise BuildError(f"{name} has a value beyond ±65504, the range of float16")
        yield piece


def pack_bias(biases: Sequence[Weight | None], parts: Sequence[Weight], shape: PackedShape) -> Float | None:
    """float32 [16 · row_blocks]: the parts' biases, 0 where a part has none; None if no part has one.

    Raises:
        CheckpointError: as `read` of the biases.
    """
    if all(bias is None for bias in biases):
        return None
    values = [
        np.zeros(part.shape[0], np.float32) if bias is None else bias.dequantize()
        for bias, part in zip(biases, parts, strict=True)
    ]
    stacked = _interleaved(*values) if shape.swiglu else np.concatenate(values)
    return _padded(stacked)


def _zero_of(part: Grouped) -> Zero:
    if part.centred:
        return "centred"
    if not part.asymmetric:
        return "none"
    return "zero_point" if part.read(0, 1).zero is not None else "offset"


def _zero_for(kinds: set[Zero], bits: int) -> Zero:
    """The form that holds all of these; 8-bit kernels have no middle of 8, so there it is a zero point."""
    if kinds == {"none"} or (kinds == {"centred"} and bits == 4):
        return next(iter(kinds))
    return "offset" if "offset" in kinds else "zero_point"


def _rows(parts: Sequence[Weight], shape: PackedShape) -> Iterator[tuple[str, Float | Groups]]:
    """Rows in the order in which they are packed, a multiple of 16 at a time, and whose they are."""
    if shape.swiglu:
        gate, up = parts
        for begin, end in gate.blocks():
            pair = [_canonical(part, begin, end, shape) for part in (gate, up)]
            yield f"{gate.name} or {up.name}", _each(_interleaved, *pair)
        return
    rest: Float | Groups | None = None
    for number, part in enumerate(parts):
        for begin, end in part.blocks():
            rows = _canonical(part, begin, end, shape)
            if rest is not None:
                rows = _each(_stacked, rest, rows)
            count = len(rows if isinstance(rows, np.ndarray) else rows.scale)
            last = number == len(parts) - 1 and end == part.shape[0]
            whole = count if last else count - count % ROW_BLOCK
            rest = None if whole == count else _each(itemgetter(slice(whole, None)), rows)
            if whole:
                yield part.name, _each(_padded, _each(itemgetter(slice(whole)), rows))


def _canonical(part: Weight, begin: int, end: int, shape: PackedShape) -> Float | Groups:
    """Rows of a part in the packed form's own terms: all arrays there that it needs, groups as small."""
    if shape.bits == 16:
        return part.dequantize(begin, end)
    assert isinstance(part, Grouped)
    groups = part.read(begin, end)
    repeat = part.group // shape.group

    def smaller(values: Array) -> Array:
        return values if repeat == 1 else np.repeat(values, repeat, axis=1)

    scale = smaller(groups.scale)
    zero = offset = None
    if shape.zero == "offset":
        offset = smaller(groups.offsets())
    elif shape.zero == "zero_point":
        stored = np.zeros(groups.scale.shape, np.int16) if groups.zero is None else groups.zero
        zero = smaller(stored.astype(np.int16))
    q = groups.q if groups.q.dtype == np.int8 or shape.bits == 4 else groups.q.view(np.int8)
    return Groups(q, scale, offset, zero)


def _each(function: Callable[..., Array], *rows: Float | Groups) -> Float | Groups:
    """A function of arrays along rows, for each of the arrays that the rows have."""
    if isinstance(rows[0], np.ndarray):
        return function(*rows)
    fields = [[getattr(row, field) for row in rows] for field in ("q", "scale", "offset", "zero")]
    return Groups(*(None if values[0] is None else function(*values) for values in fields))  # type: ignore[arg-type]


def _stacked(first: Array, second: Array) -> Array:
    return np.concatenate([first, second])


def _padded(rows: Array, multiple: int = ROW_BLOCK) -> Array:
    """With rows of zeros up to a multiple."""
    missing = -len(rows) % multiple
    if not missing:
        return rows
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])


def _interleaved(gate: Array, up: Array) -> Array:
    """8 rows of each in turn."""
    half = ROW_BLOCK // 2
    pair = [_padded(part, half).reshape(-1, half, *part.shape[1:]) for part in (gate, up)]
    return np.stack(pair, axis=1).reshape(-1, *gate.shape[1:])


def _pack_groups(rows: Groups, shape: PackedShape) -> Bytes | None:
    """Whole row blocks of numbers and scales; None where a scale is not finite in float16."""
    blocks = len(rows.scale) // ROW_BLOCK
    out = np.empty((blocks, shape.panels, shape.panel_bytes), np.uint8)
    numbers = out[..., : shape.number_bytes]
    permute = _permute_4 if shape.bits == 4 else _permute_8
    step = max(1, _WORK_BYTES // (ROW_BLOCK * shape.k))
    for begin in range(0, blocks, step):
        end = min(begin + step, blocks)
        q = rows.q[begin * ROW_BLOCK : end * ROW_BLOCK].view(np.uint8)
        permute(q.reshape(end - begin, 2, 8, shape.k), numbers[begin:end], shape)

    second = rows.offset if rows.offset is not None else rows.zero
    values = [rows.scale] if second is None else [rows.scale, second]
    halves = np.stack([value.astype(np.float16) for value in values])
    if not np.isfinite(halves).all():
        return None
    # [value, block, row half, g, panel, group] → [block, panel, g, group, value, row half]
    halves = halves.reshape(len(values), blocks, 2, 8, shape.panels, -1).transpose(1, 4, 3, 5, 0, 2)
    out[..., shape.number_bytes :] = np.ascontiguousarray(halves).view(np.uint8).reshape(*out.shape[:2], -1)
    return out.reshape(-1)


def _permute_4(q: Bytes, out: Bytes, shape: PackedShape) -> None:
    """q [blocks, 2, 8, K] into out [blocks, panels, bytes of numbers]."""
    blocks = len(q)
    eights = q.view("<u8")  # of numbers below 16, so that none is shifted into its neighbour
    words = eights[:, 1] << np.uint64(4)
    words |= eights[:, 0]
    # The middle two bytes of four change places: an mma's register holds columns (c, c+1), the next but one
    # (c+2, c+3), and both come out of a word by one mask, with a shift of 8 between them.
    changed = words >> np.uint64(8)
    changed ^= words
    changed &= np.uint64(0x0000FF000000FF00)
    words ^= changed
    changed <<= np.uint64(8)
    words ^= changed
    if shape.group == 16:
        source = words.view("<u4").reshape(blocks, 8, shape.panels, -1, 4, 4)  # block, g, panel, chunk, j, t
        target = out.view("<u4").reshape(blocks, shape.panels, -1, 8, 4, 4)  # block, panel, chunk, g, t, j
    else:
        source = words.reshape(blocks, 8, shape.panels, -1, 2, 4)  # …, j // 2, t
        target = out.view("<u8").reshape(blocks, shape.panels, -1, 8, 4, 2)
    np.copyto(target, source.transpose(0, 2, 3, 1, 5, 4))


def _permute_8(q: Bytes, out: Bytes, shape: PackedShape) -> None:
    """q [blocks, 2, 8, K] into out [blocks, panels, bytes of numbers]."""
    blocks = len(q)
    words = q ^ np.uint8(0x80)
    if shape.group == 16:
        # block, row half, g, panel, chunk, j // 2, j % 2, t →
        # block, panel, chunk, j // 2, g, t, row half, j % 2
        source = words.view("<u4").reshape(blocks, 2, 8, shape.panels, -1, 2, 2, 4)
        target = out.view("<u4").reshape(blocks, shape.panels, -1, 2, 8, 4, 2, 2)
        np.copyto(target, source.transpose(0, 3, 4, 5, 2, 7, 1, 6))
    else:
        source = words.view("<u8").reshape(blocks, 2, 8, shape.panels, -1, 2, 4)
        target = out.view("<u8").reshape(blocks, shape.panels, -1, 2, 8, 4, 2)
        np.copyto(target, source.transpose(0, 3, 4, 5, 2, 6, 1))


def _pack_dense(rows: Float, shape: PackedShape) -> Bytes | None:
    """Whole row blocks of float16; None where a weight is not finite in it."""
    blocks = len(rows) // ROW_BLOCK
    halves = rows.astype(np.float16)
    if not np.isfinite(halves).all():
        return None
    # block, row half, g, panel, j // 2, t, j % 2 → block, panel, j // 2, j % 2, g, t, row half
    source = halves.view("<u8").reshape(blocks, 2, 8, shape.panels, 2, 4, 2)
    out = np.empty((blocks, shape.panels, 2, 2, 8, 4, 2), "<u8")
    np.copyto(out, source.transpose(0, 3, 4, 6, 2, 5, 1))
    return out.view(np.uint8).reshape(-1)

"""GGUF's tensor layouts → canonical weights.

Blocks along K, d and m float16 (ggml-common.h; `gguf.quants` is an independent reading):
    Q4_0  18 B of 32    d · nibbles 16                       w = d · (q − 8)
    Q4_1  20 B of 32    d · m · nibbles 16                   w = d · q + m
    Q5_0  22 B of 32    d · bits 4 · nibbles 16              w = d · (q − 16)
    Q5_1  24 B of 32    d · m · bits 4 · nibbles 16          w = d · q + m
    Q8_0  34 B of 32    d · int8 × 32                        w = d · q
    Q4_K  144 B of 256  d · m · s 12 · nibbles 4 × 32        w = d · s[g] · q − m · t[g], g of 32
    Q5_K  176 B of 256  d · m · s 12 · bits 32 · nibbles 4 × 32   likewise
    Q6_K  210 B of 256  nibbles 2 × 64 · pairs 2 × 32 · int8 s × 16 · d   w = d · s[g] · (q − 32), g of 16
A run of `size` bytes of nibbles holds element i in byte i's low half and element i + size in its high half.

Every layout has a canonical form that is exact. One of five or six bits is one of 8 bits whose numbers stay
small; products like d · s[g] are float32, as the formulas are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_tensors import TensorInfo
from edgellm.errors import CheckpointError
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight

PIECE_BYTES: Final = 1 << 20
"""Of the file, unpacked at a time: what is at work stays in the CPU's cache."""

Bytes = NDArray[np.uint8]


def weight(file: GgufFile, info: TensorInfo, *, rotary_heads: int | None = None) -> Weight:
    """The canonical weight of a tensor; nothing is read before its `read()` is called.

    Args:
        rotary_heads: number of heads of a q or k projection whose rows are to be brought from GGUF's order
            (rotary pairs adjacent) to Hugging Face's (rotary halves); None leaves the rows as they are.

    Raises:
        CheckpointError: by `read()`, when a value or scale is not finite, or the file ends too early.
    """

    def rows(begin: int, end: int) -> Bytes:
        if rotary_heads is None:
            return file.read(info, begin, end)
        return _halves(file, info, info.shape[0] // rotary_heads, begin, end)

    kind = info.type.name
    if kind in _DENSE:
        dtype, widen = _DENSE[kind]

        def read_values(begin: int, end: int) -> Float:
            values = widen(rows(begin, end)).reshape(-1, *info.shape[1:])
            return _finite(file, info, values, begin)

        return Dense(info.name, info.shape, dtype, read_values)

    if len(info.shape) != 2:
        raise CheckpointError(
            f"{file.path}: tensor {info.name} is {kind} of shape {info.shape}, not a matrix"
        )
    n, k = info.shape
    layout = _GROUPED[kind]

    def read_groups(begin: int, end: int) -> Groups:
        raw = rows(begin, end)
        groups = _unpacked(raw.reshape(len(raw), -1, info.type.bytes), layout, k)
        _finite(file, info, groups.scale, begin)
        if groups.offset is not None:
            _finite(file, info, groups.offset, begin)
        return groups

    return Grouped(
        info.name,
        (n, k),
        layout.bits,
        layout.group,
        layout.asymmetric,
        read_groups,
        centred=kind == "Q4_0",
        middle=16 if kind in ("Q5_1", "Q5_K") else 0,
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """A grouped type: its canonical form, and how blocks [N, blocks, bytes] become it."""

    bits: Literal[4, 8]
    group: int
    asymmetric: bool
    unpack: Callable[[Bytes], Groups]


def _unpacked(blocks: Bytes, layout: _Layout, k: int) -> Groups:
    """All of the rows, a few at a time."""
    n = len(blocks)
    q = np.empty((n, k), np.uint8 if layout.bits == 4 else np.int8)
    scale = np.empty((n, k // layout.group), np.float32)
    offset: Float | None = None
    zero: Bytes | None = None
    step = max(1, PIECE_BYTES // (blocks.size // n))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        with np.errstate(all="ignore"):  # what is not finite is found by the caller
            piece = layout.unpack(blocks[rows])
        q[rows], scale[rows] = piece.q, piece.scale
        if piece.offset is not None:
            offset = np.empty_like(scale) if offset is None else offset
            offset[rows] = piece.offset
        if piece.zero is not None:
            zero = np.empty(scale.shape, np.uint8) if zero is None else zero
            zero[rows] = piece.zero
    return Groups(q, scale, offset, zero)


def _halves(file: GgufFile, info: TensorInfo, head: int, begin: int, end: int) -> Bytes:
    # convert_hf_to_gguf.py writes row (half, i) of each head at (i, half); this is its inverse, head by head.
    first = begin // head * head
    paired = file.read(info, first, -(-end // head) * head)
    halves: Bytes = paired.reshape(-1, head // 2, 2, paired.shape[1]).swapaxes(1, 2).reshape(paired.shape)
    return halves[begin - first : end - first]


def _finite(file: GgufFile, info: TensorInfo, values: Float, first_row: int) -> Float:
    # A sum is NaN or infinite if any term is; only then is it worth the memory to look at each. (Sums of
    # finite float32 values can overflow too, which the second look clears.)
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(values.sum(dtype=np.float32))
    if suspicious:
        finite = np.isfinite(values)
        if not finite.all():
            row = first_row + int(np.argwhere(~finite)[0][0])
            what = "value" if info.type.elements == 1 else "scale or offset"
            raise CheckpointError(
                f"{file.path}: tensor {info.name} has a {what} in row {row} that is not finite"
            )
    return values


def _f32(raw: Bytes) -> Float:
    return raw.view("<f4").astype(np.float32, copy=False)


def _f16(raw: Bytes) -> Float:
    return raw.view("<f2").astype(np.float32)


def _bf16(raw: Bytes) -> Float:
    values: Float = np.left_shift(raw.view("<u2"), np.uint32(16), dtype=np.uint32).view(np.float32)
    return values


def _q4_0(blocks: Bytes) -> Groups:
    scale = _half_at(blocks, 0)
    return Groups(_nibbles(blocks[..., 2:]), scale, zero=np.full(scale.shape, 8, np.uint8))


def _q4_1(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[..., 4:]), _half_at(blocks, 0), offset=_half_at(blocks, 2))


def _q5_0(blocks: Bytes) -> Groups:
    q = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Groups(q.view(np.int8) - np.int8(16), _half_at(blocks, 0))


def _q5_1(blocks: Bytes) -> Groups:
    q = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Groups(q.view(np.int8), _half_at(blocks, 0), offset=_half_at(blocks, 2))


def _q8_0(blocks: Bytes) -> Groups:
    n = blocks.shape[0]
    q = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(n, -1)
    return Groups(q, _half_at(blocks, 0))


def _q4_k(blocks: Bytes) -> Groups:
    scale, offset = _sub_blocks(blocks)
    return Groups(_nibbles(_runs(blocks[..., 16:], 32)), scale, offset=offset)


def _q5_k(blocks: Bytes) -> Groups:
    n, count, _ = blocks.shape
    scale, offset = _sub_blocks(blocks)
    q = _nibbles(_runs(blocks[..., 48:], 32))
    # Bit g of byte i is the fifth bit of element i of group g.
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> shifts & 1) << 4
    q |= fifth.reshape(n, count * 256)
    return Groups(q.view(np.int8), scale, offset=offset)


def _q6_k(blocks: Bytes) -> Groups:
    n, count, _ = blocks.shape
    q = _nibbles(_runs(blocks[..., :128], 64))
    # Bits 2r and 2r + 1 of byte i of a half are the highest two of its element 32r + i.
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    pairs = blocks[..., 128:192].reshape(n, count, 2, 1, 32)
    q |= ((pairs >> shifts & 3) << 4).reshape(n, count * 256)
    factors = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scale = _half_at(blocks, 208)[..., None] * factors
    return Groups(q.view(np.int8) - np.int8(32), scale.reshape(n, count * 16))


def _sub_blocks(blocks: Bytes) -> tuple[Float, Float]:
    """Scale and offset [N, K / 32] of Q4_K and Q5_K: d · s[g] and −m · t[g].

    s and t are eight numbers of 6 bits each in 12 bytes: those of the first four groups are the low 6 bits of
    bytes 0–3 and 4–7; those of the others have their low 4 bits in the halves of bytes 8–11, and their high 2
    in the bits that the first eight bytes leave.
    """
    n, count, _ = blocks.shape
    first, second, low = (blocks[..., start : start + 4] for start in (4, 8, 12))
    s = np.concatenate([first & 0x3F, low & 0x0F | first >> 2 & 0x30], axis=-1)
    t = np.concatenate([second & 0x3F, low >> 4 | second >> 2 & 0x30], axis=-1)
    scale = _half_at(blocks, 0)[..., None] * s.astype(np.float32)
    offset = -(_half_at(blocks, 2)[..., None] * t.astype(np.float32))
    return scale.reshape(n, count * 8), offset.reshape(n, count * 8)


def _half_at(blocks: Bytes, position: int) -> Float:
    """float32 [N, blocks] from the float16 at this byte of each block."""
    halves = np.ascontiguousarray(blocks[..., position : position + 2])
    return halves.view("<f2")[..., 0].astype(np.float32)


def _runs(packed: Bytes, size: int) -> Bytes:
    """[N, blocks, bytes] → [N, runs, size]."""
    return packed.reshape(len(packed), -1, size)


def _nibbles(packed: Bytes) -> Bytes:
    """uint8 [N, K] from runs [N, runs, size]."""
    n, runs, size = packed.shape
    q = np.empty((n, runs, 2, size), np.uint8)
    np.bitwise_and(packed, 0x0F, out=q[:, :, 0])
    np.right_shift(packed, 4, out=q[:, :, 1])
    return q.reshape(n, runs * 2 * size)


def _fifth_bits(packed: Bytes) -> Bytes:
    """uint8 [N, K], 0 or 16, from [N, K / 32, 4]: bit i of a block's 32 is that of its element i."""
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little")
    sixteens: Bytes = bits << np.uint8(4)
    return sixteens.reshape(len(packed), -1)


_DENSE: Final[dict[str, tuple[Literal["f16", "bf16", "f32"], Callable[[Bytes], Float]]]] = {
    "F32": ("f32", _f32),
    "F16": ("f16", _f16),
    "BF16": ("bf16", _bf16),
}
_GROUPED: Final[dict[str, _Layout]] = {
    "Q4_0": _Layout(4, 32, True, _q4_0),
    "Q4_1": _Layout(4, 32, True, _q4_1),
    "Q5_0": _Layout(8, 32, False, _q5_0),
    "Q5_1": _Layout(8, 32, True, _q5_1),
    "Q8_0": _Layout(8, 32, False, _q8_0),
    "Q4_K": _Layout(4, 32, True, _q4_k),
    "Q5_K": _Layout(8, 32, True, _q5_k),
    "Q6_K": _Layout(8, 16, False, _q6_k),
}

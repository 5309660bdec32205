"""GGUF's tensor layouts → canonical weights.

Blocks of 32 along K, d and m float16 (ggml-common.h; `gguf.quants` is an independent reading):
    Q4_0  18 bytes: d · 16 bytes of nibbles       w = d · (q − 8)
    Q4_1  20 bytes: d · m · 16 bytes of nibbles   w = d · q + m
    Q8_0  34 bytes: d · 32 int8                   w = d · q
Byte i of the nibbles holds element i in its low half and element i + 16 in its high half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.gguf import GgufFile, TensorInfo
from edgellm.errors import CheckpointError
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight

GROUP: Final = 32

Bytes = NDArray[np.uint8]


def weight(file: GgufFile, info: TensorInfo, *, rotary_heads: int | None = None) -> Weight:
    """The canonical weight of a tensor; nothing is read before its `read()` is called.

    Args:
        rotary_heads: number of heads of a q or k projection whose rows are to be brought from GGUF's order
            (rotary pairs adjacent) to Hugging Face's (rotary halves); None leaves the rows as they are.

    Raises:
        CheckpointError: by `read()`, when a value or scale is not finite, or the file ends too early.
    """

    def rows() -> Bytes:
        raw = file.read(info)
        return raw if rotary_heads is None else _halves(raw, info, rotary_heads)

    kind = info.type.name
    if kind in _DENSE:
        dtype, widen = _DENSE[kind]
        return Dense(
            info.name, info.shape, dtype, lambda: _finite(file, info, widen(rows()).reshape(info.shape))
        )

    if len(info.shape) != 2:
        raise CheckpointError(
            f"{file.path}: tensor {info.name} is {kind} of shape {info.shape}, not a matrix"
        )
    n, k = info.shape
    bits, asymmetric, unpack = _GROUPED[kind]

    def read() -> Groups:
        raw = rows()
        groups = unpack(raw.reshape(raw.shape[0], -1, info.type.bytes))
        _finite(file, info, groups.scale)
        if groups.offset is not None:
            _finite(file, info, groups.offset)
        return groups

    return Grouped(info.name, (n, k), bits, GROUP, asymmetric, read, centred=kind == "Q4_0")


def _halves(raw: Bytes, info: TensorInfo, heads: int) -> Bytes:
    # convert_hf_to_gguf.py writes row (half, i) of each head at (i, half); this is its inverse.
    n = info.shape[0]
    row_bytes = raw.size // n
    paired = raw.reshape(heads, n // heads // 2, 2, row_bytes)
    halves: Bytes = paired.swapaxes(1, 2).reshape(n, row_bytes)
    return halves


def _finite(file: GgufFile, info: TensorInfo, values: Float) -> Float:
    # A sum is NaN or infinite if any term is; only then is it worth the memory to look at each. (Sums of
    # finite float32 values can overflow too, which the second look clears.)
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(values.sum(dtype=np.float32))
    if suspicious:
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
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
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Groups:
    scale = _half_at(blocks, 0)
    return Groups(_nibbles(blocks[..., 2:]), scale, zero=np.full(scale.shape, 8, np.uint8))


def _q4_1(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[..., 4:]), _half_at(blocks, 0), offset=_half_at(blocks, 2))


def _q8_0(blocks: Bytes) -> Groups:
    n = blocks.shape[0]
    q = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(n, -1)
    return Groups(q, _half_at(blocks, 0))


def _half_at(blocks: Bytes, position: int) -> Float:
    """float32 [N, K / 32] from the float16 at this byte of each block."""
    halves = np.ascontiguousarray(blocks[..., position : position + 2])
    return halves.view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """uint8 [N, K] from [N, K / 32, 16]."""
    n, groups, _ = packed.shape
    q = np.empty((n, groups, 2, 16), np.uint8)
    np.bitwise_and(packed, 0x0F, out=q[:, :, 0])
    np.right_shift(packed, 4, out=q[:, :, 1])
    return q.reshape(n, groups * GROUP)


_DENSE: Final[dict[str, tuple[Literal["f16", "bf16", "f32"], Callable[[Bytes], Float]]]] = {
    "F32": ("f32", _f32),
    "F16": ("f16", _f16),
    "BF16": ("bf16", _bf16),
}
_GROUPED: Final[dict[str, tuple[Literal[4, 8], bool, Callable[[Bytes], Groups]]]] = {
    "Q4_0": (4, True, _q4_0),
    "Q4_1": (4, True, _q4_1),
    "Q8_0": (8, False, _q8_0),
}

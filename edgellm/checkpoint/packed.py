"""What the packed layouts of safetensors checkpoints have in common: words of 4- or 8-bit numbers, groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.safetensors import ALL, SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.weights import Dense, Float, Grouped, Groups

FLOATS: Final = ("F16", "BF16", "F32")
_DENSE: Final = {"F16": "f16", "BF16": "bf16", "F32": "f32"}

_ROWS: Final = 16
_STRIP: Final = 64

Bytes = NDArray[np.uint8]


class Packing(Protocol):
    """A layout of quantized linear layers."""

    @property
    def quant_algo(self) -> str:
        """TensorRT-LLM's name of it."""
        ...

    @property
    def suffixes(self) -> Sequence[str]:
        """What a layer's tensors may be called after its name; the first is there if the layer is packed."""
        ...

    def weight(self, model: SafetensorsModel, layer: str, shape: tuple[int, int]) -> Grouped:
        """The weight [N, K] of a layer that has the first suffix; nothing large is read yet.

        Raises:
            CheckpointError: a tensor is missing or of another shape or type; by `read()`, when a scale is not
                finite.
        """
        ...


def dense(model: SafetensorsModel, name: str, shape: tuple[int, ...]) -> Dense:
    """An unquantized tensor as a weight.

    Raises:
        CheckpointError: it is missing or of another shape or type; by `read()`, when a value is not finite.
    """
    require(model, name, shape, FLOATS)
    dtype: Any = _DENSE[model.tensors[name].dtype]
    return Dense(name, shape, dtype, lambda begin, end: floats(model, name, slice(begin, end)))


def stacked(model: SafetensorsModel, name: str, shape: tuple[int, int, int]) -> Dense:
    """Unquantized matrices [E, N, K] of one tensor as a weight [E · N, K].

    Raises:
        CheckpointError: as for `dense`.
    """
    require(model, name, shape, FLOATS)
    dtype: Any = _DENSE[model.tensors[name].dtype]
    count, n, k = shape

    def read_rows(begin: int, end: int) -> Float:
        matrices, inside = words_around(begin, end, n)
        return floats(model, name, matrices).reshape(-1, k)[inside]

    return Dense(name, (count * n, k), dtype, read_rows)


def require(model: SafetensorsModel, name: str, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    """Check that a tensor is there, of this shape and of one of these types.

    Raises:
        CheckpointError: it is not; both shapes or types are named.
    """
    info = model.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{model.path} has no tensor {name}")
    if info.shape != shape:
        raise CheckpointError(
            f"{model.where(name)} has shape {list(info.shape)}, config.json says {list(shape)}"
        )
    if info.dtype not in dtypes:
        raise CheckpointError(f"{model.where(name)} is {info.dtype}, which should be {' or '.join(dtypes)}")


def floats(model: SafetensorsModel, name: str, rows: slice = ALL, columns: slice = ALL) -> Float:
    """A tensor of numbers, or a part of it, as float32, exactly.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    raw = model.read(name, rows, columns)
    if model.tensors[name].dtype == "BF16":
        raw = np.left_shift(raw, np.uint32(16), dtype=np.uint32).view(np.float32)
    values: Float = raw.astype(np.float32, copy=False)
    # A sum is NaN or infinite if any term is; only then is it worth the memory to look at each. (Sums of
    # finite float32 values can overflow too, which the second look clears.)
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(values.sum(dtype=np.float32))
    if suspicious:
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            first = [part.start or 0 for part in (rows, columns)]
            at = [int(place) + begin for place, begin in zip(bad[0], first, strict=False)]
            raise CheckpointError(f"{model.where(name)} has a value that is not finite, at {at}")
    return values


def words(model: SafetensorsModel, name: str, rows: slice = ALL, columns: slice = ALL) -> NDArray[np.int32]:
    """A tensor of packed words, or a part of it, checked before."""
    packed: NDArray[np.int32] = model.read(name, rows, columns)
    return packed


def words_around(begin: int, end: int, in_word: int) -> tuple[slice, slice]:
    """The words that hold numbers begin … end − 1, and where in these words' numbers those are."""
    first = begin // in_word
    return slice(first, -(-end // in_word)), slice(begin - first * in_word, end - first * in_word)


def unpack(packed: NDArray[np.int32], bits: int) -> Bytes:
    """uint8 [R, C · 32 / bits] from int32 [R, C]: the numbers of a word, lowest bits first, side by side."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return raw
    # A packed byte is hi << 4 | lo; the little-endian word hi << 8 | lo is its two numbers side by side.
    pairs = np.empty(raw.shape, "<u2")
    for begin in range(0, len(raw), _ROWS):
        some = pairs[begin : begin + _ROWS]
        some[...] = raw[begin : begin + _ROWS]
        some |= some << 4
        some &= 0x0F0F
    return pairs.view(np.uint8)


def transposed(packed: NDArray[np.int32]) -> NDArray[np.int32]:
    """A contiguous transpose, in strips that stay in the processor's cache: much faster than numpy's."""
    turned = np.empty(packed.shape[::-1], packed.dtype)
    for begin in range(0, len(packed), _STRIP):
        turned[:, begin : begin + _STRIP] = packed[begin : begin + _STRIP].T
    return turned


def canonical(q: Bytes, scale: Float, zero: NDArray[np.int16], bits: int, *, symmetric: bool) -> Groups:
    """The arrays of unsigned numbers with zero points; 8 bits become signed, as `Groups` has them.

    Args:
        symmetric: every zero point is the middle of the range.
    """
    if bits == 4:
        return Groups(q, scale, zero=zero)
    signed = (q ^ np.uint8(0x80)).view(np.int8)
    return Groups(signed, scale, zero=None if symmetric else zero - np.int16(128))


def as_grouped(
    name: str,
    shape: tuple[int, int],
    bits: Literal[4, 8],
    group: int,
    read_rows: Callable[[int, int], Groups],
    *,
    symmetric: bool,
    perm: NDArray[np.int32] | None,
) -> Grouped:
    """A weight whose `read_rows` gives what `canonical` makes, `symmetric` being the same for both."""
    return Grouped(
        name,
        shape,
        bits,
        group,
        asymmetric=bits == 4 or not symmetric,
        read_rows=read_rows,
        centred=bits == 4 and symmetric,
        perm=perm,
    )


def check_group(where: str, group: int, columns: int) -> int:
    """The size of a group, −1 being the whole row.

    Raises:
        CheckpointError: it does not divide the row.
    """
    if group == -1:
        return columns
    if group < 1 or columns % group:
        raise CheckpointError(f"{where}: groups of {group} do not divide {columns} columns")
    return group


def order_of_groups(model: SafetensorsModel, name: str, group: int) -> NDArray[np.int32] | None:
    """The columns [K], group by group, of a tensor that has each column's group; None: they are in order.

    Raises:
        CheckpointError: a group has too few or too many columns.
    """
    of_column = model.read(name)
    columns = len(of_column)
    if (of_column == np.arange(columns) // group).all():
        return None
    groups = columns // group
    beyond = of_column[(of_column < 0) | (of_column >= groups)]
    if len(beyond):
        raise CheckpointError(f"{model.where(name)} has group {beyond[0]}, but there are {groups}")
    sizes = np.bincount(of_column, minlength=groups)
    if (sizes != group).any():
        uneven = int(np.flatnonzero(sizes != group)[0])
        raise CheckpointError(
            f"{model.where(name)}: group {uneven} has {sizes[uneven]} columns, where edgellm wants {group}"
        )
    return np.argsort(of_column, kind="stable").astype(np.int32)

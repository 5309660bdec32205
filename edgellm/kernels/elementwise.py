"""Embedding, RMSNorm, the last row of a chunk, a permutation of columns: launches of `elementwise.cu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.norm import NormAhead
from edgellm.model.weights import Dense, Weight

_SOURCE: Final = "elementwise.cu"
_THREADS: Final = 128
_ROW_THREADS: Final = 256

TableKind = Literal["f32", "f16", "bf16", "int8", "int4"]
_CPP_KIND: Final[dict[TableKind, str]] = {
    "f32": "FLOAT32",
    "f16": "FLOAT16",
    "bf16": "BFLOAT16",
    "int8": "INT8",
    "int4": "INT4",
}
_BITS: Final[dict[TableKind, int]] = {"f32": 32, "f16": 16, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding matrix as the device holds it, row-major, in the checkpoint's own precision.

    Elements (4 bits: the lower element in the lower nibble), and float16 scales and offsets, both
    [vocab, hidden / group]; w = scale · q + offset.

    Attributes:
        kind: of the elements.
        vocab, hidden: rows and columns.
        group: columns that share a scale; equal to hidden where there are none.
        offsets: whether there are offsets.
    """

    kind: TableKind
    vocab: int
    hidden: int
    group: int
    offsets: bool

    @property
    def element_bytes(self) -> int:
        """Bytes of all elements."""
        return self.vocab * self.hidden * _BITS[self.kind] // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales, which is also what the offsets take where there are some."""
        return self.vocab * (self.hidden // self.group) * 2 if self.kind in ("int8", "int4") else 0

    def expression(self, name: str) -> str:
        """The kernel `name`'s C++ name for this table."""
        offsets = "true" if self.offsets else "false"
        return f"{name}<{_CPP_KIND[self.kind]}, {self.hidden}, {self.group}, {offsets}>"


def table_of(weight: Weight) -> Table:
    """How an embedding is stored.

    Raises:
        BuildError: rows are not a multiple of 16 columns, groups not of 4, or columns are in another order.
    """
    vocab, hidden = weight.shape[0], weight.shape[1]
    if hidden % 16:
        raise BuildError(f"{weight.name} has {hidden} columns; CUDA kernels need a multiple of 16")
    if isinstance(weight, Dense):
        return Table(weight.dtype, vocab, hidden, hidden, False)
    if weight.group % 4:
        raise BuildError(f"{weight.name} has groups of {weight.group}; an embedding needs a multiple of 4")
    if weight.perm is not None:
        raise BuildError(f"{weight.name} has its columns in another order (act-order); an embedding cannot")
    return Table("int8" if weight.bits == 8 else "int4", vocab, hidden, weight.group, weight.asymmetric)


class TableRows(NamedTuple):
    """Some rows of a table, as the device's three arrays hold them; flat."""

    elements: NDArray[np.uint8]
    scales: NDArray[np.float16] | None = None
    offsets: NDArray[np.float16] | None = None


def table_rows(weight: Weight) -> Iterator[TableRows]:
    """The table, some rows at a time, in order. Products of scales (K-quants) are rounded to float16 once."""
    for begin, end in weight.blocks():
        if isinstance(weight, Dense):
            yield TableRows(_dense_bytes(weight.read(begin, end), weight.dtype))
            continue
        groups = weight.read(begin, end)
        if weight.bits == 8:
            elements = np.ascontiguousarray(groups.q).view(np.uint8)
        else:
            high = np.left_shift(groups.q[:, 1::2].astype(np.uint8), 4, dtype=np.uint8)
            elements = np.bitwise_or(groups.q[:, ::2].astype(np.uint8), high)
        offsets = groups.offsets().astype(np.float16).reshape(-1) if weight.asymmetric else None
        yield TableRows(elements.reshape(-1), groups.scale.astype(np.float16).reshape(-1), offsets)


def _dense_bytes(rows: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    if dtype == "bf16":
        # Exact: the reader widened 16 bits to 32, the lower of which are 0.
        return np.ascontiguousarray((rows.view(np.uint32) >> 16).astype("<u2")).view(np.uint8).reshape(-1)
    return np.ascontiguousarray(rows, "<f2" if dtype == "f16" else "<f4").view(np.uint8).reshape(-1)


def embed_rows(
    table: Table,
    *,
    rows: int,
    rows_at: At,
    last_token: At,
    elements: At,
    scales: At | None,
    offsets: At | None,
    out: At,
    epsilon: float,
    ahead: NormAhead,
) -> list[Launch]:
    """A decode step's residual: out float32 [rows, hidden] of the rows' tokens, or those sampled last.

    Args:
        epsilon: of the norm behind.
        ahead: what it wants, scales among it.
    """
    arguments = (rows_at, last_token, elements, scales, offsets, epsilon, out, *ahead.arguments)
    return [Launch(_row_kernel(table.expression("embed_rows")), (rows, 1, 1), arguments)]


def embed_chunk(
    table: Table,
    *,
    tokens: int,
    chunk: At,
    ids: At,
    elements: At,
    scales: At | None,
    offsets: At | None,
    out: At,
) -> list[Launch]:
    """A chunk's residual: out float32 [tokens, hidden] of its ids; rows past its count stay as they are."""
    kernel = Kernel(_SOURCE, table.expression("embed_chunk"), _THREADS)
    grid = (_blocks(table.hidden // 4), tokens, 1)
    return [Launch(kernel, grid, (chunk, ids, elements, scales, offsets, out))]


def rms_norm(
    hidden: int,
    *,
    rows: int,
    x: At,
    gain: At,
    epsilon: float,
    out: At,
    chunk: At | None = None,
    scales: At | None = None,
) -> list[Launch]:
    """out float16 [rows, hidden] = x · gain / sqrt(mean(x²) + epsilon); x and gain float32.

    Args:
        chunk: rows past its count stay as they are; None: all are computed.
        scales: float32 [rows], written for the norm behind, see `NormAhead`; None: nobody needs them.
    """
    kernel = _row_kernel(f"rms_norm<{hidden}>")
    return [Launch(kernel, (rows, 1, 1), (chunk, x, gain, epsilon, out, scales))]


def last_row(
    hidden: int,
    width: int,
    *,
    chunk: At,
    x: At,
    h: At,
    epsilon: float,
    x_out: At,
    h_out: At,
    scales: At,
) -> list[Launch]:
    """A chunk's last row of the residual x float32 [tokens, hidden] and of h float16 [tokens, width], and its
    scale for the norm behind, see `NormAhead`."""
    kernel = _row_kernel(f"last_row<{hidden}, {width}>")
    return [Launch(kernel, (1, 1, 1), (chunk, x, h, epsilon, x_out, h_out, scales))]


def permute_columns(k: int, *, rows: int, order: At, x: At, out: At) -> list[Launch]:
    """out[row, i] = x[row, order[i]], float16 [rows, k], order int32 [k]: see `Grouped.perm`."""
    kernel = Kernel(_SOURCE, f"permute_columns<{k}>", _THREADS)
    return [Launch(kernel, (_blocks(k), rows, 1), (order, x, out))]


def _row_kernel(expression: str) -> Kernel:
    """A kernel with a block for each row, whose threads are its last template argument."""
    return Kernel(_SOURCE, f"{expression[:-1]}, {_ROW_THREADS}>", _ROW_THREADS)


def _blocks(threads: int) -> int:
    return -(-threads // _THREADS)

"""The embedding table's bytes: read back by the documented layout, they are the checkpoint's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from edgellm.cuda.launch import At
from edgellm.errors import BuildError
from edgellm.kernels.elementwise import embed_chunk, embed_rows, table_of, table_rows
from edgellm.kernels.norm import NormAhead
from edgellm.model.weights import Dense, Grouped, Groups

VOCAB, HIDDEN, GROUP = 40, 64, 16


def grouped(bits: Literal[4, 8], *, asymmetric: bool, seed: int = 0) -> Grouped:
    rng = np.random.default_rng(seed)
    q: NDArray[np.uint8] | NDArray[np.int8]
    if bits == 4:
        q = rng.integers(0, 16, (VOCAB, HIDDEN)).astype(np.uint8)
    else:
        q = rng.integers(-128, 128, (VOCAB, HIDDEN)).astype(np.int8)
    scale, offset = (
        rng.normal(size=(VOCAB, HIDDEN // GROUP)).astype(np.float16).astype(np.float32) for _ in "so"
    )
    groups = Groups(q, scale, offset if asymmetric else None)
    return Grouped("embed_tokens", (VOCAB, HIDDEN), bits, GROUP, asymmetric, groups.rows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_group_wise_table_reads_back_as_the_weight(bits: Literal[4, 8], asymmetric: bool) -> None:
    weight = grouped(bits, asymmetric=asymmetric)
    table = table_of(weight)
    parts = list(table_rows(weight))
    raw = np.concatenate([part.elements for part in parts])
    scales, offsets = parts[0].scales, parts[0].offsets
    assert len(parts) == 1
    assert scales is not None
    assert (raw.nbytes, scales.nbytes) == (table.element_bytes, table.scale_bytes)
    if bits == 4:
        q = np.stack([raw & 15, raw >> 4], -1).reshape(VOCAB, HIDDEN).astype(np.float32)
    else:
        q = raw.view(np.int8).reshape(VOCAB, HIDDEN).astype(np.float32)
    w = q * np.repeat(scales.astype(np.float32), GROUP).reshape(VOCAB, HIDDEN)
    if offsets is not None:
        w = w + np.repeat(offsets.astype(np.float32), GROUP).reshape(VOCAB, HIDDEN)
    np.testing.assert_allclose(w, weight.dequantize(), rtol=1e-6)
    assert (offsets is not None) == asymmetric == table.offsets


@pytest.mark.parametrize(
    ("dtype", "widen"),
    [
        ("f16", lambda raw: raw.view("<f2").astype(np.float32)),
        ("bf16", lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)),
        ("f32", lambda raw: raw.view("<f4")),
    ],
)
def test_a_dense_table_keeps_every_bit(
    dtype: Literal["f16", "bf16", "f32"], widen: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
) -> None:
    values = np.random.default_rng(1).normal(size=(VOCAB, HIDDEN)).astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    weight = Dense("embed_tokens", values.shape, dtype, lambda begin, end: values[begin:end])
    raw = np.concatenate([part.elements for part in table_rows(weight)])
    assert raw.nbytes == table_of(weight).element_bytes
    np.testing.assert_array_equal(widen(raw).reshape(VOCAB, HIDDEN), values)


def test_what_the_kernel_cannot_read_is_refused_by_name() -> None:
    odd = Dense(
        "embed_tokens", (VOCAB, 60), "f16", lambda begin, end: np.zeros((VOCAB, 60), np.float32)[begin:end]
    )
    with pytest.raises(BuildError, match="embed_tokens has 60 columns"):
        table_of(odd)


def test_the_grid_reaches_every_element() -> None:
    table = table_of(grouped(4, asymmetric=True))
    at = At("x")
    places = {"elements": at, "scales": at, "offsets": at, "out": at}
    ahead = NormAhead(at, at, at, at)
    (launch,) = embed_rows(table, rows=3, rows_at=at, last_token=at, epsilon=1e-6, ahead=ahead, **places)
    assert launch.grid == (3, 1, 1)
    (launch,) = embed_chunk(table, tokens=3, chunk=at, ids=at, **places)
    assert launch.grid[0] * launch.kernel.threads * 4 >= HIDDEN
    assert launch.grid[1] == 3

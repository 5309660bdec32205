"""Every block type against the `gguf` package's own reading of it, from random bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_blocks import BLOCK_TYPES, random_blocks
from numpy.typing import NDArray

from edgellm.checkpoint import gguf_layouts
from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_layouts import weight
from edgellm.checkpoint.gguf_tensors import TENSOR_TYPES
from edgellm.errors import CheckpointError
from edgellm.model.weights import Grouped, Weight

SHAPE = (12, 768)
CANONICAL = {
    "Q4_0": (4, 32, True),
    "Q4_1": (4, 32, True),
    "Q5_0": (8, 32, False),
    "Q5_1": (8, 32, True),
    "Q8_0": (8, 32, False),
    "Q4_K": (4, 32, True),
    "Q5_K": (8, 32, True),
    "Q6_K": (8, 16, False),
}


def _written(path: Path, kind: str, raw: NDArray[np.uint8]) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def _read(path: Path, kind: str, raw: NDArray[np.uint8], *, rotary_heads: int | None = None) -> Weight:
    file = _written(path, kind, raw)
    return weight(file, file.tensors["a"], rotary_heads=rotary_heads)


def test_the_table_of_types_is_the_gguf_packages() -> None:
    for code, kind in TENSOR_TYPES.items():
        known = gguf.GGMLQuantizationType(code)
        assert (kind.name, (kind.elements, kind.bytes)) == (known.name, gguf.GGML_QUANT_SIZES[known])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("pieces", [False, True])
def test_values_are_the_gguf_packages_bit_for_bit(
    kind: str, pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:  # of a few rows, and a last one of fewer
        monkeypatch.setattr(gguf_layouts, "PIECE_BYTES", 5 * SHAPE[1])
    raw = random_blocks(kind, SHAPE, 1.0, seed=4)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert 0.8 < expected.std() < 1.25
    assert abs(expected.mean()) < 0.15
    np.testing.assert_array_equal(_read(tmp_path / "a.gguf", kind, raw).dequantize(), expected)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_canonical_form(kind: str, tmp_path: Path) -> None:
    found = _read(tmp_path / "a.gguf", kind, random_blocks(kind, SHAPE, 1.0, seed=5))
    assert isinstance(found, Grouped)
    assert (found.bits, found.group, found.asymmetric) == CANONICAL[kind]
    groups = found.read()
    assert groups.q.shape == SHAPE
    assert groups.q.dtype == (np.uint8 if found.bits == 4 else np.int8)
    assert groups.scale.shape == (SHAPE[0], SHAPE[1] // found.group)
    assert groups.q.flags.c_contiguous


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_of_rotary_heads_are_reordered_whole(kind: str, tmp_path: Path) -> None:
    raw = random_blocks(kind, SHAPE, 1.0, seed=6)
    plain = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    # Two heads of six rows: pairs (0, 1), (2, 3), (4, 5) become halves.
    expected = plain[[0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]]
    found = _read(tmp_path / "a.gguf", kind, raw, rotary_heads=2)
    np.testing.assert_array_equal(found.dequantize(), expected)
    for begin, end in itertools.combinations(range(SHAPE[0] + 1), 2):
        np.testing.assert_array_equal(found.dequantize(begin, end), expected[begin:end])


@pytest.mark.parametrize(
    ("kind", "at"), [("Q4_K", 0), ("Q4_K", 2), ("Q5_K", 2), ("Q6_K", 208), ("Q5_0", 0), ("Q5_1", 2)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_factor_that_is_not_finite_is_named(kind: str, at: int, bad: float, tmp_path: Path) -> None:
    raw = random_blocks(kind, SHAPE, 1.0, seed=7)
    raw[3, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
    with pytest.raises(CheckpointError, match="tensor a has a scale or offset in row 3 that is not finite"):
        _read(tmp_path / "a.gguf", kind, raw).read()
    with pytest.raises(CheckpointError, match="in row 3 that"):
        _read(tmp_path / "a.gguf", kind, raw).read(2, 5)

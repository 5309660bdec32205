"""The safetensors reader against the `safetensors` package, and files that are not what they should be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from edgellm.checkpoint.safetensors import INDEX, SINGLE, SafetensorsFile, SafetensorsModel
from edgellm.errors import CheckpointError

WEIGHTS: dict[str, NDArray[Any]] = {
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "f16": np.linspace(-1, 1, 8).astype(np.float16),
    "i64": np.array([-(2**40)], np.int64),
    "empty": np.zeros((0, 4), np.uint8),
}


def raw_file(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """A file from its parts, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


KINDS = st.sampled_from([np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8])


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        KINDS.flatmap(
            lambda kind: arrays.arrays(
                kind, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
            )
        ),
        max_size=5,
    ),
    metadata=st.none() | st.just({"format": "pt"}),
)
def test_what_the_package_writes_is_read(
    tensors: dict[str, Any], metadata: dict[str, str] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / SINGLE
    safetensors.numpy.save_file(tensors, path, metadata)
    file = SafetensorsFile(path)
    assert set(file.tensors) == set(tensors)
    for name, values in tensors.items():
        got = file.read(name)
        assert got.dtype == values.dtype
        assert got.shape == values.shape
        assert got.tobytes() == values.tobytes()


@given(values=arrays.arrays(np.int32, (7, 5), unique=True), data=st.data())
def test_a_part_of_a_matrix(
    values: NDArray[np.int32], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / SINGLE
    safetensors.numpy.save_file({"a": values, "b": values}, path)
    numbers = st.integers(0, 7)
    rows, columns = (slice(*sorted(data.draw(st.tuples(numbers, numbers)))) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "edgellm.checkpoint.safetensors.PIECE_BYTES", data.draw(st.sampled_from([1, 45, 1 << 20]))
        )
        file = SafetensorsFile(path)
        np.testing.assert_array_equal(file.read("b", rows), values[rows])
        np.testing.assert_array_equal(file.read("b", rows, columns), values[rows, columns])
        np.testing.assert_array_equal(file.read("b", columns=columns), values[:, columns])


def test_bfloat16_comes_as_its_bits(tmp_path: Path) -> None:
    # The upper halves of float32's 1.5 and -3.0.
    bits = np.array([[0x3FC0, 0xC040]], "<u2")
    raw_file(tmp_path / SINGLE, {"w": entry("BF16", [1, 2], 0, 4)}, bits.tobytes())
    assert (SafetensorsFile(tmp_path / SINGLE).read("w") == bits).all()


GOOD = entry("F32", [2], 0, 8)
BAD_FILES: list[tuple[dict[str, Any] | bytes, bytes, str]] = [
    ({"a": GOOD}, bytes(4), "tensor a ends at byte"),
    ({"a": GOOD}, bytes(9), "1 of its bytes belong to no tensor"),
    ({"a": GOOD, "b": entry("F32", [2], 4, 12)}, bytes(12), "a and b overlap"),
    ({"a": entry("F32", [3], 0, 8)}, bytes(8), "tensor a, F32 of shape .3., takes 12 bytes"),
    ({"a": entry("F8_E4M3", [8], 0, 8)}, bytes(8), "tensor a as F8_E4M3"),
    ({"a": entry("F32", [-2], 0, 8)}, bytes(8), "tensor a has shape"),
    ({"a": entry("F32", [True, 2], 0, 8)}, bytes(8), "tensor a has shape"),
    ({"a": entry("F32", [2.0], 0, 8)}, bytes(8), "tensor a has shape"),
    ({"a": entry("F32", [1 << 62, 4], 0, 8)}, bytes(8), "takes"),
    ({"a": entry("F32", [2], 8, 0)}, bytes(8), "span -8"),
    ({"a": {"dtype": "F32"}}, bytes(8), "tensor a has no"),
    ({"a": 3}, b"", "tensor a has no"),
    (b"[]", b"", "not a JSON object"),
    (b"{", b"", "not JSON"),
    (b"\xff\xff", b"", "not JSON"),
    (b"[" * 100_000, b"", "not JSON"),
    (b'{"a": 1' + b"0" * 5000 + b"}", b"", "not JSON"),
    (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', b"x", "has a twice"),
]


@pytest.mark.parametrize(("header", "data", "named"), BAD_FILES)
def test_a_damaged_file_is_refused_by_name(
    header: dict[str, Any] | bytes, data: bytes, named: str, tmp_path: Path
) -> None:
    path = raw_file(tmp_path / SINGLE, header, data)
    with pytest.raises(CheckpointError, match=named) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "0 bytes"),
        ((1 << 30).to_bytes(8, "little") + b"{}", "1073741824 bytes"),
        (((1 << 64) - 1).to_bytes(8, "little") + b"{}", "18446744073709551615 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "header ends at byte 1008"),
    ],
)
def test_a_header_that_is_too_long(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        SafetensorsFile(tmp_path / SINGLE)


@given(cut=st.integers(0, 400), flip=st.integers(0, 255))
def test_no_cut_and_no_flipped_byte_is_more_than_an_error(
    cut: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / SINGLE
    raw = bytearray(safetensors.numpy.save(WEIGHTS))
    raw[cut % len(raw)] ^= flip
    path.write_bytes(raw[: len(raw) - cut // 4] if cut % 3 else raw)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).nbytes == info.size


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    safetensors.numpy.save_file(WEIGHTS, tmp_path / SINGLE)
    file = SafetensorsFile(tmp_path / SINGLE)
    os.truncate(tmp_path / SINGLE, file.tensors["f32"].offset)
    with pytest.raises(CheckpointError, match="ends inside tensor f32"):
        file.read("f32")


def shards(directory: Path, weight_map: dict[str, Any] | None = None) -> Path:
    """A model in two shards."""
    safetensors.numpy.save_file({"f32": WEIGHTS["f32"]}, directory / "a.safetensors")
    safetensors.numpy.save_file({"f16": WEIGHTS["f16"]}, directory / "b.safetensors")
    if weight_map is None:
        weight_map = {"f32": "a.safetensors", "f16": "b.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    return directory


def test_shards(tmp_path: Path) -> None:
    model = SafetensorsModel(shards(tmp_path))
    for name in ("f32", "f16"):
        assert (model.read(name) == WEIGHTS[name]).all()
    assert model.where("f16") == f"{tmp_path / 'b.safetensors'}: tensor f16"


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"f32": "a.safetensors", "f16": "c.safetensors"}, "no c.safetensors.*f16"),
        ({"f32": "b.safetensors", "f16": "b.safetensors"}, "b.safetensors has tensor f32, but it has not"),
        ({"f32": "a.safetensors", "f16": "b.safetensors", "x": "a.safetensors"}, "tensor x"),
        ({"f32": "a.safetensors"} | {"f16": "../b.safetensors"}, "not the name of a file"),
        ({"f32": 3}, "not the name of a file"),
        ({"f32": ["a.safetensors"]}, "not the name of a file"),
        ({"f32": "model.bin"}, "pickle"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_is_wrong(weight_map: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        SafetensorsModel(shards(tmp_path, weight_map))


def test_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    safetensors.numpy.save_file(
        {"f32": WEIGHTS["f32"], "y": WEIGHTS["f16"]}, shards(tmp_path) / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"a\.safetensors has tensor y, which .* nowhere"):
        SafetensorsModel(tmp_path)


def test_one_file_by_another_name(tmp_path: Path) -> None:
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert set(SafetensorsModel(tmp_path).tensors) == set(WEIGHTS)


def test_shards_without_an_index(tmp_path: Path) -> None:
    (shards(tmp_path) / INDEX).unlink()
    with pytest.raises(CheckpointError, match="2 safetensors files and no"):
        SafetensorsModel(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_unread(name: str, tmp_path: Path) -> None:
    # Unpickling this would raise something else.
    (tmp_path / name).write_bytes(b"cos\n_exit\n(I1\ntR.")
    with pytest.raises(CheckpointError, match=f"{name} is a pickle file"):
        SafetensorsModel(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        SafetensorsModel(tmp_path)

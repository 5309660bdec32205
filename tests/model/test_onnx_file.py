"""What OnnxFile writes, read back by the onnx package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.model.onnx_file import ALIGNMENT, INLINE_BYTES, OnnxFile


def test_the_onnx_package_reads_back_what_was_written(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    written = {
        "small": np.arange(5, dtype=np.int64),
        "border": np.zeros(INLINE_BYTES, np.uint8),
        "large": chance.standard_normal((100, 7)).astype(np.float32),
        "half": chance.standard_normal((300, 9)).astype(np.float16),
        "bytes": chance.integers(0, 256, (33, 65), np.uint8),
        "not contiguous": chance.standard_normal((64, 32)).astype(np.float32).T,
        "scalar": np.array(3, np.int32),
    }
    file = OnnxFile(tmp_path / "m.onnx")
    for name, array in written.items():
        assert file.constant(name, array) == name
    file.alias("large again", "large", (7, 100))
    file.alias("small again", "small", (1, 5))
    file.node("Identity", [file.input("x", np.float32, ["N", 2])], [file.output("y", np.float32, ["N", 2])])
    file.close()

    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    read = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, array in written.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)
        assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read["large again"], written["large"].reshape(7, 100))
    np.testing.assert_array_equal(read["small again"], written["small"].reshape(1, 5))


def test_large_tensors_lie_at_page_borders_and_are_not_in_the_graph(tmp_path: Path) -> None:
    file = OnnxFile(tmp_path / "m.onnx")
    for i in range(3):
        file.constant(f"t{i}", np.full(5000 + i, i, np.uint8))
    file.alias("again", "t1", (5001, 1))
    file.close()
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    offsets = [int(places[f"t{i}"]["offset"]) for i in range(3)]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert len(set(offsets)) == 3
    assert places["again"] == places["t1"]
    assert (tmp_path / "m.onnx").stat().st_size < 1000


def test_a_name_is_added_once(tmp_path: Path) -> None:
    file = OnnxFile(tmp_path / "m.onnx")
    file.constant("a", np.zeros(3, np.float32))
    file.constant("a", np.ones(3, np.float32))
    file.close()
    (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), np.zeros(3))


def test_nowhere_to_write_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OnnxFile(tmp_path / "missing" / "m.onnx")


def test_tensors_are_filled_side_by_side_and_rows_of_zeros_take_no_room(tmp_path: Path) -> None:
    first = np.random.default_rng(1).standard_normal((40, 50)).astype(np.float32)
    second = np.concatenate([np.zeros((4000, 8)), np.ones((1, 8)), np.zeros((4000, 8))]).astype(np.float32)
    file = OnnxFile(tmp_path / "m.onnx")
    rows = [file.rows("first", np.float32, first.shape), file.rows("second", np.float32, second.shape)]
    for begin in range(0, 40, 10):
        rows[0].append(first[begin : begin + 10])
        rows[1].append(second[begin * 200 : (begin + 10) * 200])
    rows[1].append(second[8000:])
    assert not rows[0].all_zero
    assert not rows[1].all_zero
    file.node("Identity", [file.input("x", np.float32, ["N", 2])], [file.output("y", np.float32, ["N", 2])])
    file.close()
    model = onnx.load(tmp_path / "m.onnx")
    read = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(read["first"], first)
    np.testing.assert_array_equal(read["second"], second)


def test_a_tensor_of_zeros_is_dropped_and_its_place_is_taken(tmp_path: Path) -> None:
    kept = np.arange(3000, dtype=np.float32)
    file = OnnxFile(tmp_path / "m.onnx")
    zeros = file.rows("zeros", np.float32, (5000, 3))
    zeros.append(np.zeros((5000, 3), np.float32))
    assert zeros.all_zero
    file.drop("zeros")
    assert not file.has("zeros")
    file.constant("kept", kept)
    file.close()
    (tensor,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), kept)
    assert (tmp_path / "m.onnx.data").stat().st_size == kept.nbytes


@given(
    tensors=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans()), min_size=1, max_size=6
    )
)
def test_the_digest_is_that_of_the_file(
    tensors: list[tuple[int, int, bool, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is filled side by side, block by block, of zeros or not, and dropped or not."""
    path = tmp_path_factory.mktemp("digest") / "m.onnx"
    chance = np.random.default_rng(len(tensors))
    file = OnnxFile(path)
    for number, (beside, blocks, zeros, dropped) in enumerate(tensors):
        places = [file.rows(f"t{number}.{i}", np.uint8, (blocks, 5000)) for i in range(beside)]
        for _ in range(blocks):
            for place in places:
                block = chance.integers(0, 256, (1, 5000), np.uint8)
                place.append(np.zeros_like(block) if zeros and place is places[-1] else block)
        if zeros and dropped:
            file.drop(f"t{number}.{beside - 1}")
    assert file.close() == hashlib.sha256(path.with_name("m.onnx.data").read_bytes()).hexdigest()
    file.abandon()

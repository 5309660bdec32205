"""The GGUF container against the `gguf` package, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from ggufs import Llama, gguf_reader
from hypothesis import given
from hypothesis import strategies as st

from edgellm.checkpoint import open_checkpoint
from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_header import MAX_STRING_BYTES
from edgellm.checkpoint.gguf_tensors import TENSOR_TYPES
from edgellm.errors import CheckpointError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    Llama().write(path)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "damaged.gguf"


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _compare_with_gguf_package(path: Path, theirs: gguf.GGUFReader) -> None:
    ours = GgufFile(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: _plain(value) for key, value in ours.values.items()} == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (info.type.name, info.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert ours.read(info).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_header_and_bytes_are_what_the_gguf_package_reads(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(alignment=alignment).write(path)
    _compare_with_gguf_package(path, gguf.GGUFReader(path))


@pytest.mark.model
def test_real_file_is_what_the_gguf_package_reads(smollm2_gguf: Path) -> None:
    _compare_with_gguf_package(smollm2_gguf, gguf_reader(smollm2_gguf))


def test_every_value_type(tmp_path: Path) -> None:
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "uint16", "uint32", "uint64"):
        getattr(writer, f"add_{name}")(name, 200)
    for name in ("int8", "int16", "int32", "int64"):
        getattr(writer, f"add_{name}")(name, -100)
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "ä😀")
    writer.add_array("strings", ["", "a", "😀"])
    writer.add_array("numbers", [1.5, -2.5])
    writer.add_array("booleans", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare_with_gguf_package(path, gguf.GGUFReader(path))


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for code, ours in TENSOR_TYPES.items():
        assert (ours.elements, ours.bytes) == gguf.GGML_QUANT_SIZES[Type(code)]
        assert ours.name == Type(code).name


@given(st.data())
def test_truncated_anywhere(tiny: Path, scratch: Path, data: st.DataObject) -> None:
    whole = tiny.read_bytes()
    end = max(info.offset + info.size for info in GgufFile(tiny).tensors.values())  # padding may follow
    scratch.write_bytes(whole[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(CheckpointError, match=r"truncated|not a GGUF file"):
        GgufFile(scratch)


@given(st.data())
def test_damage_anywhere_in_the_header_is_an_error_or_harmless(
    tiny: Path, scratch: Path, data: st.DataObject
) -> None:
    raw = bytearray(tiny.read_bytes())
    header = min(info.offset for info in GgufFile(tiny).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(scratch)
        checkpoint.tokenizer_json()
    except CheckpointError as error:
        assert str(scratch) in str(error)


def _patched(tiny: Path, scratch: Path, position: int, value: bytes) -> Path:
    raw = bytearray(tiny.read_bytes())
    raw[position : position + len(value)] = value
    scratch.write_bytes(raw)
    return scratch


def _after(tiny: Path, name: str) -> int:
    """Position after a key's or tensor's name."""
    needle = struct.pack("<Q", len(name)) + name.encode()
    return tiny.read_bytes().index(needle) + len(needle)


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize(("position", "what"), [(8, "tensors"), (16, "keys")])
def test_absurd_counts(tiny: Path, scratch: Path, position: int, what: str, count: int) -> None:
    with pytest.raises(CheckpointError, match=what):
        GgufFile(_patched(tiny, scratch, position, struct.pack("<Q", count)))


@pytest.mark.parametrize("length", [MAX_STRING_BYTES + 1, 1 << 30, (1 << 64) - 1])
def test_absurd_lengths(tiny: Path, scratch: Path, length: int) -> None:
    packed = struct.pack("<Q", length)
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template"):
        GgufFile(_patched(tiny, scratch, _after(tiny, "tokenizer.chat_template") + 4, packed))
    for array in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        with pytest.raises(CheckpointError, match=array):
            GgufFile(_patched(tiny, scratch, _after(tiny, array) + 8, packed))
        if array.endswith("tokens"):  # the first string of the array
            with pytest.raises(CheckpointError, match=array):
                GgufFile(_patched(tiny, scratch, _after(tiny, array) + 16, packed))


def test_tensor_outside_the_file(tiny: Path, scratch: Path) -> None:
    entry = _after(tiny, "output_norm.weight")  # u32 dimensions, one u64, u32 type, u64 offset
    with pytest.raises(CheckpointError, match=r"output_norm\.weight ends at byte"):
        GgufFile(_patched(tiny, scratch, entry + 16, struct.pack("<Q", 1 << 32)))
    with pytest.raises(CheckpointError, match="no multiple of 32"):
        GgufFile(_patched(tiny, scratch, entry + 16, struct.pack("<Q", 1)))
    with pytest.raises(CheckpointError, match="overlap"):
        GgufFile(_patched(tiny, scratch, entry + 16, struct.pack("<Q", 0)))
    with pytest.raises(CheckpointError, match=r"output_norm\.weight ends at byte"):
        GgufFile(_patched(tiny, scratch, entry + 4, struct.pack("<Q", (1 << 63) - 1)))


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    Llama().write(path)
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"ends inside tensor"):
        for info in file.tensors.values():
            file.read(info)


def test_what_is_no_gguf(tmp_path: Path, tiny: Path, scratch: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(tmp_path / "missing.gguf")
    with pytest.raises(CheckpointError, match="no GGUF files"):
        open_checkpoint(tmp_path)
    for content in (b"", b"GG", b"PK\x03\x04 a zip file", b"\x00" * 100):
        scratch.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            open_checkpoint(scratch)
    with pytest.raises(CheckpointError, match="version 1"):
        open_checkpoint(_patched(tiny, scratch, 4, struct.pack("<I", 1)))


def test_big_endian_is_named(tmp_path: Path) -> None:
    Llama(big_endian=True).write(tmp_path / "big.gguf")
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(tmp_path / "big.gguf")


def test_unsupported_tensor_type_is_named(tiny: Path, scratch: Path) -> None:
    name = b"blk.0.attn_q.weight"
    at = tiny.read_bytes().index(name) + len(name) + 4 + 2 * 8  # after the count and size of its dimensions
    for code, stored in ((10, "Q2_K"), (39, "MXFP4"), (99, "type 99")):
        with pytest.raises(CheckpointError, match=rf"attn_q\.weight as {stored}; edgellm reads .*Q4_1"):
            open_checkpoint(_patched(tiny, scratch, at, struct.pack("<I", code)))


def test_directory_with_one_file(tmp_path: Path) -> None:
    Llama().write(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).path == tmp_path / "a.gguf"
    Llama().write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_checkpoint(tmp_path)

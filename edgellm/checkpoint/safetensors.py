"""The safetensors container: a JSON header, then the tensors' bytes; one file or several with an index.

Layout (https://github.com/huggingface/safetensors#format), little-endian:
    u64 length of the header · the header, JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}}
    tensor data; offsets count from its first byte, and every byte belongs to exactly one tensor
    `__metadata__` in the header maps strings to strings and is not a tensor.
`model.safetensors.index.json` maps tensor names to files: {"weight_map": {name: file}}.

Only the header is read when a file is opened; tensors are read on demand. Pickle files (`pytorch_model.bin`,
`.pt`, `.pth`) can run any program when they are loaded, so they are refused and never opened.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.tensor_file import TensorFile
from edgellm.errors import CheckpointError

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

MAX_HEADER_BYTES: Final = 100_000_000
"""The reference implementation's bound. A damaged length must not become an allocation."""
MAX_INDEX_BYTES: Final = 100_000_000
PIECE_BYTES: Final = 1 << 20
"""Read at a time where only some columns are kept."""
ALL: Final = slice(None)

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
"""The types that edgellm reads; numpy has no bfloat16, so those come as their 16 bits."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        dtype: the format's name, a key of `DTYPES`.
        offset: of its first byte, from the start of the file.
        size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class SafetensorsFile:
    """A safetensors file, its header parsed and checked; the tensors' bytes stay on disk.

    Attributes:
        path: the file.
        tensors: name → where it lies, in the header's order.

    Raises:
        CheckpointError: the file cannot be read, is not safetensors, or its header does not agree with itself
            or with the file's length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)
        self._size = self._file.size
        self._start, header = self._header()
        header.pop("__metadata__", None)
        self.tensors = {name: self._info(name, entry) for name, entry in header.items()}
        self._check_tiling()

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> NDArray[Any]:
        """A tensor, or a part of a matrix, as an array of its stored type (`DTYPES`).

        Columns are cut out of whole rows: that is faster than a system call for each piece of a row.

        Raises:
            CheckpointError: the file is shorter than it was, or cannot be read.
        """
        info, dtype = self.tensors[name], DTYPES[self.tensors[name].dtype]
        if rows == columns == ALL:
            return self._read(info, np.empty(info.shape, dtype), info.offset)
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        begin, end, _ = rows.indices(info.shape[0])
        if columns == ALL:
            values = np.empty((end - begin, *info.shape[1:]), dtype)
            return self._read(info, values, info.offset + begin * row_bytes)
        left, right, _ = columns.indices(info.shape[1])
        some = np.empty((end - begin, right - left), dtype)
        step = max(1, PIECE_BYTES // row_bytes)
        for row in range(begin, end, step):
            piece = self.read(name, slice(row, min(row + step, end)))
            some[row - begin : row - begin + len(piece)] = piece[:, left:right]
        return some

    def _read(self, info: TensorInfo, values: NDArray[Any], offset: int) -> NDArray[Any]:
        self._file.fill(values.reshape(-1).view(np.uint8), offset, info.name)
        return values

    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and the header."""
        if self._size < 8:
            self._fail(f"is not a safetensors file: it has {self._size} bytes")
        length = int.from_bytes(self._file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            self._fail(
                f"is not a safetensors file, or damaged: its header would have {length} bytes, "
                f"more than the format's {MAX_HEADER_BYTES}"
            )
        if 8 + length > self._size:
            self._fail(
                f"is truncated or damaged: its header ends at byte {8 + length}, "
                f"the file at byte {self._size}"
            )
        header = parse_json(self._file.read(length, 8), f"the header of {self.path}")
        return 8 + length, header

    def _info(self, name: str, entry: object) -> TensorInfo:
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
                pass
            case _:
                self._fail(f"is damaged: tensor {name} has no dtype, shape and data_offsets")
        if dtype not in DTYPES:
            self._fail(f"stores tensor {name} as {dtype}; edgellm reads {', '.join(DTYPES)}")
        if not all(_is_size(number) for number in (*shape, begin, end)):
            self._fail(f"is damaged: tensor {name} has shape {shape} and data_offsets {[begin, end]}")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != size:
            self._fail(
                f"is damaged: tensor {name}, {dtype} of shape {shape}, takes {size} bytes, "
                f"but its data_offsets span {end - begin}"
            )
        if self._start + end > self._size:
            self._fail(
                f"is truncated or damaged: tensor {name} ends at byte {self._start + end}, "
                f"the file at byte {self._size}"
            )
        return TensorInfo(name, dtype, tuple(shape), self._start + begin, size)

    def _check_tiling(self) -> None:
        """Every byte belongs to exactly one tensor, as the format demands."""
        in_order = sorted(self.tensors.values(), key=lambda info: (info.offset, info.size))
        for before, after in itertools.pairwise(in_order):
            if before.offset + before.size > after.offset:
                self._fail(f"is damaged: tensors {before.name} and {after.name} overlap")
        covered = self._start + sum(info.size for info in in_order)
        if covered != self._size:
            self._fail(f"is damaged: {self._size - covered} of its bytes belong to no tensor")

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}")


class SafetensorsModel:
    """The tensors of a model directory, in one file or in several.

    Attributes:
        path: the directory.
        tensors: name → where it lies.

    Raises:
        CheckpointError: there are none, a shard is missing or damaged, or the index and the shards disagree;
            pickle files are refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / INDEX).is_file():
            self._files = self._indexed()
        else:
            file = SafetensorsFile(self._single())
            self._files = dict.fromkeys(file.tensors, file)
        self.tensors = {name: file.tensors[name] for name, file in self._files.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> NDArray[Any]:
        """A tensor, or a part of a matrix, in its stored type; see `SafetensorsFile.read`."""
        return self._files[name].read(name, rows, columns)

    def where(self, name: str) -> str:
        """File and name of a tensor, for messages."""
        return f"{self._files[name].path}: tensor {name}"

    def _single(self) -> Path:
        if (self.path / SINGLE).is_file():
            return self.path / SINGLE
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.path} has {len(found)} safetensors files and no {INDEX} "
                "that says which tensor is where"
            )
        refuse_pickles(self.path.iterdir())
        raise CheckpointError(f"{self.path} has no {SINGLE} and no {INDEX}")

    def _indexed(self) -> dict[str, SafetensorsFile]:
        index = self.path / INDEX
        weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        shards: dict[str, SafetensorsFile] = {}
        files: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or shard not in shards:
                file = self._shard(shard, name)
                shards[file.path.name] = file
            if name not in shards[shard].tensors:
                raise CheckpointError(f"{index} says that {shard} has tensor {name}, but it has not")
            files[name] = shards[shard]
        for shard, file in shards.items():
            for name in file.tensors:
                if weight_map.get(name) != shard:
                    where = weight_map.get(name) or "nowhere"
                    raise CheckpointError(f"{file.path} has tensor {name}, which {index} says is in {where}")
        return files

    def _shard(self, shard: object, name: str) -> SafetensorsFile:
        index = self.path / INDEX
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} places tensor {name} in {shard!r}, which is not the name of a file beside it"
            )
        refuse_pickles([Path(shard)])
        if not (self.path / shard).is_file():
            raise CheckpointError(f"{self.path} has no {shard}, which {index} names for tensor {name}")
        return SafetensorsFile(self.path / shard)


def refuse_pickles(paths: Iterable[Path]) -> None:
    """Say of a pickle file what it is and what would work.

    Raises:
        CheckpointError: one of the paths is one.
    """
    for path in sorted(paths):
        if path.suffix in PICKLES:
            raise CheckpointError(
                f"{path} is a pickle file, which can run any program when it is loaded; edgellm never does. "
                "Use the model's safetensors files, or convert it where that is safe "
                "(transformers: model.save_pretrained(directory, safe_serialization=True))"
            )


def read_json(path: Path, most: int) -> dict[str, Any]:
    """A JSON object from a file of at most so many bytes.

    Raises:
        CheckpointError: the file cannot be read, is too large, or is no JSON object.
    """
    return parse_json(read_bytes(path, most), str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """A file of at most so many bytes.

    Raises:
        CheckpointError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > most:
        raise CheckpointError(f"{path} has more than {most} bytes")
    return raw


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object; no name may be there twice.

    Raises:
        CheckpointError: it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{what} has {twice} twice")
        return made

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is damaged: it is not a JSON object")
    return value


def _is_size(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63

"""The GGUF container: typed keys, a directory of tensors, and their bytes.

Layout of version 3, all little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
    u32 magic "GGUF" · u32 version · u64 tensors · u64 keys
    keys × (string name · u32 type · value)
    tensors × (string name · u32 dimensions · u64 size of each, fastest first · u32 type · u64 offset)
    padding to `general.alignment` · tensor data, each tensor at its offset from here
    string = u64 length · UTF-8;  array = u32 type · u64 length · values

We parse it ourselves: the `gguf` package makes several numpy views for each of the hundred thousand strings
of a vocabulary, which takes 1.8 s and 160 MB for SmolLM2 (this file: 0.03 s and 12 MB). Tensor bytes are read
with pread, not mapped: they never count as this process's memory, and a file that shrinks meanwhile is an
error and not a SIGBUS.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import struct
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import CheckpointError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
"""Version 2 differs from 3 in nothing but big-endian files, which are refused; 1 had 32-bit lengths."""
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4

# A damaged length must not become an allocation. The largest real ones: vocabularies of 300,000 tokens, chat
# templates of 20 kB.
MAX_STRING_BYTES: Final = 1 << 24
MAX_ARRAY_LENGTH: Final = 1 << 24
MAX_NESTING: Final = 2

_SCALARS: Final[dict[int, tuple[str, str]]] = {
    0: ("u8", "<u1"),
    1: ("i8", "<i1"),
    2: ("u16", "<u2"),
    3: ("i16", "<i2"),
    4: ("u32", "<u4"),
    5: ("i32", "<i4"),
    6: ("f32", "<f4"),
    10: ("u64", "<u8"),
    11: ("i64", "<i8"),
    12: ("f64", "<f8"),
}
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9

Scalar = int | float | bool | str
Value = Scalar | NDArray[np.generic] | list[str] | list["Value"]
"""A key's value; arrays of numbers are numpy arrays, arrays of strings are lists."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a GGUF tensor type lies in memory: blocks of `elements` along the fastest dimension."""

    name: str
    elements: int
    bytes: int


TENSOR_TYPES: Final[dict[int, TensorType]] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
"""The types that edgellm reads, by their number in the file."""

_OTHER_TYPES: Final[dict[int, str]] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    **dict(
        enumerate(
            ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"),
            start=16,
        )
    ),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M"), start=24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
"""Types that exist and are refused, so that the message can name them."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: slowest dimension first, as numpy has it: (N, K) of a weight matrix.
        offset: of its first byte, from the start of the file.
        size: bytes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    size: int

    def rows(self, first: int, count: int) -> TensorInfo:
        """Some rows [count, K] of a matrix or of matrices one below the other, [E, N, K]; or of a vector."""
        each = self.size // (math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0])
        shape = (count, *self.shape[1:][-1:])
        return replace(self, shape=shape, offset=self.offset + first * each, size=count * each)


class GgufFile:
    """A GGUF file, its header parsed and checked; the tensors' bytes stay on disk.

    Attributes:
        path: the file.
        values: key → value, in the file's order.
        tensors: name → where it lies, in the file's order.

    Raises:
        CheckpointError: the file cannot be read, is not GGUF, or its header does not agree with itself or
            with the file's length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            self._size = os.fstat(self._fd).st_size
            if os.read(self._fd, 4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
            with mmap.mmap(self._fd, self._size, access=mmap.ACCESS_READ) as memory:
                header = _Header(memory, path)
                self.values, self.tensors = header.parse()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def read(self, info: TensorInfo, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Rows begin … end − 1 of a tensor, or to the last, as uint8 [rows, bytes per row].

        A row is a run of the last dimension; of a vector it is one element.

        Raises:
            CheckpointError: the file is shorter than it was, or cannot be read.
        """
        rows = math.prod(info.shape[:-1] or info.shape)
        row_bytes = info.size // rows
        raw = np.empty(((rows if end is None else end) - begin, row_bytes), np.uint8)
        view, done, offset = raw.reshape(-1).data, 0, info.offset + begin * row_bytes
        while done < raw.size:
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends inside tensor {info.name}; it has changed since it was opened"
                )
            done += count
        return raw

    def integer(self, key: str, default: int | None = None, *, minimum: int = 0) -> int:
        """A key's value as an integer ≥ minimum; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, value, "an integer")
        if value < minimum:
            raise CheckpointError(f"{self.path}: {key} is {value}, which is below {minimum}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A key's value as a finite number; without a default the key must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong(key, value, "a number")
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {key} is {value}, which is not a finite number")
        return float(value)

    def string(self, key: str, default: str | None = None) -> str:
        """A key's value as a string; without a default the key must be there."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self._wrong(key, value, "a string")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """A key's value as a boolean; without a default the key must be there."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "a boolean")
        return value

    def strings(self, key: str) -> list[str]:
        """A key's value as a list of strings; the key must be there."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._wrong(key, value, "an array of strings")
        return value  # type: ignore[return-value]  # checked above, item by item

    def integers(self, key: str) -> list[int]:
        """A key's value as a list of integers; the key must be there."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            self._wrong(key, value, "an array of integers")
        integers: list[int] = value.tolist()
        return integers

    def reals(self, key: str) -> list[float]:
        """A key's value as a list of numbers; the key must be there."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            self._wrong(key, value, "an array of floats")
        reals: list[float] = value.tolist()
        return reals

    def _get(self, key: str, default: Value | None) -> Value:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path} has no key {key}, which edgellm needs")
        return value

    def _wrong(self, key: str, value: Value, wanted: str) -> NoReturn:
        kind = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        raise CheckpointError(f"{self.path}: {key} should be {wanted}, but it is of type {kind}")


class _Header:
    """Reads the header once, front to back."""

    def __init__(self, memory: mmap.mmap, path: Path) -> None:
        self._memory = memory
        self._path = path
        self._size = len(memory)
        self._position = len(MAGIC)
        self._where = "the header"

    def parse(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        version = self._u32()
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                self._fail("is big-endian; convert it with gguf_convert_endian.py of the gguf package")
            self._fail(f"has GGUF version {version}; edgellm reads versions {VERSIONS[0]} and {VERSIONS[1]}")

        # The smallest tensor entry is 8 + 4 + 8 + 4 + 8 bytes, the smallest key 8 + 4 + 1.
        tensor_count = self._count("tensors", smallest=32)
        key_count = self._count("keys", smallest=13)

        values: dict[str, Value] = {}
        for index in range(key_count):
            self._where = f"key {index}"
            key = self._string()
            if key in values:
                self._fail(f"has key {key} twice")
            self._where = f"key {key}"
            values[key] = self._value(self._u32(), nesting=0)

        entries = [self._tensor_entry(index) for index in range(tensor_count)]
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            self._fail(f"has general.alignment {alignment}, which should be a multiple of 8")
        start = -(-self._position // alignment) * alignment
        return values, self._place(entries, start, alignment)

    def _tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        self._where = f"the entry of tensor {index}"
        name = self._string()
        self._where = f"the entry of tensor {name}"
        dimensions = self._u32()
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._fail(f"has tensor {name} with {dimensions} dimensions; GGUF has 1 to {MAX_DIMENSIONS}")
        sizes = tuple(self._u64() for _ in range(dimensions))
        return name, sizes[::-1], self._u32(), self._u64()

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Check types, sizes and offsets; offsets become those from the start of the file."""
        tensors: dict[str, TensorInfo] = {}
        for name, shape, code, offset in entries:
            kind = TENSOR_TYPES.get(code)
            if kind is None:
                supported = ", ".join(known.name for known in TENSOR_TYPES.values())
                stored = _OTHER_TYPES.get(code, f"type {code}")
                self._fail(f"stores tensor {name} as {stored}; edgellm reads {supported}")
            if name in tensors:
                self._fail(f"has tensor {name} twice")
            if 0 in shape or shape[-1] % kind.elements:
                self._fail(f"has tensor {name} of shape {shape}, which {kind.name} cannot store")
            if offset % alignment:
                self._fail(f"has tensor {name} at offset {offset}, which is no multiple of {alignment}")
            size = math.prod(shape) // kind.elements * kind.bytes
            if start + offset + size > self._size:
                self._fail(
                    f"is truncated or damaged: tensor {name} ends at byte {start + offset + size}, "
                    f"the file at byte {self._size}"
                )
            tensors[name] = TensorInfo(name, kind, shape, start + offset, size)

        in_order = sorted(tensors.values(), key=lambda info: info.offset)
        for before, after in itertools.pairwise(in_order):
            if before.offset + before.size > after.offset:
                self._fail(f"is damaged: tensors {before.name} and {after.name} overlap")
        return tensors

    def _value(self, code: int, *, nesting: int) -> Value:
        if code in _SCALARS:
            scalar: int | float = self._numbers(code, 1)[0].item()
            return scalar
        if code == _BOOL:
            return bool(self._booleans(1)[0])
        if code == _STRING:
            return self._string()
        if code != _ARRAY:
            self._fail(f"is damaged: {self._where} has a value of unknown type {code}")
        return self._array(nesting)

    def _array(self, nesting: int) -> Value:
        if nesting == MAX_NESTING:
            self._fail(f"nests arrays too deeply at {self._where}")
        code, length = self._u32(), self._u64()
        if length > MAX_ARRAY_LENGTH:
            self._fail(f"is damaged: {self._where} has an array of {length} values")
        if code in _SCALARS:
            return self._numbers(code, length)
        if code == _BOOL:
            return self._booleans(length)
        if code == _STRING:
            return self._strings(length)
        return [self._value(code, nesting=nesting + 1) for _ in range(length)]

    def _numbers(self, code: int, count: int) -> NDArray[np.generic]:
        dtype = np.dtype(_SCALARS[code][1])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _booleans(self, count: int) -> NDArray[np.generic]:
        raw = np.frombuffer(self._take(count), np.uint8)
        if raw.size and raw.max() > 1:
            self._fail(f"is damaged: {self._where} has a boolean that is neither 0 nor 1")
        return raw.astype(np.bool_)

    def _strings(self, count: int) -> list[str]:
        # The hot loop: a vocabulary has 50,000 to 300,000 tokens and as many merges.
        memory, size, position = self._memory, self._size, self._position
        length_at = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + length_at(memory, position)[0]
                if position > size:
                    self._truncated()
                strings.append(memory[begin:position].decode())
        except struct.error:
            self._truncated()
        except UnicodeDecodeError:
            self._fail(f"is damaged: string {len(strings)} of {self._where} is not UTF-8")
        self._position = position
        return strings

    def _string(self) -> str:
        length = self._u64()
        if length > MAX_STRING_BYTES:
            self._fail(f"is truncated or damaged: {self._where} has a string of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._fail(f"is damaged: {self._where} has a string that is not UTF-8")

    def _count(self, what: str, *, smallest: int) -> int:
        count = self._u64()
        if count * smallest > self._size:
            self._fail(f"is truncated or damaged: its header announces {count} {what}")
        return count

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > self._size:
            self._truncated()
        taken = self._memory[self._position : end]
        self._position = end
        return taken

    def _truncated(self) -> NoReturn:
        self._fail(f"is truncated or damaged: it ends inside {self._where}, at byte {self._size}")

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path} {what}")

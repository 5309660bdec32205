"""The header of a GGUF file: typed keys and a directory of tensors, read once from front to back.

Layout of version 3, all little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
    u32 magic "GGUF" · u32 version · u64 tensors · u64 keys
    keys × (string name · u32 type · value)
    tensors × (string name · u32 dimensions · u64 size of each, fastest first · u32 type · u64 offset)
    padding to `general.alignment` · tensor data, each tensor at its offset from here
    string = u64 length · UTF-8;  array = u32 type · u64 length · values

We parse it ourselves: the `gguf` package makes several numpy views for each of the hundred thousand strings
of a vocabulary, which takes 1.8 s and 160 MB for SmolLM2 (this file: 0.03 s and 12 MB).
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.gguf_tensors import OTHER_TYPES, TENSOR_TYPES, TensorInfo
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


class Header:
    """Reads a header.

    Args:
        memory: the whole file, which begins with MAGIC.
        path: its name, for messages.
    """

    def __init__(self, memory: mmap.mmap, path: Path) -> None:
        self._memory = memory
        self._path = path
        self._size = len(memory)
        self._position = len(MAGIC)
        self._where = "the header"

    def parse(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        """Keys and tensors, in the file's order.

        Raises:
            CheckpointError: the header does not agree with itself or with the file's length.
        """
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
                stored = OTHER_TYPES.get(code, f"type {code}")
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

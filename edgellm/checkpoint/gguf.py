"""A GGUF file: its keys' values, typed, and its tensors' bytes."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.gguf_header import MAGIC, Header, Value
from edgellm.checkpoint.gguf_tensors import TensorInfo
from edgellm.checkpoint.tensor_file import TensorFile
from edgellm.errors import CheckpointError


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
        self._file = TensorFile(path)
        if self._file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        try:
            with mmap.mmap(self._file.descriptor, self._file.size, access=mmap.ACCESS_READ) as memory:
                self.values, self.tensors = Header(memory, path).parse()
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
        self._file.fill(raw, info.offset + begin * row_bytes, info.name)
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

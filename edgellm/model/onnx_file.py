"""An ONNX model written as it is made: tensors stream to an external data file, the graph comes last.

Only the graph and small constants are held in memory; everything else goes to `<name>.data` as it comes, each
tensor at a page border, as a file that is mapped wants it. Several tensors can be filled side by side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from edgellm.running_digest import RunningDigest

OPSET: Final = 21
"""Of the standard operators; ONNX Runtime 1.23.2 reads up to 23."""
IR_VERSION: Final = 10
CONTRIB: Final = "com.microsoft"
"""ONNX Runtime's own operators:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md"""
ALIGNMENT: Final = 4096
INLINE_BYTES: Final = 1024

Array = NDArray[Any]
Dimension = int | str


class Rows:
    """The place of a tensor in the data file, to be filled row by row.

    Attributes:
        begin, end: its first byte and the one after its last.
        written: the byte where the next row goes.
        all_zero: whether no number so far is anything else; such rows take no room on the disk.
    """

    def __init__(self, file: OnnxFile, begin: int, length: int, dtype: Any) -> None:
        self._file = file
        self._dtype = np.dtype(dtype)
        self.begin = self.written = begin
        self.end = begin + length
        self.all_zero = True

    def append(self, rows: Array) -> None:
        """Write what comes next."""
        assert rows.dtype == self._dtype
        if rows.any():
            self.all_zero = False
            self._file.write(np.ascontiguousarray(rows), self.written)
        self.written += rows.nbytes
        assert self.written <= self.end
        self._file.appended()


class OnnxFile:
    """A model being written to `path` and `path`.data; `close` completes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data_path = path.with_name(path.name + ".data")
        self._data = self._data_path.open("w+b", buffering=0)
        self._digest = RunningDigest(self._data.fileno())
        self._end = 0
        self._unfinished: list[Rows] = []
        self._graph = onnx.GraphProto(name="edgellm")
        self._tensors: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, array: Array) -> str:
        """Add a tensor and return its name; adding a name again changes nothing."""
        if name in self._tensors:
            return name
        if array.nbytes <= INLINE_BYTES:
            tensor = self._new_tensor(name, onnx_type(array.dtype), array.shape)
            tensor.raw_data = array.tobytes()
        else:
            self.rows(name, array.dtype, array.shape).append(array)
        return name

    def rows(self, name: str, dtype: Any, shape: Sequence[int]) -> Rows:
        """Add a tensor whose rows are still to come, all of them before `close`."""
        tensor = self._new_tensor(name, onnx_type(dtype), shape)
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._unfinished = [rows for rows in self._unfinished if rows.written < rows.end]
        length = math.prod(shape) * np.dtype(dtype).itemsize
        self._end = offset + length
        self._data.truncate(self._end)  # what is not written, being zero, can be read for the digest
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._data_path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._unfinished.append(Rows(self, offset, length, dtype))
        return self._unfinished[-1]

    def drop(self, name: str) -> None:
        """Take back the tensor that was added last; nothing but zeros may have been written to it."""
        rows = self._unfinished.pop()
        assert rows.all_zero
        assert self._graph.initializer[-1].name == name
        del self._graph.initializer[-1], self._tensors[name]
        self._end = rows.begin

    def write(self, array: Array, offset: int) -> None:
        """Put a contiguous array into the data file; for `Rows`."""
        view, done = array.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            done += os.pwrite(self._data.fileno(), view[done:], offset + done)

    def appended(self) -> None:
        """Let what is final be hashed: all before the first tensor that lacks rows or may yet be dropped."""
        for rows in self._unfinished:
            if rows.all_zero or rows.written < rows.end:
                self._digest.advance(rows.begin if rows.all_zero else rows.written)
                return
        self._digest.advance(self._end)

    def has(self, name: str) -> bool:
        """Whether a tensor of this name was added."""
        return name in self._tensors

    def alias(self, name: str, source: str, shape: Sequence[int]) -> str:
        """Add a tensor that has the bytes of `source` in another shape; on disk they are there once."""
        if name in self._tensors:
            return name
        original = self._tensors[source]
        tensor = self._new_tensor(name, original.data_type, shape)
        if original.HasField("raw_data"):
            tensor.raw_data = original.raw_data
        else:
            tensor.data_location = original.data_location
            tensor.external_data.extend(original.external_data)
        return name

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node; an empty name leaves an input or output out."""
        node = onnx.helper.make_node(
            op, inputs, outputs, name=f"{op}:{outputs[0]}", domain=domain, **attributes
        )
        self._graph.node.append(node)

    def input(self, name: str, dtype: Any, shape: Sequence[Dimension]) -> str:
        """Declare an input of the graph; a dimension given as a string may vary."""
        self._graph.input.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Sequence[Dimension]) -> str:
        """Declare an output of the graph."""
        self._graph.output.append(_value_info(name, dtype, shape))
        return name

    def close(self) -> str:
        """Write the graph, after all rows; gives the data file's SHA-256 in hex."""
        assert all(rows.written == rows.end for rows in self._unfinished)
        self._data.truncate(self._end)  # what was dropped last
        self._digest.advance(self._end)
        digest = self._digest.finish()
        self._data.close()
        model = onnx.helper.make_model(
            self._graph,
            producer_name="edgellm",
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(CONTRIB, 1)],
        )
        self._path.write_bytes(model.SerializeToString(deterministic=True))
        return digest

    def abandon(self) -> None:
        """Close the data file; what was written stays for whoever removes the directory."""
        self._digest.abandon()
        self._data.close()

    def _new_tensor(self, name: str, data_type: int, shape: Sequence[int]) -> onnx.TensorProto:
        tensor: onnx.TensorProto = self._graph.initializer.add(name=name, data_type=data_type, dims=shape)
        self._tensors[name] = tensor
        return tensor


def onnx_type(dtype: Any) -> int:
    """The number that ONNX gives to numpy's dtype."""
    number: int = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return number


def _value_info(name: str, dtype: Any, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx_type(dtype), list(shape))

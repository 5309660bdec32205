"""A TensorRT network being written: named layers, and the arrays that its constants point to.

TensorRT does not copy constants, so their arrays live here until the plan is built. Two-dimensional matrices
are given as float16, int8 or 4-bit integers; everything a layer makes is named after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import BuildError
from edgellm.tensorrt.api import Api

Tensor = Any
"""TensorRT's ITensor; its bindings have no types."""

Compute = Literal["fp16", "fp32"]
"""`fp16`: weights and activations are float16, the residual stream and norms float32; `fp32`: everything is
float32, the reference that tells a wrong network from a rounded one."""

LARGEST_HALF: Final = 65504.0


class TrtNetwork:
    """Adds layers to a strongly typed network.

    Args:
        api: the library.
        network: its INetworkDefinition, empty.
        compute: type of weights and activations.

    Attributes:
        half: TensorRT's type of weights and activations.
        dtype: numpy's name for it.
        arrays: constant's name → what TensorRT reads; 4-bit integers two in a byte, the first one low.
        weight_bytes: of all constants.
    """

    def __init__(self, api: Api, network: Any, compute: Compute = "fp16") -> None:
        self.api = api
        self.trt = api.module
        self.half = self.trt.float16 if compute == "fp16" else self.trt.float32
        self.dtype = np.dtype(np.float16 if compute == "fp16" else np.float32)
        self.network = network
        self.arrays: dict[str, NDArray[Any]] = {}
        self._constants: dict[str, Tensor] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants, as emitted."""
        return sum(array.nbytes for array in self.arrays.values())

    def input(self, name: str, dtype: Any, shape: Sequence[int]) -> Tensor:
        """An input; −1 stands for a dimension that the profiles bound."""
        return self.network.add_input(name, dtype, tuple(shape))

    def output(self, tensor: Tensor, name: str) -> None:
        """Mark an output."""
        tensor.name = name
        self.network.mark_output(tensor)

    def constant(self, name: str, array: NDArray[Any]) -> Tensor:
        """float32, float16, int8, int32 or bool as they are; adding a name again gives the first one."""
        if name not in self._constants:
            array = np.ascontiguousarray(array)
            self.arrays[name] = array
            layer = self.network.add_constant(array.shape, self.trt.Weights(array))
            self._constants[name] = self._named(layer, name)
        return self._constants[name]

    def weight(self, name: str, array: NDArray[np.floating]) -> Tensor:
        """A constant of the weights' type; an array that has it already is taken as it is.

        Raises:
            BuildError: a value has no float16.
        """
        if name in self._constants or array.dtype == self.dtype:
            return self.constant(name, array)
        return self.constant(name, self.rounded(name, array))

    def rounded(self, name: str, array: NDArray[np.floating]) -> NDArray[np.floating]:
        """The numbers in the weights' type.

        Raises:
            BuildError: a value of `name` has no float16.
        """
        if self.dtype == np.float16 and array.size and not np.abs(array).max() <= LARGEST_HALF:
            raise BuildError(f"{name} has values beyond float16's range; use `--executor cpu` for this model")
        return array.astype(self.dtype)

    def int4(self, name: str, shape: tuple[int, int], packed: NDArray[np.uint8]) -> Tensor:
        """A matrix of 4-bit integers, −8 … 7, row after row, two in a byte, the first one low."""
        if name not in self._constants:
            self.arrays[name] = packed
            weights = self.trt.Weights(self.trt.int4, packed.ctypes.data, shape[0] * shape[1])
            self._constants[name] = self._named(self.network.add_constant(shape, weights), name)
        return self._constants[name]

    def dequantize(self, name: str, q: Tensor, scale: Tensor) -> Tensor:
        """q · scale; for 4 bits the block follows from the scale's shape, for 8 it is set."""
        layer = self.network.add_dequantize(q, scale, self.half)
        if q.dtype == self.trt.int8:
            layer.block_shape = tuple(a // b for a, b in zip(q.shape, scale.shape, strict=True))
        return self._named(layer, name)

    def matmul(self, name: str, x: Tensor, w: Tensor) -> Tensor:
        """x [B, T, K] or [B, K] times w [K, N]."""
        if len(x.shape) == 3:
            w = self.reshape(f"{w.name}.3d", w, (1, *w.shape))
        plain = self.trt.MatrixOperation.NONE
        return self._named(self.network.add_matrix_multiply(x, plain, w, plain), name)

    def add(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return self.elementwise(name, "SUM", a, b)

    def multiply(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return self.elementwise(name, "PROD", a, b)

    def elementwise(self, name: str, operation: str, a: Tensor, b: Tensor) -> Tensor:
        """One of TensorRT's ElementWiseOperation."""
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self._named(self.network.add_elementwise(a, b, kind), name)

    def unary(self, name: str, operation: str, x: Tensor) -> Tensor:
        """One of TensorRT's UnaryOperation."""
        kind = getattr(self.trt.UnaryOperation, operation)
        return self._named(self.network.add_unary(x, kind), name)

    def sigmoid(self, name: str, x: Tensor) -> Tensor:
        return self._named(self.network.add_activation(x, self.trt.ActivationType.SIGMOID), name)

    def cast(self, name: str, x: Tensor, dtype: Any) -> Tensor:
        return x if x.dtype == dtype else self._named(self.network.add_cast(x, dtype), name)

    def mean(self, name: str, x: Tensor, axis: int, *, keep: bool) -> Tensor:
        """The mean over one axis."""
        average = self.trt.ReduceOperation.AVG
        return self._named(self.network.add_reduce(x, average, 1 << axis, keep), name)

    def total(self, name: str, x: Tensor, axis: int) -> Tensor:
        """The sum over one axis, which stays with size 1."""
        return self._named(self.network.add_reduce(x, self.trt.ReduceOperation.SUM, 1 << axis, True), name)

    def softmax(self, name: str, x: Tensor, axis: int) -> Tensor:
        layer = self.network.add_softmax(x)
        layer.axes = 1 << axis
        return self._named(layer, name)

    def top(self, name: str, x: Tensor, count: int, axis: int) -> tuple[Tensor, Tensor]:
        """The largest values along one axis, largest first, and their int32 indices."""
        layer = self.network.add_topk(x, self.trt.TopKOperation.MAX, count, 1 << axis)
        values = self._named(layer, name)
        indices = layer.get_output(1)
        indices.name = f"{name}.indices"
        return values, indices

    def reshape(
        self,
        name: str,
        x: Tensor,
        shape: Sequence[int] | None,
        *,
        before: Sequence[int] | None = None,
        after: Sequence[int] | None = None,
    ) -> Tensor:
        """Transpose by `before`, reshape (0 keeps a dimension, −1 is what is left), transpose by `after`."""
        layer = self.network.add_shuffle(x)
        if before is not None:
            layer.first_transpose = tuple(before)
        if shape is not None:
            layer.reshape_dims = tuple(shape)
        if after is not None:
            layer.second_transpose = tuple(after)
        return self._named(layer, name)

    def slice(self, name: str, x: Tensor, axis: int, start: int, size: int) -> Tensor:
        """`size` entries of one axis; the others as they are."""
        layer = self.network.add_slice(x, (start,), (size,), (1,))
        layer.axes = (axis,)
        return self._named(layer, name)

    def gather(self, name: str, x: Tensor, indices: Tensor, axis: int, *, batched: bool = False) -> Tensor:
        """Entries of one axis of x; `batched`: row b of x by row b of the indices."""
        layer = self.network.add_gather_v2(x, indices, self.trt.GatherMode.DEFAULT)
        layer.axis = axis
        layer.num_elementwise_dims = int(batched)
        return self._named(layer, name)

    def concat(self, name: str, parts: Sequence[Tensor], axis: int) -> Tensor:
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._named(layer, name)

    def rotate(self, name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [B, heads, T, d], halves as pairs; cos and sin [S, d / 2]."""
        layer = self.network.add_rotary_embedding(x, cos, sin, False, x.shape[3])
        layer.set_input(3, positions)
        return self._named(layer, name)

    def append(self, name: str, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
        """Write `new` [B, heads, T, d] behind the first `at` [B] positions of the cache, in place."""
        layer = self.network.add_kv_cache_update(cache, new, at, self.trt.KVCacheMode.LINEAR)
        layer.name = name
        return layer.get_output(0)

    def attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """Softmax attention without a scale; exactly one of mask (bool [B, 1, T, S]) and lengths ([B])."""
        softmax = self.trt.AttentionNormalizationOp.SOFTMAX
        if lengths is not None:
            kind = self.trt.CausalMaskKind.LOWER_RIGHT
            layer = self.network.add_attention_v2(q, k, v, softmax, kind)
            layer.key_value_lengths = lengths
        else:
            layer = self.network.add_attention(q, k, v, softmax, False)
            layer.mask = mask
        layer.name = name
        layer.decomposable = True
        attended = layer.get_output(0)
        attended.name = f"{name}.out"
        return attended

    def _named(self, layer: Any, name: str) -> Tensor:
        if layer is None:
            raise BuildError(f"TensorRT {self.api.version} refuses the layer {name}; its log says why")
        layer.name = name
        tensor = layer.get_output(0)
        tensor.name = name
        return tensor

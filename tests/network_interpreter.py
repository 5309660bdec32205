"""A TensorRT network computed in numpy, layer by layer, as TensorRT's documentation says of each layer.

It reads the network that was emitted, not the emitter: types, axes, shapes and constants are the layers'.
With `rounded` every float16 tensor is rounded to float16, as the plan's kernels do at least; without, the
network is computed in float32 with its float16 constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm.model.trt_network import TrtNetwork

Array = NDArray[Any]
Values = dict[str, Array]


class Interpreter:
    """Runs one network any number of times; caches are the caller's arrays and are written in place."""

    def __init__(self, net: TrtNetwork, *, rounded: bool = False) -> None:
        self._net = net
        self._trt = net.trt
        self._rounded = rounded
        self._layers = [self._typed(net.network.get_layer(i)) for i in range(net.network.num_layers)]
        self._constants: Values = {}
        for kind, layer in self._layers:
            if kind == "CONSTANT":
                self._constants[layer.get_output(0).name] = self._constant(layer)
        for kind, layer in self._layers:
            if kind == "DEQUANTIZE":
                self._constants[layer.get_output(0).name] = self._round(layer, self._dequantize(layer))
        self.kinds = {kind for kind, _ in self._layers}

    def run(self, feeds: Values) -> Values:
        """All tensors of a run, by name."""
        network = self._net.network
        names = {network.get_input(i).name for i in range(network.num_inputs)}
        assert set(feeds) == names, f"inputs {names ^ set(feeds)}"
        values = {**self._constants, **feeds}
        for kind, layer in self._layers:
            if kind not in ("CONSTANT", "DEQUANTIZE"):
                result = getattr(self, f"_{kind.lower()}")(layer, values)
                values[layer.get_output(0).name] = self._round(layer, result)
        return values

    def _softmax(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        (axis,) = (i for i in range(x.ndim) if layer.axes >> i & 1)
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        return np.asarray(powers / powers.sum(axis=axis, keepdims=True))

    def _topk(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        assert layer.op == self._trt.TopKOperation.MAX
        assert layer.axes == 1 << (x.ndim - 1)
        indices = np.argsort(-x, axis=-1, kind="stable")[..., : layer.k]
        values[layer.get_output(1).name] = indices
        return np.take_along_axis(x, indices, axis=-1)

    def _typed(self, layer: Any) -> tuple[str, Any]:
        kind = layer.type.name
        words = "".join(word.capitalize() for word in kind.split("_"))
        known = {
            "Elementwise": "ElementWise",
            "KvCacheUpdate": "KVCacheUpdate",
            "Softmax": "SoftMax",
            "Topk": "TopK",
        }
        layer.__class__ = getattr(self._trt, f"I{known.get(words, words)}Layer")
        return kind, layer

    def _round(self, layer: Any, value: Array) -> Array:
        if self._rounded and layer.get_output(0).dtype == self._trt.float16 and layer.type.name != "KV_CACHE":
            with np.errstate(over="ignore"):
                return value.astype(np.float16).astype(np.float32)
        return value

    def _constant(self, layer: Any) -> Array:
        array = self._net.arrays[layer.name]
        tensor = layer.get_output(0)
        if tensor.dtype == self._trt.int4:
            nibbles = np.stack([array & 15, array >> 4], axis=-1).reshape(tuple(tensor.shape)).astype(np.int8)
            return np.where(nibbles > 7, nibbles - 16, nibbles)
        assert array.shape == tuple(tensor.shape)
        return array.astype(np.float32) if array.dtype == np.float16 else array

    def _dequantize(self, layer: Any) -> Array:
        """scale · q, a scale for every block of equal shape."""
        q, scale = (self._constants[layer.get_input(i).name] for i in range(2))
        for axis, (whole, blocks) in enumerate(zip(q.shape, scale.shape, strict=True)):
            assert whole % blocks == 0
            scale = np.repeat(scale, whole // blocks, axis)
        return np.asarray(q * scale, np.float32)

    def _matrix_multiply(self, layer: Any, values: Values) -> Array:
        a, b = self._inputs(layer, values)
        transpose = self._trt.MatrixOperation.TRANSPOSE
        a = a.swapaxes(-1, -2) if layer.op0 == transpose else a
        b = b.swapaxes(-1, -2) if layer.op1 == transpose else b
        assert a.ndim == b.ndim, "TensorRT does not add dimensions"
        return np.asarray(a @ b)

    def _shuffle(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        x = x.transpose(list(layer.first_transpose)[: x.ndim])
        shape = _dimensions(layer.reshape_dims)
        if shape is not None:
            assert layer.zero_is_placeholder
            x = x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])
        return np.asarray(x.transpose(list(layer.second_transpose)[: x.ndim]))

    def _reduce(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        operation = self._trt.ReduceOperation
        reduce: Any = {operation.SUM: np.sum, operation.AVG: np.mean}[layer.op]
        axes = tuple(i for i in range(x.ndim) if layer.axes >> i & 1)
        return np.asarray(reduce(x, axis=axes, keepdims=layer.keep_dims))

    def _elementwise(self, layer: Any, values: Values) -> Array:
        a, b = self._inputs(layer, values)
        assert a.ndim == b.ndim, "TensorRT does not add dimensions"
        operation = self._trt.ElementWiseOperation
        function: Any = {
            operation.SUM: np.add,
            operation.PROD: np.multiply,
            operation.DIV: np.divide,
            operation.GREATER: np.greater,
            operation.EQUAL: np.equal,
        }[layer.op]
        return np.asarray(function(a, b))

    def _unary(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        operation = self._trt.UnaryOperation
        function: Any = {operation.SQRT: np.sqrt, operation.NOT: np.logical_not}[layer.op]
        return np.asarray(function(x))

    def _activation(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        # `type` of an activation layer is its function, not the kind of layer.
        assert layer.type == self._trt.ActivationType.SIGMOID
        return 1 / (1 + np.exp(-x))

    def _cast(self, layer: Any, values: Values) -> Array:
        return self._inputs(layer, values)[0]

    def _gather(self, layer: Any, values: Values) -> Array:
        x, indices = self._inputs(layer, values)
        if layer.num_elementwise_dims == 0:
            return np.take(x, indices, layer.axis)
        assert layer.num_elementwise_dims == 1
        return np.stack([np.take(row, at, layer.axis - 1) for row, at in zip(x, indices, strict=True)])

    def _slice(self, layer: Any, values: Values) -> Array:
        (x,) = self._inputs(layer, values)
        index = [slice(None)] * x.ndim
        for axis, start, size, stride in zip(layer.axes, layer.start, layer.shape, layer.stride, strict=True):
            assert start + size * stride <= x.shape[axis]
            index[axis] = slice(start, start + size * stride, stride)
        return x[tuple(index)]

    def _concatenation(self, layer: Any, values: Values) -> Array:
        return np.concatenate(self._inputs(layer, values), axis=layer.axis)

    def _rotary_embedding(self, layer: Any, values: Values) -> Array:
        x, cos, sin, positions = self._inputs(layer, values)
        assert not layer.interleaved
        half = layer.rotary_embedding_dim // 2
        c, s = cos[positions][:, None], sin[positions][:, None]
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([a * c - b * s, a * s + b * c, x[..., 2 * half :]], axis=-1)

    def _kv_cache_update(self, layer: Any, values: Values) -> Array:
        cache, new, at = self._inputs(layer, values)
        for row, start in enumerate(at):
            # What does not fit is dropped by TensorRT without a word: the interpreter does not allow it.
            assert start + new.shape[2] <= cache.shape[2]
            cache[row, :, start : start + new.shape[2]] = new[row]
        return cache

    def _attention_input(self, layer: Any, values: Values) -> Array:
        attention = layer.attention
        query, keys, held = self._inputs(layer, values)[:3]
        batch, heads, count, _ = query.shape
        keys, held = (np.repeat(x, heads // x.shape[1], axis=1) for x in (keys, held))
        seen: Array = self._seen(attention, values, batch, count, keys.shape[2])
        scores = np.where(seen, query @ keys.swapaxes(-1, -2), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        # What was never written may be anything: it must not reach the sum, not even times 0.
        written = np.expand_dims(seen.any(axis=(1, 2)), (1, 3))
        held = np.where(written, held, 0)
        attended = np.asarray((weights / weights.sum(axis=-1, keepdims=True)) @ held)
        values[f"{attention.name}.out"] = attended
        return attended

    def _seen(self, attention: Any, values: Values, batch: int, count: int, capacity: int) -> Array:
        """bool [B, 1, T, S]: which cache positions each token attends to."""
        kind = self._trt.CausalMaskKind
        slots = np.arange(capacity)
        if attention.key_value_lengths is None:
            assert attention.causal_kind == kind.NONE
            return values[attention.mask.name]
        assert attention.mask is None
        assert attention.causal_kind == kind.LOWER_RIGHT
        lengths = values[attention.key_value_lengths.name].reshape(batch, 1, 1)
        last = lengths - count + np.arange(count).reshape(1, -1, 1)
        seen = np.logical_and(slots <= last, slots < lengths)
        return np.expand_dims(seen, 1)

    def _attention_output(self, layer: Any, values: Values) -> Array:
        return self._inputs(layer, values)[0]

    def _inputs(self, layer: Any, values: Values) -> list[Array]:
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        return [values[tensor.name] for tensor in tensors if tensor is not None]


def _dimensions(dims: Any) -> list[int] | None:
    """A layer's dimensions, or None where they are not set."""
    try:
        return list(dims)
    except ValueError:
        return None

"""compressed-tensors' pack-quantized layout → canonical weights.

For a layer [N, K] in groups of g columns, b bits, p = 32 / b numbers in a word, lowest bits first
(compressed_tensors, compressors/quantized_compressors/pack_quantized.py):
    weight_packed int32 [N, ⌈K / p⌉], packed along K · weight_scale [N, K / g] · weight_shape int [2] = N, K
    weight_zero_point int32 [⌈N / p⌉, K / g], packed along N; only if asymmetric
    weight_g_idx int [K]: the group of each column; only if quantized in another order
    w[n, k] = weight_scale[n, g] · (q[n, k] − z[n, g])
Numbers and zero points are signed; both are stored with 2^(b − 1) added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from edgellm.checkpoint.config_file import ConfigFile
from edgellm.checkpoint.packed import (
    FLOATS,
    as_grouped,
    canonical,
    check_group,
    floats,
    order_of_groups,
    require,
    unpack,
    words,
    words_around,
)
from edgellm.checkpoint.safetensors import SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.weights import Grouped, Groups

_KNOWN: Final = frozenset(
    {"quant_method", "format", "config_groups", "ignore", "quantization_status", "version"}
    | {"global_compression_ratio", "kv_cache_scheme", "sparsity_config", "transform_config"}
)
_GROUP_KNOWN: Final = frozenset({"weights", "targets", "format", "input_activations", "output_activations"})
_WEIGHTS_KNOWN: Final = frozenset(
    {"num_bits", "type", "symmetric", "strategy", "group_size", "actorder", "dynamic"}
    | {"observer", "observer_kwargs", "block_structure", "scale_dtype", "zp_dtype"}
)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """See `Packing`.

    Attributes:
        bits: of a number.
        group: columns that share a scale; −1: all.
        symmetric: whether there are no zero points.
        act_order: whether columns were grouped in another order.
    """

    bits: Literal[4, 8]
    group: int
    symmetric: bool
    act_order: bool
    suffixes: tuple[str, ...] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    @classmethod
    def from_config(cls, config: ConfigFile) -> CompressedTensors:
        """What a quantization_config with quant_method `compressed-tensors` describes.

        Raises:
            CheckpointError: another format than pack-quantized, or more than weights is quantized.
        """
        config.require_known(_KNOWN)
        if config.string("format") != "pack-quantized":
            raise config.unsupported("format")
        if config.values.get("kv_cache_scheme"):
            raise config.unsupported("kv_cache_scheme")
        if config.values.get("transform_config"):
            raise config.unsupported("transform_config")
        sparsity = config.section("sparsity_config")
        if sparsity is not None and sparsity.string("format", "dense") != "dense":
            raise sparsity.unsupported("format")
        groups = config.section("config_groups")
        if groups is None or len(groups.values) != 1:
            raise config.wrong("config_groups", config.values.get("config_groups"), "one group")
        group = groups.section(next(iter(groups.values)))
        weights = None if group is None else group.section("weights")
        if group is None or weights is None:
            raise config.wrong("config_groups", groups.values, "a group with weights")
        group.require_known(_GROUP_KNOWN)
        for key in ("input_activations", "output_activations"):
            if group.values.get(key):
                raise group.unsupported(key)
        if group.string("format", "pack-quantized") != "pack-quantized":
            raise group.unsupported("format")
        return cls._of_weights(weights)

    @classmethod
    def _of_weights(cls, weights: ConfigFile) -> CompressedTensors:
        weights.require_known(_WEIGHTS_KNOWN)
        if weights.string("type", "int") != "int":
            raise weights.unsupported("type")
        bits = weights.integer("num_bits")
        if bits not in (4, 8):
            raise weights.unsupported("num_bits")
        strategy = weights.string("strategy")
        if strategy not in ("group", "channel"):
            raise weights.unsupported("strategy")
        order = weights.values.get("actorder")
        if order not in (None, False, "static", "weight", "group", "dynamic"):
            raise weights.unsupported("actorder")
        return cls(
            bits=4 if bits == 4 else 8,
            group=weights.integer("group_size") if strategy == "group" else -1,
            symmetric=weights.boolean("symmetric", True),
            act_order=order in ("group", "dynamic"),
        )

    @property
    def quant_algo(self) -> Literal["W4A16", "W8A16"]:
        """TensorRT-LLM's name."""
        return "W4A16" if self.bits == 4 else "W8A16"

    def weight(self, model: SafetensorsModel, layer: str, shape: tuple[int, int]) -> Grouped:
        """The weight [N, K] of a layer; its bytes are read by its `read()`, but for shape and order."""
        n, k = shape
        group, in_word = check_group(f"{model.path}: {layer}", self.group, k), 32 // self.bits
        require(model, f"{layer}.weight_packed", (n, -(-k // in_word)), ("I32",))
        require(model, f"{layer}.weight_scale", (n, k // group), FLOATS)
        require(model, f"{layer}.weight_shape", (2,), ("I32", "I64"))
        stored = tuple(model.read(f"{layer}.weight_shape").tolist())
        if stored != shape:
            raise CheckpointError(
                f"{model.where(f'{layer}.weight_shape')} is {list(stored)}, config.json says {list(shape)}"
            )
        if not self.symmetric:
            require(model, f"{layer}.weight_zero_point", (-(-n // in_word), k // group), ("I32",))
        order = None
        if self.act_order or f"{layer}.weight_g_idx" in model.tensors:
            require(model, f"{layer}.weight_g_idx", (k,), ("I32", "I64"))
            order = order_of_groups(model, f"{layer}.weight_g_idx", group)

        def read_rows(begin: int, end: int) -> Groups:
            rows = slice(begin, end)
            q = unpack(words(model, f"{layer}.weight_packed", rows), self.bits)[:, :k]
            scale = floats(model, f"{layer}.weight_scale", rows)
            if self.symmetric:
                zero = np.full(scale.shape, 1 << (self.bits - 1), np.int16)
            else:
                around, inside = words_around(begin, end, in_word)
                packed = words(model, f"{layer}.weight_zero_point", around)
                zero = unpack(packed.T, self.bits).T[inside].astype(np.int16)
            if order is not None:
                q = np.take(q, order, axis=1)
            return canonical(q, scale, zero, self.bits, symmetric=self.symmetric)

        return as_grouped(layer, shape, self.bits, group, read_rows, symmetric=self.symmetric, perm=order)

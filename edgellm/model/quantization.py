"""How a checkpoint's weights are quantized, in TensorRT-LLM's words."""

from __future__ import annotations

from typing import Literal

import msgspec


class Quantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TensorRT-LLM's `pretrained_config.quantization`: what most of the linear layers are.

    Attributes:
        quant_algo: weights W4 or W8 with 16-bit activations, or NO_QUANT; AWQ's and GPTQ's layouts are named.
        kv_cache_quant_algo: how the KV cache is quantized, or None.
        group_size: elements of K that share a scale; 0 with NO_QUANT.
        has_zero_point: whether groups have an offset beside their scale.
        exclude_modules: canonical names of the matrices that are stored in another way.
    """

    quant_algo: Literal["W4A16", "W4A16_AWQ", "W4A16_GPTQ", "W8A16", "NO_QUANT"] = "NO_QUANT"
    kv_cache_quant_algo: str | None = None
    group_size: int = 0
    has_zero_point: bool = False
    exclude_modules: tuple[str, ...] = ()

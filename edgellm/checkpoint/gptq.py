"""GPTQ's layout, as AutoGPTQ and GPTQModel write it → canonical weights.

For a layer [N, K] in groups of g columns, b bits, p = 32 / b numbers in a word, lowest bits first
(Frantar et al. 2022; AutoGPTQ, qlinear_cuda.py; GPTQModel for `gptq_v2`):
    qweight int32 [K / p, N], packed along K · qzeros int32 [K / g, N / p], packed along N
    scales float16 [K / g, N] · g_idx int32 [K], the group of each column
    w[n, k] = scales[g_idx[k], n] · (q[k, n] − z[g_idx[k], n])
qzeros holds z − 1, or with `checkpoint_format: gptq_v2` z itself. With `desc_act` columns were quantized
in another order than they are stored in: then g_idx[k] is not k // g.
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
    transposed,
    unpack,
    words,
    words_around,
)
from edgellm.checkpoint.safetensors import SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.weights import Grouped, Groups

FORMATS: Final = {"gptq": 1, "gptq_v2": 0}
"""`checkpoint_format` → what is to be added to the stored zero points."""
_KNOWN: Final = frozenset(
    {"quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "static_groups"}
    # How it was quantized, and how to run it elsewhere.
    | {"damp_percent", "damp_auto_increment", "true_sequential", "dataset", "tokenizer", "model_seqlen"}
    | {"block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "backend"}
    | {"use_cuda_fp16", "use_exllama", "max_input_length", "exllama_config", "cache_block_outputs", "meta"}
    | {"modules_in_block_to_quantize", "model_name_or_path", "model_file_base_name", "lm_head", "pack_dtype"}
    | {"disable_exllama", "mse", "format", "dynamic"}
)


@dataclass(frozen=True, slots=True)
class Gptq:
    """See `Packing`.

    Attributes:
        bits: of a number.
        group: columns that share a scale; −1: all.
        act_order: whether columns were quantized in another order.
        symmetric: whether every zero point is the middle of the range.
        first: what is to be added to stored zero points.
    """

    bits: Literal[4, 8]
    group: int
    act_order: bool
    symmetric: bool
    first: int
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_config(cls, config: ConfigFile) -> Gptq:
        """What a quantization_config with quant_method `gptq` describes.

        Raises:
            CheckpointError: bits or a checkpoint_format that edgellm does not read.
        """
        config.require_known(_KNOWN)
        bits = config.integer("bits")
        if bits not in (4, 8):
            raise config.unsupported("bits")
        key = "checkpoint_format" if "checkpoint_format" in config.values else "format"
        stored_as = config.string(key, "gptq")
        if stored_as not in FORMATS:
            raise config.unsupported(key)
        if config.values.get("pack_dtype") not in (None, "int32"):
            raise config.unsupported("pack_dtype")
        # GPTQModel: "-:" before a pattern leaves layers out, which their tensors show; other patterns
        # give them bits and groups of their own.
        dynamic = config.section("dynamic")
        if dynamic is not None and not all(pattern.startswith("-:") for pattern in dynamic.values):
            raise config.unsupported("dynamic")
        return cls(
            bits=4 if bits == 4 else 8,
            group=config.integer("group_size", minimum=-1),
            act_order=config.boolean("desc_act", False),
            symmetric=config.boolean("sym", False),
            first=FORMATS[stored_as],
        )

    @property
    def quant_algo(self) -> Literal["W4A16_GPTQ", "W8A16"]:
        """TensorRT-LLM's name."""
        return "W4A16_GPTQ" if self.bits == 4 else "W8A16"

    def weight(self, model: SafetensorsModel, layer: str, shape: tuple[int, int]) -> Grouped:
        """The weight [N, K] of a layer; its bytes are read by its `read()`, but for their order."""
        n, k = shape
        where = f"{model.path}: {layer}"
        group, in_word = check_group(where, self.group, k), 32 // self.bits
        for size, what in ((n, "rows"), (k, "columns")):
            if size % in_word:
                raise CheckpointError(f"{where} has {size} {what}; GPTQ packs {in_word} into a word")
        require(model, f"{layer}.qweight", (k // in_word, n), ("I32",))
        require(model, f"{layer}.qzeros", (k // group, n // in_word), ("I32",))
        require(model, f"{layer}.scales", (k // group, n), FLOATS)
        order = None
        if self.act_order or f"{layer}.g_idx" in model.tensors:
            require(model, f"{layer}.g_idx", (k,), ("I32", "I64"))
            order = order_of_groups(model, f"{layer}.g_idx", group)

        def read_rows(begin: int, end: int) -> Groups:
            rows = slice(begin, end)
            q = unpack(transposed(words(model, f"{layer}.qweight", columns=rows)), self.bits)
            scale = floats(model, f"{layer}.scales", columns=rows).T
            columns, inside = words_around(begin, end, in_word)
            zeros = unpack(words(model, f"{layer}.qzeros", columns=columns), self.bits).T[inside]
            zero = zeros.astype(np.int16) + np.int16(self.first)
            middle = 1 << (self.bits - 1)
            if self.symmetric and (zero != middle).any():
                raise CheckpointError(
                    f"{model.where(f'{layer}.qzeros')} has zero points other than {middle}, "
                    "but config.json's quantization_config says sym"
                )
            return canonical(
                q if order is None else np.take(q, order, axis=1),
                scale,
                zero,
                self.bits,
                symmetric=self.symmetric,
            )

        return as_grouped(layer, shape, self.bits, group, read_rows, symmetric=self.symmetric, perm=order)

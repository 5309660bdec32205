"""Families × formats: how each cell of docs/models.md's table is made and measured.

Nothing expected is read by edgellm: unquantized float32 models have transformers' logits, the others those of
`reference_decoder` with weights that `gguf`, numpy or a packer's own formula give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import packers
from closeness import largest_kl, relative
from engines import all_logits, tiny_executor
from model_directories import Tensors, stored_weights, write_directory
from numpy.typing import NDArray
from packers import Quantized, quantize
from reference_decoder import Given, reference_logits
from tiny_llama import LLAMA3, TINY, TINY_GGUF, TinyLlama, joined_qkv

from edgellm.checkpoint import Checkpoint, open_checkpoint

GOLDEN = np.load(Path(__file__).parent / "golden" / "decoder.npz")
TOKENS: Final = 8

FAMILIES: Final = {
    "Llama 2, SmolLM2": TinyLlama(256, 4, 2, 64, 256, tied=True, rotary_base=1e4, seed=21),
    "Llama 3.x": TinyLlama(256, 8, 2, 32, 256, tied=False, rotary_base=5e5, seed=22, scaling=LLAMA3),
    "Mistral": TinyLlama(256, 4, 1, 64, 256, tied=False, rotary_base=1e6, seed=23, family="Mistral"),
    "Qwen": TinyLlama(256, 4, 4, 64, 256, tied=False, rotary_base=1e4, seed=24, family="Qwen"),
    "Qwen2, Qwen2.5": TinyLlama(256, 4, 2, 64, 256, tied=True, rotary_base=1e6, seed=25, family="Qwen2"),
    "Qwen3": TinyLlama(256, 8, 2, 64, 256, tied=False, rotary_base=1e6, seed=26, family="Qwen3"),
    # Of a seed whose tokens are not near a tie between experts: a choice that rounding turns costs up to 0.4.
    "Qwen3-MoE": TinyLlama(
        256, 8, 2, 64, 256, tied=False, rotary_base=1e6, seed=131, family="Qwen3Moe", experts=4, top_k=2
    ),
}
"""The quantized cells' models, wide enough for blocks of 256."""

Linear = Callable[[NDArray[np.float32]], Quantized]
Pack = Callable[[str, Quantized], Tensors]


@dataclass(frozen=True)
class Measured:
    """What a cell has come to.

    Attributes:
        error: of `--compute fp32`: the largest difference of a logit, over the largest logit.
        kl: of `--compute int8`, in nats, the largest of the positions; None: nothing is quantized.
    """

    error: float
    kl: float | None = None


@dataclass(frozen=True)
class _Packed:
    """A packed layout: its quantization_config, how a layer is rounded, how that is stored."""

    config: dict[str, Any]
    rounded: Linear
    stored: Pack


def _gptq(*, act_order: bool) -> _Packed:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": act_order, "sym": False}

    def rounded(values: NDArray[np.float32]) -> Quantized:
        columns = values.shape[1]
        order = np.random.default_rng(columns).permutation(columns) // 32 if act_order else None
        return quantize(values, 32, group_of=order)

    return _Packed(config, rounded, packers.gptq)


_WEIGHTS: Final = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED: Final = {
    "AWQ": _Packed(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        lambda values: quantize(values, 32),
        packers.awq,
    ),
    "GPTQ": _gptq(act_order=False),
    "GPTQ, desc_act": _gptq(act_order=True),
    "compressed-tensors": _Packed(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": _WEIGHTS, "targets": ["Linear"]}},
        },
        lambda values: quantize(values, 32, symmetric=True),
        lambda layer, made: packers.compressed(layer, made, symmetric=True),
    ),
}
GGUF: Final[dict[str, tuple[str, str, dict[str, str]]]] = {
    "GGUF F16": ("F16", "F16", {}),
    "GGUF BF16": ("BF16", "BF16", {}),
    "GGUF Q4_0": ("Q4_0", "Q8_0", {}),
    "GGUF Q4_1": ("Q4_1", "Q8_0", {}),
    "GGUF Q5_0": ("Q5_0", "Q8_0", {}),
    "GGUF Q5_1": ("Q5_1", "Q8_0", {}),
    "GGUF Q8_0": ("Q8_0", "Q8_0", {}),
    "GGUF Q4_K": ("Q4_K", "Q8_0", {}),
    "GGUF Q5_K": ("Q5_K", "Q8_0", {}),
    "GGUF Q6_K": ("Q6_K", "Q8_0", {}),
    # As llama.cpp's Q4_K_M.
    "GGUF Q4_K, Q6_K mixed": ("Q4_K", "Q6_K", {"v_proj": "Q6_K", "down_proj": "Q6_K"}),
}
"""Types of linear layers, embedding and some parts."""
HALVES: Final = {"safetensors F16": np.float16, "safetensors BF16": ml_dtypes.bfloat16}
FORMATS: Final = ("safetensors F32", *HALVES, *PACKED, "GGUF F32", *GGUF)


def measure(family: str, form: str, directory: Path) -> Measured:
    """Build a cell's models into the directory, run them, and compare."""
    if form in ("safetensors F32", "GGUF F32"):
        return _against_transformers(FAMILIES[family], form, directory)
    model = FAMILIES[family]
    if form in HALVES:
        dtype: Any = HALVES[form]
        path = write_directory(directory / "model", model, dtype=dtype)
        weights = {name: values.astype(dtype).astype(np.float32) for name, values in model.weights().items()}
    elif form in PACKED:
        model = replace(
            model, hidden=128, inner=128, heads=model.heads // 2, kv_heads=max(1, model.kv_heads // 2)
        )
        path, weights = _write_packed(model, PACKED[form], directory / "model")
    else:
        linear, embedding, others = GGUF[form]
        path = model.write_gguf(directory / "model.gguf", linear, embedding, others)
        weights = model.gguf_weights(linear, embedding, others)
    checkpoint = open_checkpoint(path)
    tokens = np.random.default_rng(0).integers(0, model.vocab, TOKENS).tolist()
    expected = reference_logits(Given(checkpoint.spec, weights), tokens)
    error = relative(_logits(checkpoint, directory / "fp32", "fp32", tokens), expected)
    if form in HALVES or form in ("GGUF F16", "GGUF BF16"):
        return Measured(error)
    return Measured(error, largest_kl(_logits(checkpoint, directory / "int8", "int8", tokens), expected))


def _against_transformers(family: TinyLlama, form: str, directory: Path) -> Measured:
    """All tiny models of the family, odd heads and all."""
    errors = []
    for number, (name, tiny) in enumerate((TINY if form == "safetensors F32" else TINY_GGUF).items()):
        if tiny.family != family.family or bool(tiny.scaling) != bool(family.scaling):
            continue
        if form == "safetensors F32":
            path = write_directory(directory / str(number), tiny)
        else:
            path = tiny.write_gguf(directory / f"{number}.gguf")
        tokens, expected = GOLDEN[f"{name}.tokens"].tolist(), GOLDEN[f"{name}.logits"]
        got = _logits(open_checkpoint(path), directory / f"{number}.engine", "fp32", tokens)
        errors.append(relative(got, expected))
    return Measured(max(errors))


def _write_packed(
    model: TinyLlama, layout: _Packed, path: Path
) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """The directory, and what the layout's formula makes of its weights."""
    joined = joined_qkv(model.weights()) if model.family == "Qwen" else model.weights()
    canonical = dict(zip(stored_weights(model), joined, strict=True))
    weights = dict(joined)

    def linear(layer: str, values: NDArray[np.float32]) -> Tensors:
        made = layout.rounded(values)
        weights[canonical[layer]] = made.weight()
        return layout.stored(layer, made)

    config = {"quantization_config": layout.config}
    return write_directory(path, model, config=config, linear=linear), model.parted(weights)


def _logits(
    checkpoint: Checkpoint, directory: Path, compute: Literal["int8", "fp32"], tokens: list[int]
) -> NDArray[np.float32]:
    return all_logits(tiny_executor(checkpoint, directory, compute=compute), tokens)

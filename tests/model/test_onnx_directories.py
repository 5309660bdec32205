"""Model directories on the CPU executor: transformers' logits unquantized, the formula's when packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from closeness import largest_kl, relative
from engines import all_logits, tiny_executor
from model_directories import Tensors, write_directory
from numpy.typing import NDArray
from packers import quantize
from reference_decoder import reference_logits
from tiny_llama import TINY, TinyLlama

from edgellm.checkpoint import open_checkpoint

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "decoder.npz")
WIDE = TinyLlama(128, 2, 1, 64, 256, tied=False, rotary_base=1e4)


@pytest.mark.parametrize("name", TINY)
def test_an_unquantized_directory_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", TINY[name]))
    executor = tiny_executor(checkpoint, tmp_path / "engine", compute="int8")
    assert relative(all_logits(executor, GOLDEN[f"{name}.tokens"].tolist()), GOLDEN[f"{name}.logits"]) < 1e-4


def _awq(group: int) -> Any:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return config, lambda layer, values: packers.awq(layer, quantize(values, group))


def _gptq(group: int, *, bits: int = 4, sym: bool = False, version: int = 1, act_order: bool = False) -> Any:
    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym}
    config |= {"desc_act": act_order, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}

    def linear(layer: str, values: NDArray[np.float32]) -> Tensors:
        order = None
        if act_order:
            # q, k and v see the same activations, so they have one order; o, gate and up have others.
            number = {"o": 1, "gate": 2, "up": 3}.get(layer.rsplit(".", 1)[-1].removesuffix("_proj"), 0)
            chance = np.random.default_rng(number)
            order = chance.permutation(values.shape[1]) // group
        made = quantize(values, group, bits=bits, symmetric=sym, group_of=order)
        return packers.gptq(layer, made, bits=bits, stored_zero=version - 2)

    return config, linear


def _compressed(group: int, *, symmetric: bool, bits: int = 4) -> Any:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }

    def linear(layer: str, values: NDArray[np.float32]) -> Tensors:
        made = quantize(values, group, bits=bits, symmetric=symmetric)
        return packers.compressed(layer, made, bits=bits, symmetric=symmetric)

    return config, linear


@pytest.mark.parametrize(
    "layout",
    [
        _awq(128),
        _awq(64),
        _awq(32),
        _gptq(128),
        _gptq(64, sym=True),
        _gptq(64, version=2),
        _gptq(128, bits=8),
        _gptq(32, act_order=True),
        _gptq(64, act_order=True, sym=True, bits=8),
        _compressed(128, symmetric=True),
        _compressed(64, symmetric=False),
        _compressed(64, symmetric=True, bits=8),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_directory_computes_its_dequantized_weights(layout: Any, tied: bool, tmp_path: Path) -> None:
    quantization, linear = layout
    config = {"quantization_config": quantization}
    path = write_directory(tmp_path / "tiny", replace(WIDE, tied=tied), config=config, linear=linear)
    checkpoint = open_checkpoint(path)
    tokens = np.random.default_rng(0).integers(0, WIDE.vocab, 12).tolist()
    expected = reference_logits(checkpoint, tokens)
    exact = tiny_executor(checkpoint, tmp_path / "fp32", compute="fp32")
    assert relative(all_logits(exact, tokens), expected) < 1e-4
    # What is left is the rounding of activations to 8 bits, whose scale is shared by a whole group.
    fast = tiny_executor(checkpoint, tmp_path / "int8", compute="int8")
    # Of these weights, made to be sensitive, one wrong order, scale or zero point costs more than 0.1.
    assert largest_kl(all_logits(fast, tokens), expected) < 0.03

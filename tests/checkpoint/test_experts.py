"""Mixtures of experts and fused projections: each canonical tensor is the right part of a stored one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from model_directories import Tensors, stored_weights, write_directory
from numpy.typing import NDArray
from packers import quantize
from tiny_llama import TINY, TinyLlama, joined_qkv

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.errors import CheckpointError
from edgellm.model.spec import Mixture, Normalization
from edgellm.model.weights import Dense

MOE = TINY["qwen3moe, 3 of 12, untied"]
QWEN = TINY["qwen"]


def assert_same(checkpoint: Checkpoint, weights: dict[str, NDArray[np.float32]]) -> None:
    for name, values in weights.items():
        assert checkpoint.has(name)
        weight = checkpoint.tensor(name)
        assert weight.shape == values.shape
        assert (weight.dequantize() == values).all()
        if values.ndim == 2:
            assert (weight.dequantize(3, 5) == values[3:5]).all()


@pytest.mark.parametrize(
    ("name", "mixture"),
    [
        ("qwen3moe, tied", Mixture(num_experts=6, top_k=2)),
        ("qwen3moe, 3 of 12, untied", Mixture(num_experts=12, top_k=3)),
        (
            "qwen3moe, not normalized, one dense layer",
            Mixture(num_experts=7, top_k=3, normalization_mode=Normalization.NONE, dense_layers=(1,)),
        ),
    ],
)
def test_a_mixture(name: str, mixture: Mixture, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path, TINY[name]))
    assert checkpoint.spec.moe == mixture
    assert checkpoint.spec.moe_intermediate_size == TINY[name].inner
    assert_same(checkpoint, TINY[name].weights())
    assert not checkpoint.has("layers.0.mlp.up_proj")


@pytest.mark.parametrize(("step", "dense"), [(1, ()), (2, (0, 2)), (3, (0, 1)), (4, (0, 1, 2))])
def test_which_layers_are_dense(step: int, dense: tuple[int, ...], tmp_path: Path) -> None:
    """transformers' Qwen3MoeDecoderLayer: (layer_idx + 1) % decoder_sparse_step == 0 are mixtures."""
    tiny = TinyLlama(
        64, 4, 2, 32, 48, tied=False, rotary_base=1e6, layers=3, family="Qwen3Moe", experts=3, top_k=1,
        dense_layers=dense,
    )  # fmt: skip
    config = {"mlp_only_layers": [], "decoder_sparse_step": step}
    spec = open_checkpoint(write_directory(tmp_path, tiny, config=config)).spec
    assert [layer for layer in range(3) if not spec.is_mixture(layer)] == list(dense)


def fused_tensors(tiny: TinyLlama) -> dict[str, Any]:
    """Changes to a directory that make each layer's experts two tensors, as transformers 5 holds them."""
    changes: dict[str, Any] = {}
    weights = tiny.weights()
    for layer in range(tiny.layers):
        here = f"layers.{layer}.mlp.experts"
        parts: dict[str, list[NDArray[np.float32]]] = {"gate_up_proj": [], "down_proj": []}
        for e in range(tiny.experts):
            gate, up, down = (weights[f"{here}.{e}.{part}_proj"] for part in ("gate", "up", "down"))
            parts["gate_up_proj"].append(np.concatenate([gate, up]))
            parts["down_proj"].append(down)
            changes |= {f"model.{here}.{e}.{part}_proj.weight": None for part in ("gate", "up", "down")}
        changes |= {f"model.{here}.{name}": np.stack(arrays) for name, arrays in parts.items()}
    return changes


def test_fused_experts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path, MOE, tensors=fused_tensors(MOE)))
    assert_same(checkpoint, MOE.weights())
    assert isinstance(checkpoint.tensor("layers.0.mlp.experts.3.up_proj"), Dense)
    assert checkpoint.stored_bytes == sum(values.nbytes for values in MOE.weights().values())


def test_fused_experts_of_another_shape(tmp_path: Path) -> None:
    tensors = fused_tensors(MOE)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(CheckpointError, match=r"has shape \[11, 80, 72\], config.json says \[12, 80, 72\]"):
        open_checkpoint(write_directory(tmp_path, MOE, tensors=tensors))


def test_a_number_that_is_none_in_a_fused_expert(tmp_path: Path) -> None:
    tensors = fused_tensors(MOE)
    tensors["model.layers.1.mlp.experts.down_proj"][5, 2, 7] = np.nan
    checkpoint = open_checkpoint(write_directory(tmp_path, MOE, tensors=tensors))
    checkpoint.tensor("layers.1.mlp.experts.4.down_proj").dequantize()
    with pytest.raises(CheckpointError, match=r"experts\.down_proj has a value that is not finite"):
        checkpoint.tensor("layers.1.mlp.experts.5.down_proj").dequantize()


def test_experts_of_a_gguf_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MOE.write_gguf(tmp_path / "tiny.gguf"))
    assert checkpoint.spec.moe == Mixture(num_experts=12, top_k=3)
    assert_same(checkpoint, MOE.weights())


def test_the_first_qwens_parts(tmp_path: Path) -> None:
    for path in (write_directory(tmp_path / "tiny", QWEN), QWEN.write_gguf(tmp_path / "tiny.gguf")):
        checkpoint = open_checkpoint(path)
        assert_same(checkpoint, QWEN.weights())
        spec = checkpoint.spec
        assert (spec.architecture, spec.intermediate_size, spec.attn_bias) == ("QWenLMHeadModel", 80, True)
        assert (spec.num_key_value_heads, spec.head_size) == (3, 32)
        assert np.float32(spec.norm_epsilon) == np.float32(1e-5)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_packed_c_attn(method: str, tmp_path: Path) -> None:
    """Its columns are packed eight to a word, q's, k's and v's side by side; AutoGPTQ adds idle biases."""
    made: dict[str, NDArray[np.float32]] = dict(joined_qkv(QWEN.weights()))
    canonical = dict(zip(stored_weights(QWEN), made, strict=True))

    def linear(layer: str, values: NDArray[np.float32]) -> Tensors:
        quantized = quantize(values, 16)
        made[canonical[layer]] = quantized.weight()
        idle = {} if "c_attn" in layer else {f"{layer}.bias": np.zeros(len(values), np.float16)}
        return {"awq": packers.awq, "gptq": packers.gptq}[method](layer, quantized) | idle

    config = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 16}}
    checkpoint = open_checkpoint(write_directory(tmp_path, QWEN, config=config, linear=linear))
    assert checkpoint.quantization.quant_algo == f"W4A16_{method.upper()}"
    assert_same(checkpoint, QWEN.parted(made))


@pytest.mark.parametrize(
    ("dynamic", "refused"), [({r"-:.*mlp\.gate$": {}}, False), ({r"+:.*down_proj": {"bits": 8}}, True)]
)
def test_gptq_leaves_the_router_out(dynamic: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    made = dict(MOE.weights())

    def linear(layer: str, values: NDArray[np.float32]) -> Tensors:
        quantized = quantize(values, 8)
        made[layer.removeprefix("model.")] = quantized.weight()
        return packers.gptq(layer, quantized, stored_zero=0)

    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 8,
        "checkpoint_format": "gptq_v2",
        "dynamic": dynamic,
    }
    path = write_directory(tmp_path, MOE, config={"quantization_config": quantization}, linear=linear)
    if refused:
        with pytest.raises(CheckpointError, match="quantization_config has dynamic"):
            open_checkpoint(path)
    else:
        checkpoint = open_checkpoint(path)
        assert isinstance(checkpoint.tensor("layers.0.mlp.gate"), Dense)
        assert_same(checkpoint, made)

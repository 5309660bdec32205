"""AWQ, GPTQ and compressed-tensors against packers written from the layouts, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from model_directories import Tensors, write_directory
from packers import Quantized, quantize
from tiny_llama import TinyLlama

from edgellm.checkpoint import open_checkpoint
from edgellm.checkpoint.awq import Awq
from edgellm.checkpoint.compressed_tensors import CompressedTensors
from edgellm.checkpoint.gptq import Gptq
from edgellm.checkpoint.packed import Packing
from edgellm.checkpoint.safetensors import SINGLE, SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.weights import Grouped

TINY = TinyLlama(128, 2, 1, 64, 256, tied=False, rotary_base=1e4)
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 64,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": None,
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": False,
    "damp_percent": 0.01,
    "static_groups": False,
    "true_sequential": True,
    "model_name_or_path": None,
}
COMPRESSED_WEIGHTS: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 64,
    "num_bits": 4,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "group",
    "symmetric": False,
    "type": "int",
}


def compressed_config(**weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": {**group, "weights": COMPRESSED_WEIGHTS | weights}},
        "format": "pack-quantized",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def read_layer(path: Path, tensors: Tensors, packing: Packing, shape: tuple[int, int]) -> Grouped:
    """The layer `x` of a model that has nothing else."""
    safetensors.numpy.save_file(tensors, path / SINGLE)
    return packing.weight(SafetensorsModel(path), "x", shape)


@st.composite
def layers(draw: st.DrawFn, bits: int, lowest_zero: int = 0, *, act_order: bool = False) -> Quantized:
    """Any numbers at all in a layer of any small size."""
    in_word = 32 // bits
    n, group = in_word * draw(st.integers(1, 3)), 8 * draw(st.integers(1, 4))
    groups = draw(st.integers(1, 3))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    order = np.arange(groups * group) // group
    highest = 2**bits - 1 + lowest_zero
    return Quantized(
        q=chance.integers(0, 2**bits, (n, groups * group)),
        zero=chance.integers(lowest_zero, highest, (n, groups), endpoint=True),
        scale=chance.normal(0, draw(st.sampled_from([1e-6, 0.01, 100])), (n, groups)).astype(np.float16),
        group_of=chance.permutation(order) if act_order else order,
    )


def check_rows(weight: Grouped, made: Quantized, data: st.DataObject) -> None:
    """Any rows by themselves are those of the whole."""
    end = data.draw(st.integers(1, weight.shape[0]))
    begin = data.draw(st.integers(0, end - 1))
    assert (weight.dequantize(begin, end) == made.weight()[begin:end]).all()
    assert weight.read(begin, end).q.shape == (end - begin, weight.shape[1])


@given(made=layers(4), data=st.data())
def test_awq_is_its_formula(
    made: Quantized, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    group = made.q.shape[1] // made.scale.shape[1]
    shape = made.q.shape
    weight = read_layer(
        tmp_path_factory.mktemp("awq"), packers.awq("x", made), Awq(group), (shape[0], shape[1])
    )
    assert (weight.dequantize() == made.weight()).all()
    assert (weight.read().q == made.q).all()
    check_rows(weight, made, data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@given(data=st.data())
def test_gptq_is_its_formula(
    bits: Any, act_order: bool, version: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = data.draw(layers(bits, 2 - version, act_order=act_order))
    (n, k), groups = made.q.shape, made.scale.shape[1]
    tensors = packers.gptq("x", made, bits=bits, stored_zero=version - 2)
    packing = Gptq(bits, k // groups, act_order=act_order, symmetric=False, first=2 - version)
    weight = read_layer(tmp_path_factory.mktemp("gptq"), tensors, packing, (n, k))
    assert (weight.dequantize() == made.weight()).all()
    check_rows(weight, made, data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows_less", [0, 3])
@given(data=st.data())
def test_compressed_tensors_is_its_formula(
    bits: Any,
    symmetric: bool,
    act_order: bool,
    rows_less: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = data.draw(layers(bits, act_order=act_order))
    zero = np.full_like(made.zero, 2 ** (bits - 1)) if symmetric else made.zero
    # The last word of the zero points need not be full.
    made = Quantized(made.q[rows_less:], zero[rows_less:], made.scale[rows_less:].copy(), made.group_of)
    (n, k), groups = made.q.shape, made.scale.shape[1]
    tensors = packers.compressed("x", made, bits=bits, symmetric=symmetric, act_order=act_order)
    packing = CompressedTensors(bits, k // groups, symmetric=symmetric, act_order=act_order)
    weight = read_layer(tmp_path_factory.mktemp("ct"), tensors, packing, (n, k))
    assert (weight.dequantize() == made.weight()).all()
    assert weight.asymmetric == (bits == 4 or not symmetric)
    check_rows(weight, made, data)


def test_scales_of_32_bits_are_not_rounded(tmp_path: Path) -> None:
    made = quantize(TINY.weights()["layers.0.mlp.down_proj"], 64)
    whole = np.random.default_rng(0).uniform(0.01, 0.1, made.scale.shape).astype(np.float32)
    made = Quantized(made.q, made.zero, whole, made.group_of)
    packing = CompressedTensors(4, 64, symmetric=False, act_order=False)
    weight = read_layer(tmp_path, packers.compressed("x", made), packing, (128, 256))
    assert (weight.dequantize() == made.weight()).all()


def store(layout: str, group: int = 64, **more: Any) -> Any:
    """How `write_directory` is to store linear layers."""
    pack = {"awq": packers.awq, "gptq": packers.gptq, "compressed": packers.compressed}[layout]
    return lambda layer, values: pack(layer, quantize(values, group), **more)


@pytest.mark.parametrize(
    ("quantization", "linear", "algorithm"),
    [
        (AWQ, store("awq"), "W4A16_AWQ"),
        (GPTQ, store("gptq"), "W4A16_GPTQ"),
        (compressed_config(), store("compressed"), "W4A16"),
    ],
)
def test_a_directory_of_packed_layers(
    quantization: dict[str, Any], linear: Any, algorithm: str, tmp_path: Path
) -> None:
    config = {"quantization_config": quantization}
    checkpoint = open_checkpoint(write_directory(tmp_path, TINY, config=config, linear=linear))
    for name, values in TINY.weights().items():
        expected = quantize(values, 64).weight() if "_proj" in name else values
        assert (checkpoint.tensor(name).dequantize() == expected).all()
    stored = checkpoint.quantization
    assert (stored.quant_algo, stored.group_size, stored.has_zero_point) == (algorithm, 64, True)
    assert stored.exclude_modules == ("embed_tokens", "lm_head")


def test_layers_that_were_not_converted_stay_whole(tmp_path: Path) -> None:
    def linear(layer: str, values: np.ndarray[Any, Any]) -> Tensors:
        if "mlp" in layer:
            return {f"{layer}.weight": values}
        return packers.awq(layer, quantize(values, 128))

    config = {"quantization_config": AWQ | {"group_size": -1, "modules_to_not_convert": ["mlp"]}}
    with pytest.raises(CheckpointError, match=r"o_proj\.qzeros"):  # 128 columns, so one group; o_proj, too
        open_checkpoint(
            write_directory(
                tmp_path,
                TINY,
                config=config,
                linear=linear,
                tensors={"model.layers.0.self_attn.o_proj.qzeros": None},
            )
        )
    checkpoint = open_checkpoint(write_directory(tmp_path, TINY, config=config, linear=linear))
    weight = checkpoint.tensor("layers.0.mlp.up_proj")
    assert (weight.dequantize() == TINY.weights()["layers.0.mlp.up_proj"]).all()
    assert isinstance(checkpoint.tensor("layers.0.self_attn.q_proj"), Grouped)


def test_autogptqs_biases_of_zeros_are_no_biases(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.bias"
    config = {"quantization_config": GPTQ}
    tensors: dict[str, Any] = {name: np.zeros(256, np.float16)}
    checkpoint = open_checkpoint(
        write_directory(tmp_path, TINY, config=config, linear=store("gptq"), tensors=tensors)
    )
    assert not checkpoint.has("layers.0.mlp.up_proj.bias")
    tensors[name][7] = 1
    with pytest.raises(CheckpointError, match=f"{name} has no place"):
        open_checkpoint(write_directory(tmp_path, TINY, config=config, linear=store("gptq"), tensors=tensors))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("quantization", "linear", "tensors", "named"),
    [
        (AWQ | {"bits": 3}, store("awq"), {}, "bits = 3"),
        (AWQ | {"version": "gemv"}, store("awq"), {}, "version = 'gemv'"),
        (AWQ | {"zero_point": False}, store("awq"), {}, "zero_point = False"),
        (AWQ | {"rotation": "hadamard"}, store("awq"), {}, "rotation = 'hadamard'"),
        (AWQ | {"group_size": 48}, store("awq"), {}, "groups of 48 do not divide 128"),
        (AWQ | {"group_size": 0}, store("awq"), {}, "groups of 0 do not divide 128"),
        (AWQ | {"group_size": 32}, store("awq"), {}, r"qzeros has shape \[2, 16\], .* says \[4, 16\]"),
        (AWQ | {"group_size": "64"}, store("awq"), {}, "group_size should be an integer"),
        (AWQ, None, {}, "quantization_config, but no layer has a qweight"),
        (GPTQ | {"bits": 3}, store("gptq"), {}, "bits = 3"),
        (GPTQ | {"group_size": 48}, store("gptq"), {}, "groups of 48 do not divide 128"),
        (compressed_config(group_size=48), store("compressed"), {}, "groups of 48 do not divide 128"),
        (GPTQ | {"checkpoint_format": "marlin"}, store("gptq"), {}, "checkpoint_format = 'marlin'"),
        (GPTQ | {"format": "bitblas"}, store("gptq"), {}, "format = 'bitblas'"),
        (GPTQ | {"is_marlin_format": True}, store("gptq"), {}, "is_marlin_format = True"),
        (GPTQ | {"desc_act": True}, store("gptq"), {f"{Q_PROJ}.g_idx": None}, f"no tensor {Q_PROJ}.g_idx"),
        (GPTQ, store("gptq"), {f"{Q_PROJ}.g_idx": np.zeros(128, np.int32)}, "group 0 has 128 columns"),
        (GPTQ, store("gptq"), {f"{Q_PROJ}.g_idx": np.full(128, 2, np.int32)}, "has group 2, but there are 2"),
        (
            GPTQ,
            store("gptq"),
            {f"{Q_PROJ}.g_idx": np.full(128, -1, np.int32)},
            "has group -1, but there are 2",
        ),
        (GPTQ, store("gptq"), {f"{Q_PROJ}.g_idx": np.zeros(64, np.int32)}, "g_idx has shape"),
        (GPTQ, store("gptq"), {f"{Q_PROJ}.qweight": np.zeros((16, 128), np.int64)}, "qweight is I64"),
        (compressed_config(num_bits=2), store("compressed"), {}, "num_bits = 2"),
        (compressed_config(strategy="tensor"), store("compressed"), {}, "strategy = 'tensor'"),
        (compressed_config(type="float"), store("compressed"), {}, "type = 'float'"),
        (compressed_config() | {"format": "nvfp4"}, store("compressed"), {}, "format = 'nvfp4'"),
        (compressed_config() | {"config_groups": {}}, store("compressed"), {}, "config_groups should be"),
        (
            compressed_config() | {"kv_cache_scheme": {"num_bits": 8}},
            store("compressed"),
            {},
            "kv_cache_scheme",
        ),
        (
            compressed_config(),
            store("compressed"),
            {f"{Q_PROJ}.weight_shape": np.array([128, 256])},
            r"weight_shape is \[128, 256\], config.json says \[128, 128\]",
        ),
        (
            compressed_config(),
            store("compressed"),
            {f"{Q_PROJ}.weight_zero_point": None},
            f"no tensor {Q_PROJ}.weight_zero_point",
        ),
    ],
)
def test_what_is_refused(
    quantization: dict[str, Any], linear: Any, tensors: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = {"quantization_config": quantization}
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_directory(tmp_path, TINY, config=config, linear=linear, tensors=tensors))


@pytest.mark.parametrize(
    ("quantization", "linear", "scales"),
    [
        (AWQ, store("awq"), "scales"),
        (GPTQ, store("gptq"), "scales"),
        (compressed_config(), store("compressed"), "weight_scale"),
    ],
)
def test_a_scale_that_is_not_finite_is_named(
    quantization: dict[str, Any], linear: Any, scales: str, tmp_path: Path
) -> None:
    shape = (128, 2) if scales == "weight_scale" else (2, 128)
    tensors = {f"{Q_PROJ}.{scales}": np.full(shape, np.inf, np.float16)}
    config = {"quantization_config": quantization}
    checkpoint = open_checkpoint(
        write_directory(tmp_path, TINY, config=config, linear=linear, tensors=tensors)
    )
    with pytest.raises(CheckpointError, match=f"q_proj.{scales} has a value that is not finite"):
        checkpoint.tensor("layers.0.self_attn.q_proj").dequantize()


def test_sym_that_is_not(tmp_path: Path) -> None:
    config = {"quantization_config": GPTQ | {"sym": True}}
    checkpoint = open_checkpoint(write_directory(tmp_path, TINY, config=config, linear=store("gptq")))
    with pytest.raises(CheckpointError, match=r"zero points other than 8, but .* says sym"):
        checkpoint.tensor("layers.0.self_attn.q_proj").dequantize()

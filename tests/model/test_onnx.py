"""The emitted network against transformers' float32 logits and against a float64 decoder in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from closeness import largest_kl, relative
from engines import MAX_SEQ_LEN, all_logits, tiny_executor
from model_directories import write_directory
from reference_decoder import reference_logits
from tiny_llama import TINY, TINY_GGUF, TinyLlama

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.errors import BuildError
from edgellm.model.decoder import build_decoder
from edgellm.model.onnx import OnnxGraph
from edgellm.model.onnx_file import OnnxFile
from edgellm.model.onnx_linear import Linears, Value
from edgellm.model.rotary import LinearScaling
from edgellm.model.weights import Dense, Grouped, Groups, Weight

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "decoder.npz")
TIED = TINY["3/1 heads of 64, tied"]


@pytest.mark.parametrize("name", TINY_GGUF)
def test_the_reference_decoder_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY[name].write_gguf(tmp_path / "tiny.gguf"))
    assert relative(reference_logits(checkpoint, GOLDEN[f"{name}.tokens"]), GOLDEN[f"{name}.logits"]) < 1e-5


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.scaling])
def test_the_golden_files_of_scaled_models_tell_the_scaling(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY[name].write_gguf(tmp_path / "tiny.gguf"))
    unscaled: Any = _Changed(checkpoint, {"rotary_scaling": None})
    assert relative(reference_logits(unscaled, GOLDEN[f"{name}.tokens"]), GOLDEN[f"{name}.logits"]) > 0.02


@pytest.mark.parametrize("compute", ["fp32", "int8"])
@pytest.mark.parametrize("name", TINY_GGUF)
def test_an_unquantized_model_gives_transformers_logits(name: str, compute: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY[name].write_gguf(tmp_path / "tiny.gguf"))
    executor = tiny_executor(checkpoint, tmp_path / "engine", compute=compute)  # type: ignore[arg-type]
    assert relative(all_logits(executor, GOLDEN[f"{name}.tokens"].tolist()), GOLDEN[f"{name}.logits"]) < 1e-4


QUANTIZED = [
    ("Q4_1", "Q8_0", TIED),
    ("Q4_0", "Q8_0", TIED),
    ("Q8_0", "Q8_0", TIED),
    ("Q4_1", "Q4_1", TIED),
    ("Q4_0", "Q4_0", TIED),
    ("Q4_1", "F16", TIED),
    ("F16", "Q8_0", TIED),
    ("BF16", "BF16", TIED),
    ("Q4_1", "Q8_0", replace(TIED, tied=False)),
    ("Q8_0", "Q4_1", replace(TIED, tied=False, heads=4, kv_heads=2)),
]


@pytest.mark.parametrize(("linear", "embedding", "tiny"), QUANTIZED)
def test_a_quantized_model_computes_its_dequantized_weights(
    linear: str, embedding: str, tiny: TinyLlama, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "tiny.gguf", linear, embedding))
    tokens = np.random.default_rng(0).integers(0, tiny.vocab, 12).tolist()
    expected = reference_logits(checkpoint, tokens)
    exact = tiny_executor(checkpoint, tmp_path / "fp32", compute="fp32")
    assert relative(all_logits(exact, tokens), expected) < 1e-4
    # What is left is the rounding of activations to 8 bits. Of these weights, made to be sensitive, one wrong
    # nibble order, scale or offset costs more than 0.3.
    fast = tiny_executor(checkpoint, tmp_path / "int8", compute="int8")
    assert largest_kl(all_logits(fast, tokens), expected) < 0.01


K_HIDDEN = {"hidden": 256, "inner": 512}
K_TIED = replace(TIED, **K_HIDDEN, heads=4)  # type: ignore[arg-type]
QWEN2 = replace(TINY["qwen2, untied"], **K_HIDDEN, heads=16, kv_heads=8)  # type: ignore[arg-type]
QWEN3 = replace(TINY["qwen3, tied"], **K_HIDDEN, heads=8)  # type: ignore[arg-type]
MEDIUM = {"v_proj": "Q6_K", "down_proj": "Q6_K"}
MIXED: list[tuple[str, str, dict[str, str], TinyLlama]] = [
    ("Q4_K", "Q6_K", {}, K_TIED),
    ("Q5_K", "Q5_K", {}, K_TIED),
    ("Q6_K", "Q6_K", {}, QWEN2),
    # As llama.cpp's Q4_K_M and Q5_K_M are, and Q4_K_M of a model some of whose widths are no multiple of 256.
    ("Q4_K", "Q6_K", MEDIUM, QWEN2),
    ("Q5_K", "Q6_K", MEDIUM, QWEN3),
    ("Q4_K", "Q8_0", {"v_proj": "Q8_0", "down_proj": "Q5_0", "q_proj": "Q5_1"}, QWEN2),
    ("Q4_0", "Q4_K", {"k_proj": "F16", "up_proj": "Q4_K", "lm_head": "Q6_K"}, QWEN2),
    ("Q5_0", "Q8_0", {"gate_proj": "Q5_1"}, QWEN3),
]


@pytest.mark.parametrize(("linear", "embedding", "others", "tiny"), MIXED)
def test_a_file_of_mixed_types_computes_its_dequantized_weights(
    linear: str, embedding: str, others: dict[str, str], tiny: TinyLlama, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "tiny.gguf", linear, embedding, others))
    tokens = np.random.default_rng(0).integers(0, tiny.vocab, 12).tolist()
    expected = reference_logits(checkpoint, tokens)
    exact = tiny_executor(checkpoint, tmp_path / "fp32", compute="fp32")
    assert relative(all_logits(exact, tokens), expected) < 1e-4
    fast = tiny_executor(checkpoint, tmp_path / "int8", compute="int8")
    # Q5_K without its middle taken away: 0.18.
    assert largest_kl(all_logits(fast, tokens), expected) < 0.01


@pytest.mark.parametrize("name", TINY_GGUF)
def test_a_half_precision_cache_costs_half_and_little_accuracy(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY[name].write_gguf(tmp_path / "tiny.gguf"))
    half = tiny_executor(checkpoint, tmp_path / "half", compute="fp32", kv_cache="fp16")
    whole = tiny_executor(checkpoint, tmp_path / "whole", compute="fp32")
    assert half.info.kv_bytes_per_token * 2 == whole.info.kv_bytes_per_token
    error = relative(all_logits(half, GOLDEN[f"{name}.tokens"].tolist()), GOLDEN[f"{name}.logits"])
    assert 1e-6 < error < 5e-3


@pytest.mark.parametrize("size", [16, 48, 80])
def test_a_head_of_any_multiple_of_16(size: int, tmp_path: Path) -> None:
    tiny = replace(TIED, head_size=size)
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", tiny))
    tokens = np.random.default_rng(0).integers(0, tiny.vocab, 12).tolist()
    exact = tiny_executor(checkpoint, tmp_path / "engine", compute="fp32")
    assert relative(all_logits(exact, tokens), reference_logits(checkpoint, tokens)) < 1e-4


@pytest.mark.parametrize("size", [8, 20, 24, 72])
def test_a_head_of_another_size_is_refused_by_name(size: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", replace(TIED, head_size=size)))
    with pytest.raises(BuildError, match=f"head_size is {size}; .* multiples of 16"):
        tiny_executor(checkpoint, tmp_path / "engine", compute="fp32")


def test_a_context_beyond_a_sliding_window_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TIED.write_gguf(tmp_path / "tiny.gguf"))
    wide: Any = _Changed(checkpoint, {"sliding_window": MAX_SEQ_LEN})
    tiny_executor(wide, tmp_path / "engine", compute="int8")
    narrow: Any = _Changed(checkpoint, {"sliding_window": MAX_SEQ_LEN - 1})
    with pytest.raises(BuildError, match=f"sliding window of {MAX_SEQ_LEN - 1} tokens"):
        tiny_executor(narrow, tmp_path / "engine", compute="int8")


def test_quantized_weights_stay_quantized_and_are_stored_once(tmp_path: Path) -> None:
    tiny = replace(TIED, hidden=256, inner=512)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "Q4_1", "Q8_0")
    tiny_executor(open_checkpoint(path), tmp_path / "engine", compute="int8")
    # Q4_1 takes 20 bytes a group, here 24 (float32 scale and offset); Q8_0 34, here 36.
    assert (tmp_path / "engine" / "model.onnx.data").stat().st_size < 1.35 * path.stat().st_size


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "MambaForCausalLM"}, "MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"position_embedding_type": "alibi"}, "alibi"),
        ({"num_key_value_heads": 2}, "2 key/value heads"),
        ({"qk_layernorm": True}, r"lacks layers\.0\.self_attn\.q_norm, but its qk_layernorm is True"),
        ({"attn_bias": True}, r"lacks layers\.0\.self_attn\.q_proj\.bias, but its attn_bias is True"),
        ({"rotary_scaling": LinearScaling(factor=0.5)}, "rotary_scaling makes no sense: factor 0.5"),
        ({"vocab_size": 266}, "token_embd.weight"),
        ({"intermediate_size": 160}, "ffn_gate.weight"),
    ],
)
def test_what_cannot_be_built_is_named(change: dict[str, object], named: str, tmp_path: Path) -> None:
    checkpoint: Any = _Changed(open_checkpoint(TIED.write_gguf(tmp_path / "tiny.gguf")), change)
    file = OnnxFile(tmp_path / "model.onnx")
    graph = OnnxGraph(file, checkpoint.spec, max_seq_len=32, compute="int8", progress=lambda part, done: None)
    with pytest.raises(Exception, match=named) as caught:
        build_decoder(graph, checkpoint)
    assert type(caught.value).__name__ in {"BuildError", "CheckpointError"}
    file.abandon()


@pytest.mark.parametrize(
    ("name", "field", "tensor"),
    [("qwen2, untied", "attn_bias", "q_proj.bias"), ("qwen3, untied", "qk_layernorm", "q_norm")],
)
def test_a_tensor_that_the_numbers_deny_is_not_left_out_silently(
    name: str, field: str, tensor: str, tmp_path: Path
) -> None:
    checkpoint: Any = _Changed(open_checkpoint(TINY[name].write_gguf(tmp_path / "tiny.gguf")), {field: False})
    with pytest.raises(BuildError, match=f"has layers.0.self_attn.{tensor}, but its {field} is False"):
        tiny_executor(checkpoint, tmp_path / "engine", compute="int8")


class _Changed:
    """A checkpoint whose spec says something else."""

    def __init__(self, checkpoint: Checkpoint, change: dict[str, object]) -> None:
        self._checkpoint = checkpoint
        self.spec = msgspec.structs.replace(checkpoint.spec, **change)

    def __getattr__(self, name: str) -> object:
        return getattr(self._checkpoint, name)


def test_a_group_that_onnx_runtime_has_no_kernel_for_is_refused_by_name(tmp_path: Path) -> None:
    groups = Groups(q=np.zeros((4, 24), np.uint8), scale=np.ones((4, 1), np.float32))
    weight = Grouped("blk.0.ffn_up.weight", (4, 24), 4, 24, False, groups.rows)
    file = OnnxFile(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"blk\.0\.ffn_up\.weight has groups of 24"):
        Linears(file, "int8").project(Value("x", 2, 24), [weight], [None], "y")
    file.abandon()


def _random_dense(name: str, shape: tuple[int, ...], seed: int) -> Dense:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Dense(name, shape, "f32", lambda begin, end: values[begin:end])


def _random_grouped(name: str, shape: tuple[int, int], bits: int, group: int, seed: int) -> Grouped:
    chance = np.random.default_rng(seed)
    low, high, dtype = (0, 16, np.uint8) if bits == 4 else (-128, 128, np.int8)
    groups = Groups(
        q=chance.integers(low, high, shape, dtype),
        scale=chance.uniform(0.01, 0.1, (shape[0], shape[1] // group)).astype(np.float32),
        offset=chance.normal(0, 0.3, (shape[0], shape[1] // group)).astype(np.float32),
    )
    return Grouped(name, shape, bits, group, True, groups.rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_projection_of_mixed_parts_with_biases(bits: int, group: int, rank: int, tmp_path: Path) -> None:
    """Parts of different layouts, one of them biased, against float64; groups with offsets, 4 and 8 bits."""
    import onnxruntime as ort

    k = 256
    parts: list[Weight] = [
        _random_grouped("a", (24, k), bits, group, 1),
        _random_grouped("b", (8, k), 12 - bits, 32, 2),
        _random_dense("c", (16, k), 3),
    ]
    bias = _random_dense("c.bias", (16,), 4)
    file = OnnxFile(tmp_path / "model.onnx")
    shape: list[int | str] = ["B", "S", k] if rank == 3 else ["R", k]
    x = Value(file.input("x", np.float32, shape), rank, k)
    y = Linears(file, "int8").project(x, parts, [None, None, bias], "y")
    file.output(y.name, np.float32, [*shape[:-1], y.width])
    file.close()

    values = np.random.default_rng(5).standard_normal((2, 3, k)[3 - rank :]).astype(np.float32)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": values})
    expected = np.concatenate([values.astype(np.float64) @ part.dequantize().T for part in parts], axis=-1)
    expected[..., 32:] += bias.dequantize()
    assert got.shape == expected.shape
    # 8 bits of an activation leave an error of at most max|x|/254 each: under 1 % of the result's size.
    assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < 0.01

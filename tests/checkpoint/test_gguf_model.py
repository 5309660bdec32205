"""Canonical weights of a GGUF model against `gguf.quants`, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from ggufs import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, Llama, gguf_reader, tokens
from numpy.typing import NDArray

from edgellm.checkpoint import open_checkpoint
from edgellm.checkpoint.gguf import GgufFile
from edgellm.errors import CheckpointError
from edgellm.model.rotary import DivisorScaling, LinearScaling, YarnScaling
from edgellm.model.weights import Dense, Grouped

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _canonical(name: str) -> str:
    """blk.0.attn_q.weight → layers.0.self_attn.q_proj; written apart from the reader's own table."""
    top = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm", "output.weight": "lm_head"}
    if name in top:
        return top[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{PARTS[part]}" + (".bias" if kind == "bias" else "")


def _halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Row 2i + h of a head → row h · d/2 + i, one by one."""
    moved = np.empty_like(rows)
    width = len(rows) // heads
    for head in range(heads):
        for pair in range(width // 2):
            for half in (0, 1):
                moved[head * width + half * (width // 2) + pair] = rows[head * width + 2 * pair + half]
    return moved


def _expected(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    if "attn_q" in name:
        return _halves(values, HEADS)
    if "attn_k" in name:
        return _halves(values, KV_HEADS)
    return values


HEAD_NORMS = {f"blk.{layer}.attn_{part}_norm.weight": (HEAD,) for layer in range(LAYERS) for part in "qk"}
YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
BIASES = {
    f"blk.{layer}.attn_{part}.bias": (n,)
    for layer in range(LAYERS)
    for part, n in (("q", HIDDEN), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD))
}


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_every_tensor_is_what_the_gguf_package_dequantizes_bit_for_bit(tmp_path: Path, kind: Type) -> None:
    path = tmp_path / "tiny.gguf"
    written = Llama(linear=kind, extra={"output.weight": (len(tokens()), HIDDEN), **BIASES}).write(path)
    checkpoint = open_checkpoint(path)
    for name, values in written.items():
        weight = checkpoint.tensor(_canonical(name))
        assert weight.shape == values.shape
        np.testing.assert_array_equal(weight.dequantize(), _expected(name, values), err_msg=name)


def test_permutation_is_the_one_that_keeps_attention_scores(tmp_path: Path) -> None:
    """Adjacent-pair rotary on GGUF rows equals half-split rotary on ours: the definition, not the formula."""
    path = tmp_path / "tiny.gguf"
    written = Llama(linear=Type.F32).write(path)
    x = np.random.default_rng(3).normal(size=(2, HIDDEN))  # a query's and a key's input
    angle = np.array([3.0, 11.0])[:, None] * 10000.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = np.cos(angle), np.sin(angle)

    def score(q: NDArray[Any], k: NDArray[Any], *, halves: bool) -> float:
        rotated = []
        for vector, c, s in zip((q, k), cos, sin, strict=True):
            a, b = (vector[: HEAD // 2], vector[HEAD // 2 :]) if halves else (vector[::2], vector[1::2])
            rotated.append((a * c - b * s, a * s + b * c))
        return float(sum(np.dot(one, other) for one, other in zip(*rotated, strict=True)))

    checkpoint = open_checkpoint(path)
    ours = [checkpoint.tensor(f"layers.0.self_attn.{part}_proj").dequantize()[:HEAD] for part in "qk"]
    theirs = [written[f"blk.0.attn_{part}.weight"][:HEAD] for part in "qk"]
    assert score(ours[0] @ x[0], ours[1] @ x[1], halves=True) == pytest.approx(
        score(theirs[0] @ x[0], theirs[1] @ x[1], halves=False), rel=1e-6
    )


def test_groups_have_the_canonical_form(tmp_path: Path) -> None:
    for kind, bits, asymmetric in ((Type.Q4_0, 4, True), (Type.Q4_1, 4, True), (Type.Q8_0, 8, False)):
        path = tmp_path / f"{kind.name}.gguf"
        Llama(linear=kind).write(path)
        weight = open_checkpoint(path).tensor("layers.1.mlp.down_proj")
        assert isinstance(weight, Grouped)
        assert (weight.bits, weight.group, weight.asymmetric) == (bits, 32, asymmetric)
        groups = weight.read()
        assert groups.q.shape == (HIDDEN, INNER)
        assert groups.q.dtype == (np.uint8 if bits == 4 else np.int8)
        assert groups.scale.shape == (HIDDEN, INNER // 32)
        assert groups.q.flags.c_contiguous
        assert (groups.offset is not None or groups.zero is not None) == asymmetric


def test_spec_and_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "Tiny-Model.gguf"
    Llama().write(path)
    checkpoint = open_checkpoint(path)
    spec = checkpoint.spec
    assert (spec.architecture, spec.vocab_size, spec.hidden_size) == (
        "LlamaForCausalLM",
        len(tokens()),
        HIDDEN,
    )
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_size) == (HEADS, KV_HEADS, HEAD)
    assert (spec.num_hidden_layers, spec.intermediate_size, spec.max_position_embeddings) == (
        LAYERS,
        INNER,
        128,
    )
    assert spec.norm_epsilon == pytest.approx(1e-5)
    assert spec.tie_word_embeddings
    assert not spec.attn_bias
    assert not checkpoint.has("lm_head")
    assert not checkpoint.has("layers.0.self_attn.q_proj.bias")
    assert checkpoint.name == "Tiny-Model"
    assert (checkpoint.bos_id, checkpoint.bos_token, checkpoint.add_bos) == (1, "<|im_start|>", False)
    assert (checkpoint.eos_ids, checkpoint.eos_token) == ((0, 2), "<|im_end|>")
    quantization = checkpoint.quantization
    assert (quantization.quant_algo, quantization.group_size, quantization.has_zero_point) == (
        "W4A16",
        32,
        True,
    )
    assert quantization.exclude_modules == ("embed_tokens",)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_rows_of_qwen_are_in_their_own_order(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    extra = BIASES if architecture == "qwen2" else HEAD_NORMS
    written = Llama(architecture=architecture, extra=extra).write(path)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.spec.attn_bias, checkpoint.spec.qk_layernorm) == (
        architecture == "qwen2",
        architecture == "qwen3",
    )
    assert checkpoint.spec.architecture == f"Q{architecture[1:]}ForCausalLM"
    for name, values in written.items():
        np.testing.assert_array_equal(checkpoint.tensor(_canonical(name)).dequantize(), values, err_msg=name)


@pytest.mark.parametrize(
    ("architecture", "extra", "without"),
    [
        ("qwen2", BIASES, "blk.1.attn_k.bias"),
        ("qwen3", HEAD_NORMS, "blk.0.attn_q_norm.weight"),
        ("qwen3", HEAD_NORMS, "blk.1.attn_k_norm.weight"),
    ],
)
def test_what_a_family_always_has_is_missed_by_name(
    architecture: str, extra: dict[str, tuple[int, ...]], without: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(architecture=architecture, extra=extra, without=frozenset({without})).write(path)
    with pytest.raises(CheckpointError, match=f"has no tensor {without}"):
        open_checkpoint(path)


def test_a_norm_on_heads_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(extra=HEAD_NORMS).write(path)
    with pytest.raises(CheckpointError, match=r"attn_q_norm\.weight, which edgellm's LlamaForCausalLM lacks"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({"type": "none"}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "linear", "factor": 4.0}, LinearScaling(factor=4.0)),
        ({"factor": 4.0}, LinearScaling(factor=4.0)),
        ({"type": "yarn", "factor": 4.0}, YarnScaling(factor=4.0, original_max_position_embeddings=128)),
        (
            {
                "type": "yarn",
                "factor": 2.0,
                "original_context_length": 64,
                "yarn_beta_fast": 16.0,
                "yarn_beta_slow": 2.0,
            },
            YarnScaling(factor=2.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0),
        ),
    ],
)
def test_rotary_scaling_by_keys(
    keys: dict[str, Any], scaling: LinearScaling | YarnScaling | None, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(keys={f"llama.rope.scaling.{key}": value for key, value in keys.items()}).write(path)
    assert open_checkpoint(path).spec.rotary_scaling == scaling


def test_rotary_scaling_by_the_older_key(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(keys={"llama.rope.scale_linear": 2.0}).write(path)
    assert open_checkpoint(path).spec.rotary_scaling == LinearScaling(factor=2.0)


def test_rotary_scaling_by_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    llama = Llama(extra={"rope_freqs.weight": (HEAD // 2,)}, linear=Type.F32)
    llama.write(path)
    divisors = np.linspace(1, 8, HEAD // 2, dtype="<f4")
    offset = GgufFile(path).tensors["rope_freqs.weight"].offset
    raw = bytearray(path.read_bytes())
    raw[offset : offset + divisors.nbytes] = divisors.tobytes()
    path.write_bytes(raw)
    assert open_checkpoint(path).spec.rotary_scaling == DivisorScaling(divisors=tuple(divisors.tolist()))

    divisors[1] = 0
    raw[offset : offset + divisors.nbytes] = divisors.tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{HEAD // 2} positive divisors"):
        open_checkpoint(path)
    llama.keys = {"llama.rope.scaling.factor": 2.0}
    llama.write(path)
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(path)
    Llama(extra={"rope_freqs.weight": (HEAD,)}, linear=Type.F32).write(path)
    with pytest.raises(CheckpointError, match=rf"rope_freqs\.weight is F32 of shape \({HEAD},\)"):
        open_checkpoint(path)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    for window, longest in ((0, 128), (32, 32), (4096, 128)):
        Llama(keys={"llama.attention.sliding_window": window}).write(path)
        assert open_checkpoint(path).spec.max_context == longest


def test_further_end_of_turn_keys(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(keys={"tokenizer.ggml.eot_token_id": 7}).write(path)
    assert open_checkpoint(path).eos_ids == (0, 2, 7)


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
    ],
)
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(keys={key: None}).write(path)
    with pytest.raises(CheckpointError, match=key):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"llama.block_count": "two"}, r"llama\.block_count should be an integer"),
        ({"llama.block_count": [1, 2]}, r"llama\.block_count should be an integer"),
        ({"llama.block_count": 0}, r"llama\.block_count is 0"),
        ({"llama.block_count": 3}, r"blk\.2\.attn_norm\.weight"),
        ({"llama.block_count": 2**32 - 1}, r"llama\.block_count is 4294967295"),
        ({"llama.feed_forward_length": 128}, r"ffn_gate\.weight has shape"),
        ({"llama.attention.head_count": 3}, r"head_count"),
        ({"llama.attention.value_length": 8}, r"value_length"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count"),
        ({"llama.rope.freq_base": -1.0}, r"rope\.freq_base"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type longrope"),
        ({"llama.rope.scaling.type": 3}, r"rope\.scaling\.type should be a string"),
        ({"llama.rope.scaling.factor": -2.0}, r"factor -2\.0 should be 1 or more"),
        ({"llama.rope.scaling.type": "yarn"}, r"factor 0\.0 should be 1 or more"),
        (YARN | {"llama.rope.scaling.yarn_beta_slow": 40.0}, "beta_slow 40"),
        (YARN | {"llama.rope.scaling.original_context_length": 0}, "original_context_length is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model t5"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "eos_token_id is 100000"),
        ({"tokenizer.chat_template": 5}, "chat_template should be a string"),
    ],
)
def test_what_does_not_agree_is_named(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(keys=keys).write(path)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(path)


def test_no_end_of_answer(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    plain = [token.replace("<|im_end|>", "<|a|>").replace("<|endoftext|>", "<|b|>") for token in tokens()]
    Llama(keys={"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.tokens": plain}).write(path)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        open_checkpoint(path)


def test_architecture_and_tensors_that_are_not_known(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(architecture="gemma3").write(path)
    with pytest.raises(CheckpointError, match="gemma3"):
        open_checkpoint(path)
    Llama(extra={"blk.0.attn_output.bias": (HIDDEN,)}).write(path)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_output\.bias"):
        open_checkpoint(path)
    Llama(without=frozenset({"blk.1.ffn_up.weight"})).write(path)
    with pytest.raises(CheckpointError, match=r"no tensor blk\.1\.ffn_up\.weight"):
        open_checkpoint(path)
    Llama(extra={"blk.0.attn_q.bias": (HIDDEN,)}).write(path)
    with pytest.raises(CheckpointError, match=r"no tensor blk\.0\.attn_k\.bias"):
        open_checkpoint(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "canonical", "layout"),
    [
        ("blk.1.ffn_up.weight", "layers.1.mlp.up_proj", "<e"),  # the scale of a Q4_1 block
        ("token_embd.weight", "embed_tokens", "<e"),  # the scale of a Q8_0 block
        ("output_norm.weight", "norm", "<f"),
    ],
)
def test_values_that_are_not_finite_are_named(
    tmp_path: Path, name: str, canonical: str, layout: str, bad: float
) -> None:
    path = tmp_path / "tiny.gguf"
    Llama().write(path)
    offset = GgufFile(path).tensors[name].offset
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, offset, bad)
    path.write_bytes(raw)
    weight = open_checkpoint(path).tensor(canonical)
    with pytest.raises(CheckpointError, match=rf"tensor {name} has a .* in row 0 that is not finite"):
        weight.read()


def test_large_finite_values_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    Llama().write(path)
    offset = GgufFile(path).tensors["output_norm.weight"].offset
    raw = bytearray(path.read_bytes())
    struct.pack_into("<2f", raw, offset, 3e38, 3e38)  # their sum overflows float32
    path.write_bytes(raw)
    norm = open_checkpoint(path).tensor("norm")
    assert isinstance(norm, Dense)
    np.testing.assert_array_equal(norm.read()[:2], np.array([3e38, 3e38], np.float32))


@pytest.mark.model
def test_real_model_dequantizes_as_the_gguf_package_does(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    heads = {"attn_q": 9, "attn_k": 3}
    for tensor in gguf_reader(smollm2_gguf).tensors:
        if not (tensor.name.startswith(("blk.0.", "blk.29.", "output_norm"))):
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = _halves(values, heads[part])
        np.testing.assert_array_equal(checkpoint.tensor(_canonical(tensor.name)).dequantize(), values)

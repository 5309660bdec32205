"""Model directories: which files make which model, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggufs import TEMPLATE
from model_directories import stored_name, tokenizer_json, write_directory
from tiny_llama import TINY, TinyLlama

from edgellm.checkpoint import open_checkpoint
from edgellm.errors import CheckpointError
from edgellm.model.rotary import YarnScaling
from edgellm.model.weights import Dense

TIED = TINY["3/1 heads of 64, tied"]
UNTIED = TINY["9/3 heads of 16, untied"]


@pytest.mark.parametrize("tiny", [TIED, UNTIED])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_tensor_is_read_exactly(tiny: TinyLlama, dtype: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", tiny, dtype=dtype))
    weights = tiny.weights()
    for name, values in weights.items():
        weight = checkpoint.tensor(name)
        assert isinstance(weight, Dense)
        assert weight.dtype == {np.float32: "f32", np.float16: "f16"}[dtype]
        assert (weight.dequantize() == values.astype(dtype)).all()
    assert checkpoint.has("lm_head") is not tiny.tied
    assert not checkpoint.has("layers.2.mlp.up_proj")
    assert checkpoint.name == "tiny"
    spec = checkpoint.spec
    assert (spec.hidden_size, spec.intermediate_size, spec.num_hidden_layers) == (tiny.hidden, tiny.inner, 2)
    assert (spec.num_attention_heads, spec.num_key_value_heads) == (tiny.heads, tiny.kv_heads)
    assert (spec.head_size, spec.rotary_base, spec.norm_epsilon) == (tiny.head_size, tiny.rotary_base, 1e-5)
    assert (spec.architecture, spec.tie_word_embeddings) == ("LlamaForCausalLM", tiny.tied)
    assert checkpoint.quantization.quant_algo == "NO_QUANT"


def test_text_files(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path, TIED))
    assert checkpoint.tokenizer_json().decode() == tokenizer_json()
    assert checkpoint.chat_template == TEMPLATE
    # <|endoftext|> ends an answer though no file says so; <|im_end|> is named by three.
    assert checkpoint.eos_ids == (0, 2)
    assert (checkpoint.bos_id, checkpoint.bos_token, checkpoint.eos_token) == (
        1,
        "<|im_start|>",
        "<|im_end|>",
    )
    assert not checkpoint.add_bos


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": "file"}, "file"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "one"}]}}, "one"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "two"},
                        {"name": "default", "template": "one"},
                    ]
                }
            },
            "one",
        ),
        ({"tokenizer_config.json": {}}, None),
        ({"tokenizer_config.json": None}, None),
    ],
)
def test_where_a_template_can_be(files: dict[str, Any], template: str | None, tmp_path: Path) -> None:
    assert open_checkpoint(write_directory(tmp_path, TIED, files=files)).chat_template == template


def test_whether_bos_is_added(tmp_path: Path) -> None:
    said: dict[str, Any] = {"tokenizer_config.json": {"bos_token": "<|im_start|>", "add_bos_token": True}}
    assert open_checkpoint(write_directory(tmp_path, TIED, files=said)).add_bos

    processed = json.loads(tokenizer_json())
    processed["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}],
            },
        ],
    }
    templated = {"tokenizer.json": processed, "tokenizer_config.json": {"bos_token": "<|im_start|>"}}
    assert open_checkpoint(write_directory(tmp_path, TIED, files=templated)).add_bos


def _biases(*linears: str) -> dict[str, np.ndarray[Any, Any]]:
    sizes = {name.split(".", 2)[-1]: len(values) for name, values in TIED.weights().items()}
    return {
        f"model.layers.{layer}.{linear}.bias": np.full(sizes[linear], layer + 0.5, np.float32)
        for layer in range(2)
        for linear in linears
    }


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKVO = (*QKV, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
HEAD_NORMS: dict[str, Any] = {
    f"model.layers.{layer}.self_attn.{part}_norm.weight": np.full(64, layer + 1, np.float32)
    for layer in range(2)
    for part in "qk"
}


@pytest.mark.parametrize(
    ("config", "tensors", "flags"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, {}, (False, False, False)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, {}, (False, False, False)),
        ({"architectures": ["Qwen2ForCausalLM"]}, _biases(*QKV), (True, False, False)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": False,
                "sliding_window": 32,
                "max_window_layers": 1,
                "layer_types": ["full_attention"] * 2,
            },
            _biases(*QKV),
            (True, False, False),
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, HEAD_NORMS, (False, False, True)),
        ({"attention_bias": True}, _biases(*QKVO), (True, False, False)),
        ({"mlp_bias": True}, _biases(*MLP), (False, True, False)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}, (False, False, False)),
        ({"rope_scaling": {"type": "default"}}, {}, (False, False, False)),
        ({"num_key_value_heads": 1, "head_dim": 64, "_name_or_path": "x"}, {}, (False, False, False)),
    ],
)
def test_what_a_family_has(
    config: dict[str, Any], tensors: dict[str, Any], flags: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path, TIED, config=config, tensors=tensors))
    spec = checkpoint.spec
    assert (spec.attn_bias, spec.mlp_bias, spec.qk_layernorm) == flags
    for stored, values in tensors.items():
        name = stored.removeprefix("model.").removesuffix(".weight")
        assert checkpoint.has(name)
        assert (checkpoint.tensor(name).dequantize() == values).all()


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, 32),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, None),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 32}, 32),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 32,
                "max_window_layers": 2,
            },
            None,
        ),
    ],
)
def test_windows(config: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    tensors = HEAD_NORMS if "Qwen3" in config["architectures"][0] else {}
    checkpoint = open_checkpoint(write_directory(tmp_path, TIED, config=config, tensors=tensors))
    assert checkpoint.spec.sliding_window == window


def test_scaling_as_older_files_have_it(tmp_path: Path) -> None:
    config = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    spec = open_checkpoint(write_directory(tmp_path, TIED, config=config)).spec
    assert spec.rotary_base == 5e5
    assert spec.rotary_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=4096)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "architectures None"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types should be a list of 2"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias = True"),
        ({"architectures": ["Qwen2ForCausalLM"], "mlp_bias": True}, "mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has partial_rotary_factor"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
            "rope_scaling has rope_type = 'longrope'",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_scaling has type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling: factor 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "rope_scaling has mscale = 0.7"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no low_freq_factor"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has factor = 8.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling should be an object"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_attention_heads": "3"}, "num_attention_heads should be an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"rms_norm_eps": None}, "no rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"vocab_size": 264}, "embed_tokens.weight has shape .265, 96., config.json says .264, 96."),
        ({"intermediate_size": 64}, "gate_proj.weight has shape .128, 96., config.json says .64, 96."),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "layers.1.* has no place"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"eos_token_id": 265}, "eos_token_id is 265"),
        ({"eos_token_id": "x"}, "eos_token_id should be"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_a_config_that_is_refused(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_directory(tmp_path, TIED, config=config))


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"model.norm.weight": None}, "no tensor model.norm.weight"),
        ({"model.norm.weight": np.zeros(96, np.int32)}, "model.norm.weight is I32"),
        ({"model.layers.0.mlp.router.weight": np.zeros(3, np.float32)}, "router.weight has no place"),
        (_biases("mlp.up_proj"), "up_proj.bias has no place"),
    ],
)
def test_tensors_that_are_refused(tensors: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_directory(tmp_path, TIED, tensors=tensors))


def test_tensors_that_are_not_used(tmp_path: Path) -> None:
    extra = {
        "lm_head.weight": TIED.weights()["embed_tokens"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(32, np.float32),
    }
    assert not open_checkpoint(write_directory(tmp_path, TIED, tensors=extra)).has("lm_head")


@pytest.mark.parametrize("piece", [1 << 22, 200])
def test_a_tied_model_with_another_head_is_refused(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.checkpoint.huggingface._PIECE_ELEMENTS", piece)
    for number, place in enumerate(((0, 0), (-1, -1))):
        head = TIED.weights()["embed_tokens"].copy()
        head[place] += 1
        path = write_directory(tmp_path / f"one{number}", TIED, tensors={"lm_head.weight": head})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
            open_checkpoint(path)
    path = write_directory(tmp_path / "short", TIED, tensors={"lm_head.weight": head[:-1]})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_when_it_is_read(value: float, tmp_path: Path) -> None:
    name = "layers.1.mlp.up_proj"
    bad = TIED.weights()[name]
    bad[3, 5] = value
    tensors = {f"{stored_name(name)}.weight": bad}
    checkpoint = open_checkpoint(write_directory(tmp_path, TIED, tensors=tensors))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .* not finite, at \[3, 5\]"):
        checkpoint.tensor(name).dequantize()
    with pytest.raises(CheckpointError, match=r"not finite, at \[3, 5\]"):
        checkpoint.tensor(name).dequantize(2, 6)
    checkpoint.tensor(name).dequantize(4)


def test_a_sum_that_overflows_is_no_damage(tmp_path: Path) -> None:
    large = replace(TIED).weights()["norm"]
    large[:] = 3e38
    checkpoint = open_checkpoint(write_directory(tmp_path, TIED, tensors={"model.norm.weight": large}))
    assert (checkpoint.tensor("norm").dequantize() == large).all()


WORDPIECE = {
    "model": {"type": "WordPiece", "vocab": {"a": 0}},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": "{"}, "config.json is damaged"),
        ({"config.json": '{"hidden_size": 1, "hidden_size": 2}'}, "hidden_size twice"),
        ({"tokenizer.json": None}, "cannot read .*tokenizer.json"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is damaged"),
        ({"tokenizer.json": {}}, "tokenizer.json has no tokens"),
        ({"tokenizer.json": {"added_tokens": [3]}}, "added_tokens has 3"),
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 265}}}},
            "token 265, but config.json's vocab_size is 265",
        ),
        ({"tokenizer_config.json": {"bos_token": "<s>"}}, "token '<s>', which tokenizer.json lacks"),
        ({"tokenizer_config.json": {"bos_token": 3}}, "bos_token should be"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template should be"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "chat_template should be"),
        (
            {"tokenizer_config.json": {"add_bos_token": 3, "bos_token": "<|im_end|>"}},
            "add_bos_token should be",
        ),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
    ],
)
def test_text_files_that_are_refused(files: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_directory(tmp_path, TIED, files=files))


def test_a_tokenizer_of_another_kind_is_refused_when_it_is_wanted(tmp_path: Path) -> None:
    files = {"tokenizer.json": WORDPIECE, "tokenizer_config.json": None}
    checkpoint = open_checkpoint(write_directory(tmp_path, TIED, files=files))
    with pytest.raises(CheckpointError, match="decoder that is neither ByteLevel nor SentencePiece"):
        checkpoint.tokenizer_json()


def test_nothing_ends_an_answer(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": {"model": {"vocab": {"a": 0}}},
        "tokenizer_config.json": None,
        "generation_config.json": None,
    }
    with pytest.raises(CheckpointError, match="no eos_token_id"):
        open_checkpoint(write_directory(tmp_path, TIED, files=files, config={"eos_token_id": None}))


def test_a_directory_of_pickles(tmp_path: Path) -> None:
    write_directory(tmp_path, TIED)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_a_file_instead_of_its_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name its directory"):
        open_checkpoint(write_directory(tmp_path, TIED) / "model.safetensors")

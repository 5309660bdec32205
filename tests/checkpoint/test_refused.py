"""What is computed nowhere here is refused by name: docs/models.md, "What is refused"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from engines import MAX_SEQ_LEN, tiny_executor
from ggufs import Llama
from model_directories import write_directory
from tiny_llama import TINY

from edgellm.checkpoint import open_checkpoint
from edgellm.cli import main
from edgellm.errors import BuildError, CheckpointError, UsageError

MOE, QWEN = TINY["qwen3moe, tied"], TINY["qwen"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "Qwen3NextForCausalLM"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        ({"n_group": 2}, "n_group = 2"),
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5"),
        ({"num_experts": None}, "no num_experts"),
        ({"num_experts_per_tok": None}, "no num_experts_per_tok"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_experts 6"),
        ({"num_local_experts": 5}, "num_local_experts should be num_experts, 6"),
        ({"num_experts": 5}, "mlp.gate.weight has shape .6, 64., config.json says .5, 64."),
        ({"num_experts": 7}, "mlp.gate.weight has shape .6, 64., config.json says .7, 64."),
        ({"moe_intermediate_size": 40}, "has shape .48, 64., config.json says .40, 64."),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob should be true or false"),
        ({"mlp_only_layers": [2]}, "mlp_only_layers should be a list of layers below 2"),
        ({"mlp_only_layers": [0]}, "no tensor model.layers.0.mlp.gate_proj.weight"),
        ({"decoder_sparse_step": 2}, "no tensor model.layers.0.mlp.gate_proj.weight"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_a_mixture_of_another_kind(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_directory(tmp_path, MOE, config=config))


def test_experts_of_a_dense_family(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(CheckpointError, match="num_experts = 6"):
        open_checkpoint(write_directory(tmp_path, MOE, config=config))


def test_a_shared_expert(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.shared_expert.gate_proj.weight": np.zeros((48, 64), np.float32)}
    with pytest.raises(CheckpointError, match=r"shared_expert\.gate_proj\.weight has no place"):
        open_checkpoint(write_directory(tmp_path, MOE, tensors=tensors))


def test_a_router_with_a_correction(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.gate.e_score_correction_bias": np.zeros(6, np.float32)}
    with pytest.raises(CheckpointError, match="e_score_correction_bias has no place"):
        open_checkpoint(write_directory(tmp_path, MOE, tensors=tensors))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"no_bias": False}, "no_bias = False"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"rotary_pct": 0.5}, "rotary_pct = 0.5"),
        ({"kv_channels": 16}, "kv_channels 16 · num_attention_heads 3 is not hidden_size 96"),
        ({"intermediate_size": 161}, "intermediate_size is 161, an odd number"),
        ({"intermediate_size": 80}, "mlp.w2.weight has shape .80, 96., config.json says .40, 96."),
        ({"use_cache_quantization": True}, "use_cache_quantization = True"),
        ({"visual": {"width": 1664}}, "visual = "),
        ({"seq_length": None}, "no seq_length"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = "),
    ],
)
def test_a_first_qwen_of_another_kind(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(write_directory(tmp_path, QWEN, config=config))


@pytest.mark.parametrize("bias", ["attn.c_proj.bias", "mlp.w1.bias"])
def test_biases_that_the_first_qwen_lacks(bias: str, tmp_path: Path) -> None:
    tensors = {f"transformer.h.1.{bias}": np.ones(96, np.float32)}
    with pytest.raises(CheckpointError, match=f"{bias} has no place"):
        open_checkpoint(write_directory(tmp_path, QWEN, tensors=tensors))


def test_a_first_qwen_beyond_its_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_directory(tmp_path / "tiny", QWEN, config={"seq_length": MAX_SEQ_LEN - 1})
    checkpoint = open_checkpoint(path)
    assert checkpoint.spec.max_context == MAX_SEQ_LEN - 1
    with pytest.raises(BuildError, match=f"beyond {MAX_SEQ_LEN - 1} tokens"):
        tiny_executor(checkpoint, tmp_path / "engine", compute="int8")
    flags = ["--max-seq-len", str(MAX_SEQ_LEN)]
    assert main(["build", str(path), "-o", str(tmp_path / "engine"), *flags]) == UsageError.exit_code
    assert f"--max-seq-len {MAX_SEQ_LEN}" in capsys.readouterr().err
    # A GGUF file does not say where that is.
    assert open_checkpoint(QWEN.write_gguf(tmp_path / "tiny.gguf")).spec.max_context == 2048


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        ("qwen2moe", {}, "general.architecture qwen2moe"),
        ("gemma2", {}, "general.architecture gemma2"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count"),
        ("llama", {"llama.expert_weights_scale": 2.5}, "expert_weights_scale = 2.5"),
        ("llama", {"llama.attention.clamp_kqv": 8.0}, "clamp_kqv = 8.0"),
        ("llama", {"llama.logit_scale": 0.5}, "logit_scale = 0.5"),
        ("llama", {"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("qwen2", {"qwen2.attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "rope.scaling.type longrope"),
    ],
)
def test_a_gguf_of_another_kind(architecture: str, keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    Llama(architecture=architecture, keys=keys).write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("expert_shared_count", 1, "expert_shared_count = 1"),
        ("expert_gating_func", 2, "expert_gating_func = 2"),
        ("expert_group_count", 4, "expert_group_count = 4"),
        ("expert_weights_norm", False, "expert_weights_norm = False"),
        ("expert_used_count", 7, "expert_used_count 7 is more than expert_count 6"),
        ("expert_count", 5, r"ffn_gate_inp.weight has shape \(6, 64\), its keys say \(5, 64\)"),
        ("expert_feed_forward_length", 24, r"ffn_gate_exps.weight has shape \(6, 48, 64\)"),
    ],
)
def test_a_gguf_mixture_of_another_kind(
    key: str, value: int | bool, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `gguf` package writes the file, with this key's value instead of its own."""
    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", _with_key(key, value))
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(MOE.write_gguf(tmp_path / "model.gguf"))


def _with_key(key: str, value: int | bool) -> Any:
    written = gguf.GGUFWriter.write_header_to_file

    def changed(writer: gguf.GGUFWriter) -> None:
        name = f"qwen3moe.{key}"
        for keys in writer.kv_data:
            keys.pop(name, None)
        if isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            writer.add_uint32(name, value)
        written(writer)

    return changed


def test_a_pipe_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is neither a file nor a directory"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is neither a file nor a directory"):
        open_checkpoint(tmp_path / "config.json")


def test_a_hubs_name_is_told_from_a_path() -> None:
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen3-8B: No such file or directory; .* model hub"):
        open_checkpoint(Path("Qwen/Qwen3-8B"))

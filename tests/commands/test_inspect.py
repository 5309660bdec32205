"""`edgellm inspect`: figures known beforehand, and what would be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from ggufs import tokens
from model_directories import write_directory
from packers import quantize
from tiny_llama import TINY, TinyLlama

from edgellm.cli import main
from edgellm.errors import CheckpointError, EngineError, UsageError

WIDE = TinyLlama(128, 2, 1, 64, 256, tied=True, rotary_base=1e4)
# 2 layers of q, o 128 × 128, k, v 64 × 128 and 3 of 256 × 128.
LINEARS = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
EMBEDDING = 265 * 128
PARAMETERS = LINEARS + EMBEDDING + 5 * 128


def awq(group: int) -> Any:
    """Arguments of write_directory."""
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return {
        "config": {"quantization_config": config},
        "linear": lambda layer, values: packers.awq(layer, quantize(values, group)),
    }


def inspect(path: Path, capsys: pytest.CaptureFixture[str], *, code: int = 0) -> dict[str, Any]:
    """The report."""
    assert main(["inspect", str(path), "--json"]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_directory(tmp_path / "tiny", WIDE, **awq(64), dtype=np.float16)
    # Numbers of 4 bits, a scale of 16 and a zero point of 4 for each 64.
    stored = LINEARS // 2 + LINEARS // 64 * 5 // 2 + 2 * (EMBEDDING + 5 * 128)
    assert inspect(path, capsys) == {
        "path": str(path),
        "kind": "checkpoint",
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "parameters": PARAMETERS,
        "active_parameters": None,
        "stored_bytes": stored,
        "bits_per_weight": round(8 * stored / PARAMETERS, 3),
        "quantization": "W4A16_AWQ",
        "storage": [
            {"weights": LINEARS, "bits": 4, "group": 64, "offsets": True},
            {"weights": EMBEDDING, "bits": 16, "group": 0, "offsets": False},
        ],
        "kv_bytes_per_token": {
            "int8": 2 * 2 * (64 + 2),
            "fp16": 2 * 2 * 64 * 2,
            "fp32": 2 * 2 * 64 * 4,
        },
        "context": 4096,
        "tokens": len(tokens()),
        "chat_template": True,
        "chat_error": None,
        "eos_ids": [0, 2],
        "built_for": None,
        "quantized": None,
        "refused": [],
    }
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"{LINEARS:,} weights of 4 bits in groups of 64 with offsets" in text
    assert "0.5 KiB in fp16, 1 KiB in fp32 a token" in text
    assert "refused" not in text


def test_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_directory(tmp_path / "tiny", WIDE, **awq(64))
    assert main(["build", str(path), "-o", str(tmp_path / "engine"), "--kv-cache", "fp16"]) == 0
    capsys.readouterr()
    engine, checkpoint = inspect(tmp_path / "engine", capsys), inspect(path, capsys)
    assert engine["kind"] == "engine"
    assert engine["kv_bytes_per_token"] == {"fp16": 512}
    for same in ("name", "architecture", "parameters", "quantization", "storage", "tokens", "eos_ids"):
        assert engine[same] == checkpoint[same]
    assert engine["built_for"] == {
        "max_batch_size": 4,
        "max_seq_len": 2048,
        "max_num_tokens": 256,
        "executor": "cpu",
        "compute": "int8",
    }
    assert engine["quantized"] is None
    assert main(["inspect", str(tmp_path / "engine")]) == 0
    assert "4 slots of 2,048 tokens, steps of 256, cpu int8" in capsys.readouterr().out
    (tmp_path / "engine" / "tokenizer.json").unlink()
    assert main(["inspect", str(tmp_path / "engine")]) == EngineError.exit_code


def test_a_quantized_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, engine = write_directory(tmp_path / "tiny", WIDE), tmp_path / "engine"
    text = tmp_path / "text"
    text.write_text("hello world " * 400)
    assert main(["build", str(path), "-o", str(engine), "--quant", "int4", "--evaluate", str(text)]) == 0
    capsys.readouterr()
    written = json.loads((engine / "quantization.json").read_text())
    del written["layers"], written["matrices"]
    assert inspect(engine, capsys)["quantized"] == written
    assert main(["inspect", str(engine)]) == 0
    shown = capsys.readouterr().out
    assert "int4 in groups of 64, embedding and head int8, uncalibrated" in shown
    assert f"error of the weights {100 * written['error']:.2f} %" in shown
    assert f"mean {written['divergence']['kl']:.4f} nats" in shown
    (engine / "quantization.json").write_bytes(b" " * (engine / "quantization.json").stat().st_size)
    assert main(["inspect", str(engine)]) == EngineError.exit_code
    assert "quantization.json is damaged" in capsys.readouterr().err


def test_a_template_that_is_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    path, engine = (
        write_directory(tmp_path / "tiny", WIDE, files={"chat_template.jinja": loop}),
        tmp_path / "engine",
    )
    assert main(["build", str(path), "-o", str(engine)]) == 0
    warned = capsys.readouterr().err
    assert "warning: the engine answers `generate` only, and refuses every `chat`: the model's chat" in warned
    for one in (path, engine):
        capsys.readouterr()
        assert "it makes too much text" in inspect(one, capsys)["chat_error"]
        assert main(["inspect", str(one)]) == 0
        assert "yes, but of no use: the model's chat template fails" in capsys.readouterr().out


def test_a_cache_of_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, engine = write_directory(tmp_path / "tiny", WIDE), tmp_path / "engine"
    assert main(["build", str(path), "-o", str(engine), "--executor", "cuda", "--kv-cache", "int8"]) == 0
    capsys.readouterr()
    report = inspect(engine, capsys)
    assert report["kv_bytes_per_token"] == {"int8": 2 * 2 * (64 + 2)}
    assert (report["built_for"]["executor"], report["built_for"]["compute"]) == ("cuda", "fp16")


def test_a_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(WIDE.write_gguf(tmp_path / "tiny.gguf", "Q4_0", "Q8_0"), capsys)
    assert report["parameters"] == PARAMETERS
    assert report["stored_bytes"] == LINEARS // 32 * 18 + EMBEDDING // 32 * 34 + 5 * 128 * 4
    assert report["storage"][0] == {"weights": LINEARS, "bits": 4, "group": 32, "offsets": False}
    assert report["chat_template"] is False


def test_a_mixture_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = TINY["qwen3moe, 3 of 12, untied"]
    path = tiny.write_gguf(tmp_path / "tiny.gguf", "F16")
    report = inspect(path, capsys)
    assert report["parameters"] == sum(values.size for values in tiny.weights().values())
    # Nine of twelve experts are left out in each of two layers.
    assert report["parameters"] - report["active_parameters"] == 2 * 9 * 3 * 72 * 40
    assert main(["inspect", str(path)]) == 0
    assert f"of which a token goes through {report['active_parameters']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reasons"),
    [
        ({"config": {"final_logit_softcapping": 30.0}}, ["final_logit_softcapping"]),
        ({"files": {"chat_template.jinja": "{% for %}"}}, ["the chat template does not compile"]),
        (
            {
                "files": {
                    "tokenizer.json": {"model": {"type": "Unigram", "vocab": {"a": 1}}},
                    "tokenizer_config.json": None,
                },
                **awq(8),
            },
            ["decoder that is neither ByteLevel nor", "groups of 8: the CPU executor needs"],
        ),
        (
            {
                "files": {
                    "tokenizer.json": {
                        "model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b c"]},
                        "decoder": {"type": "ByteLevel"},
                    },
                    "tokenizer_config.json": None,
                }
            },
            ["the tokenizer cannot be loaded"],
        ),
    ],
)
def test_what_would_be_refused(
    more: dict[str, Any], reasons: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_directory(tmp_path / "tiny", WIDE, **more)
    report = inspect(path, capsys, code=CheckpointError.exit_code)
    assert len(report["refused"]) == len(reasons)
    for refused, reason in zip(report["refused"], reasons, strict=True):
        assert reason in refused
    assert main(["inspect", str(path)]) == CheckpointError.exit_code
    assert f"refused        {report['refused'][0]}" in capsys.readouterr().out


def test_heads_that_the_executor_has_no_attention_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_directory(tmp_path / "tiny", replace(WIDE, head_size=40))
    assert "head_size is 40" in inspect(path, capsys, code=CheckpointError.exit_code)["refused"][0]


def test_a_models_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "smollm2-135m"]) == UsageError.exit_code
    assert "edgellm fetch" in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(tmp_path / "none.gguf", capsys, code=CheckpointError.exit_code)
    assert "none.gguf" in report["refused"][0]

"""An engine directory of a few bytes: what `enginedir` and its parts are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgellm.engine_place import new_engine
from edgellm.engine_seal import seal
from edgellm.enginedir import (
    FORMAT_VERSION,
    BuildConfig,
    EdgellmSection,
    EngineConfig,
    EngineDir,
    PretrainedConfig,
    open_engine,
    verify_engine,
)
from edgellm.model.quantization import Quantization

SPEC: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 16,
    "intermediate_size": 96,
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 128,
}
CONFIG = EngineConfig(
    version="0.1.0",
    pretrained_config=PretrainedConfig(
        **SPEC, quantization=Quantization(quant_algo="W4A16", group_size=32, has_zero_point=True)
    ),
    build_config=BuildConfig(
        max_input_len=63,
        max_seq_len=64,
        max_batch_size=2,
        max_num_tokens=16,
        opt_batch_size=2,
        opt_num_tokens=2,
    ),
    edgellm=EdgellmSection(
        format_version=FORMAT_VERSION,
        executor="cpu",
        compute="int8",
        model_name="tiny",
        bos_id=1,
        add_bos=False,
        eos_ids=(0, 2),
    ),
)
FILES = {"model.onnx": b"graph", "model.onnx.data": bytes(range(256)), "tokenizer.json": b"{}"}


def write_engine(path: Path, files: dict[str, bytes] = FILES) -> None:
    with new_engine(path) as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        seal(draft, CONFIG)


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def open_and_verify(path: Path) -> EngineDir:
    directory = open_engine(path)
    verify_engine(directory)
    return directory

"""The engine directory: written whole or not at all, and every flipped byte is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_engines import CONFIG, FILES, SPEC, names_in, open_and_verify, write_engine

from edgellm.enginedir import FORMAT_VERSION, open_engine
from edgellm.errors import EngineError
from edgellm.model.spec import ModelSpec


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "engine"
    write_engine(path)
    return path


def test_what_was_written_is_what_is_opened(engine: Path) -> None:
    directory = open_and_verify(engine)
    assert directory.spec == ModelSpec(**SPEC)
    assert directory.build == CONFIG.build_config
    assert (directory.model_name, directory.eos_ids, directory.bos_id) == ("tiny", (0, 2), 1)
    assert {name: record.bytes for name, record in directory.config.edgellm.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert names_in(engine.parent) == ["engine"]
    umask = os.umask(0)
    os.umask(umask)
    assert engine.stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_is_no_engine_directory_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(EngineError, match=r"m\.gguf is a file; `edgellm build .*m\.gguf -o ENGINE`"):
        open_engine(tmp_path / "m.gguf")
    with pytest.raises(EngineError, match="there is no engine directory"):
        open_engine(tmp_path / "nowhere")
    with pytest.raises(EngineError, match=r"cannot read .*File name too long"):
        open_engine(tmp_path / ("x" * 300))


def test_slots_are_counted(engine: Path) -> None:
    build = open_engine(engine).build
    assert build.slots == "2 slots of 64 tokens"
    assert msgspec.structs.replace(build, max_batch_size=1).slots == "1 slot of 64 tokens"


def test_field_names_are_those_of_tensorrt_llm(engine: Path) -> None:
    config = json.loads((engine / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config", "edgellm"]
    assert set(config["pretrained_config"]) >= {
        *("architecture", "dtype", "logits_dtype", "vocab_size", "hidden_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_size", "intermediate_size", "hidden_act"),
        *(
            "norm_epsilon",
            "position_embedding_type",
            "max_position_embeddings",
            "qk_layernorm",
            "rotary_base",
        ),
        *("rotary_scaling", "attn_bias", "mlp_bias", "tie_word_embeddings", "mapping", "quantization"),
    }
    assert set(config["pretrained_config"]["mapping"]) == {"world_size", "tp_size", "pp_size"}
    assert set(config["pretrained_config"]["quantization"]) == {
        *("quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "exclude_modules"),
    }
    assert set(config["build_config"]) == {
        *("max_input_len", "max_seq_len", "max_batch_size", "max_num_tokens", "opt_batch_size"),
        *("opt_num_tokens", "kv_cache_type", "strongly_typed"),
    }


def test_hashes_are_sha256(engine: Path) -> None:
    # Known answers, from sha256sum.
    files = open_engine(engine).config.edgellm.files
    assert (
        files["model.onnx.data"].sha256 == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    )
    assert (
        files["tokenizer.json"].sha256 == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )


@given(data=st.data())
def test_one_flipped_bit_in_any_file_is_found_and_named(engine: Path, data: st.DataObject) -> None:
    path = engine / data.draw(st.sampled_from(["config.json", *FILES]))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        with pytest.raises(EngineError) as caught:
            open_and_verify(engine)
    finally:
        path.write_bytes(whole)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_and_shortened_files_are_named_before_anything_is_hashed(tmp_path: Path, name: str) -> None:
    write_engine(tmp_path / "engine")
    (tmp_path / "engine" / name).write_bytes(FILES[name][:-1])
    with pytest.raises(EngineError, match=rf"{name} has {len(FILES[name]) - 1} bytes instead of"):
        open_engine(tmp_path / "engine")
    (tmp_path / "engine" / name).unlink()
    with pytest.raises(EngineError, match=f"has no {name}"):
        open_engine(tmp_path / "engine")


def test_what_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="edgellm build CHECKPOINT"):
        open_engine(tmp_path / "missing")
    with pytest.raises(EngineError, match=r"it has no config\.json"):
        open_engine(tmp_path)
    for content in (
        "",
        "[]",
        "{}",
        '{"edgellm": 1}',
        '{"architectures": null}',
        "\ud7ff\x00",
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(EngineError, match="damaged, or not edgellm's"):
            open_engine(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(EngineError, match="is a checkpoint; `edgellm build"):
        open_engine(tmp_path)


def test_another_format_version_says_what_to_do(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine")
    path = tmp_path / "engine" / "config.json"
    config = json.loads(path.read_text())
    config["edgellm"] |= {"format_version": FORMAT_VERSION + 1, "something_new": True}
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=rf"format_version {FORMAT_VERSION + 1}.*build the engine again"):
        open_engine(tmp_path / "engine")

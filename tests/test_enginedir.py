"""The engine directory: written whole or not at all, and every flipped byte is found."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.enginedir import (
    FORMAT_VERSION,
    BuildConfig,
    EdgellmSection,
    EngineConfig,
    EngineDir,
    PretrainedConfig,
    new_engine,
    open_engine,
    seal,
    verify_engine,
)
from edgellm.errors import BuildError, EngineError
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec

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


def _write(path: Path, files: dict[str, bytes] = FILES) -> None:
    with new_engine(path) as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        seal(draft, CONFIG)


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "engine"
    _write(path)
    return path


def _open_and_verify(path: Path) -> EngineDir:
    directory = open_engine(path)
    verify_engine(directory)
    return directory


def test_what_was_written_is_what_is_opened(engine: Path) -> None:
    directory = _open_and_verify(engine)
    assert directory.spec == ModelSpec(**SPEC)
    assert directory.build == CONFIG.build_config
    assert (directory.model_name, directory.eos_ids, directory.bos_id) == ("tiny", (0, 2), 1)
    assert {name: record.bytes for name, record in directory.config.edgellm.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert _names(engine.parent) == ["engine"]
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
            _open_and_verify(engine)
    finally:
        path.write_bytes(whole)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_and_shortened_files_are_named_before_anything_is_hashed(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "engine")
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
    _write(tmp_path / "engine")
    path = tmp_path / "engine" / "config.json"
    config = json.loads(path.read_text())
    config["edgellm"] |= {"format_version": FORMAT_VERSION + 1, "something_new": True}
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=rf"format_version {FORMAT_VERSION + 1}.*build the engine again"):
        open_engine(tmp_path / "engine")


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with new_engine(tmp_path / "engine") as draft:
            (draft / "model.onnx").write_bytes(b"half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(BuildError, match=r"No space left on device; free some space"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_engine_that_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "engine")
    with pytest.raises(ZeroDivisionError), new_engine(tmp_path / "engine"):
        raise ZeroDivisionError
    _open_and_verify(tmp_path / "engine")
    assert _names(tmp_path) == ["engine"]


class _OldLibc:
    """A C library from before renameat2."""


@pytest.mark.parametrize("libc", [None, _OldLibc()])
def test_an_engine_is_replaced_and_one_that_is_open_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: object
) -> None:
    if libc is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_more: libc)
    _write(tmp_path / "engine")
    with (tmp_path / "engine" / "model.onnx").open("rb") as still_open:
        _write(tmp_path / "engine", {"model.onnx": b"new"})
        assert still_open.read() == FILES["model.onnx"]
    directory = _open_and_verify(tmp_path / "engine")
    assert list(directory.config.edgellm.files) == ["model.onnx"]
    assert _names(tmp_path) == ["engine"]


def test_a_file_system_may_refuse_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def renameat2(self, *_args: object) -> int:
            return -1

    _write(tmp_path / "engine")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_more: Refuses())
    _write(tmp_path / "engine", {"model.onnx": b"new"})
    assert list(_open_and_verify(tmp_path / "engine").config.edgellm.files) == ["model.onnx"]
    assert _names(tmp_path) == ["engine"]


def test_through_a_symbolic_link_its_target_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    _write(tmp_path / "current", {"model.onnx": b"new"})
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "model.onnx").read_bytes() == b"new"


def test_what_is_no_engine_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for path in (precious, tmp_path / "file", model):
        with pytest.raises(BuildError, match=str(path)):
            _write(path)
    assert (precious / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "empty")
    _write(tmp_path / "not" / "yet" / "there")


def test_an_unwritable_place_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"cannot create .*File exists \(.*/file\)"):
        _write(tmp_path / "file" / "engine")
    (tmp_path / "circle").symlink_to("circle")
    for place in ("circle", "circle/engine"):
        with pytest.raises(BuildError, match="circle"):
            _write(tmp_path / place)
    with pytest.raises(BuildError, match="is not UTF-8"):
        _write(tmp_path / os.fsdecode(b"engine\xff"))


def test_an_engine_that_cannot_be_looked_into_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()

    def closed(self: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", closed)  # as root, no mode of the directory would do it
    with pytest.raises(BuildError, match=r"cannot create .*engine: Permission denied"):
        _write(tmp_path / "engine")

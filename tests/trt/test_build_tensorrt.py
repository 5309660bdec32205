"""`edgellm build --executor tensorrt`: the engine directory, its memory plan, and what is refused how."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_llama import TinyLlama
from trt_models import trt_api

from edgellm.cli import main
from edgellm.enginedir import open_engine, verify_engine
from edgellm.errors import BuildError, DeviceError, EngineError, TensorRtMissing, UsageError
from edgellm.executor import cuda_kernels
from edgellm.tensorrt.engine_files import LAYERS_FILE, PLAN_FILE, plan_record
from edgellm.tensorrt.plan import open_timing_cache

TINY = TinyLlama(256, 4, 2, 64, 512, tied=True, rotary_base=1e6, seed=13, family="Qwen3")
SIZES = ["--max-batch-size", "2", "--max-seq-len", "64", "--max-num-tokens", "16"]
TENSORRT = ["--executor", "tensorrt"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q4_1", "Q8_0")


@pytest.fixture(scope="module")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "engine"
    assert main(["build", str(tiny), "-o", str(path), *TENSORRT, "--sm", "86,89", *SIZES]) == 0
    return path


@pytest.mark.tensorrt
def test_the_engine_says_what_it_is_for_and_what_it_takes(engine: Path) -> None:
    directory = open_engine(engine)
    verify_engine(directory)
    ours, record = directory.config.edgellm, plan_record(directory)
    assert (ours.executor, ours.compute, ours.kv_cache) == ("tensorrt", "fp16", "fp16")
    assert {PLAN_FILE, LAYERS_FILE} < set(ours.files)
    assert ours.executor_version == f"{record.library} {record.version}"
    assert (record.version, record.targets) == (trt_api().version, (86, 89))
    assert 0 < record.emitted_bytes <= 1.05 * record.weight_bytes < ours.files[PLAN_FILE].bytes
    assert record.prefill_bytes > 0 < record.decode_bytes
    assert all(any(name.startswith(f"kernels/sm_{sm}/") for name in ours.files) for sm in record.targets)
    assert directory.build.opt_num_tokens == directory.build.max_num_tokens == 16


@pytest.mark.tensorrt
def test_the_table_of_fused_layers_names_the_networks_tensors(engine: Path) -> None:
    layers = json.loads((engine / LAYERS_FILE).read_text())
    assert plan_record(open_engine(engine)).kernels == -(-len(layers) // 2)
    tensors = {tensor["name"]: tensor for layer in layers for tensor in layer["inputs"] + layer["outputs"]}
    assert tensors["tokens"]["dtype"] == "Int32"
    assert tensors["logits"]["shape"][-1] == tensors["logits"]["shape"][-1] > 256
    assert any(constant["dtype"] == "Int4" for layer in layers for constant in layer["constants"])


@pytest.mark.tensorrt
def test_the_memory_plan_takes_what_the_plan_recorded(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = plan_record(open_engine(engine))
    plans = []
    for sizes in ([], ["--max-batch-size", "1"], ["--max-batch-size", "4", "--max-seq-len", "128"]):
        assert main(["plan", str(engine), "--budget", "8GiB", "--json", *sizes]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    built, fewer, more = ({line["name"]: line for line in plan["lines"]} for plan in plans)
    assert built["weights"]["bytes"] == record.weight_bytes
    context = max(record.prefill_bytes, record.decode_bytes)
    assert 0 < built["activations"]["bytes"] - context < 64 << 10
    # Room for 64 tokens in each row, and a row to swap with.
    assert built["kv_cache"]["bytes"] == (2 * TINY.layers * 2 + 1) * TINY.kv_heads * 64 * TINY.head_size * 2
    assert fewer["activations"]["bytes"] < built["activations"]["bytes"] <= more["activations"]["bytes"]
    assert plans[2]["rebuild"] == ["--max-batch-size", "--max-seq-len"]
    assert fewer["kv_cache"]["bytes"] < built["kv_cache"]["bytes"] < more["kv_cache"]["bytes"]
    assert plans[0]["executor"] == "tensorrt"
    assert plans[0]["on_device"] >= record.weight_bytes + context


@pytest.mark.tensorrt
def test_an_engine_without_its_plan_is_refused(engine: Path) -> None:
    directory = open_engine(engine)
    config = directory.config
    from msgspec import structs

    bare = structs.replace(config, edgellm=structs.replace(config.edgellm, plan=None))
    with pytest.raises(EngineError, match=r"no TensorRT plan, rank0\.engine"):
        plan_record(replace(directory, config=bare))


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--sm", "87"], BuildError.exit_code, r"--sm 87: .* builds for 75, 80.*build there"),
        (["--sm", "75"], BuildError.exit_code, r"no INT4"),
        (["--sm", "orin"], UsageError.exit_code, r"--sm orin"),
        ([], UsageError.exit_code, r"--sm: name what to build for"),
        (["--sm", "86", "--compute", "int8"], UsageError.exit_code, r"the tensorrt executor has fp16"),
        (["--sm", "86", "--kv-cache", "int8"], UsageError.exit_code, r"the tensorrt executor has fp16"),
        (["--sm", "86", "--builder-memory", "4"], UsageError.exit_code, r"--builder-memory: '4' is no size"),
        (["--sm", "86", "--builder-memory", "9B"], BuildError.exit_code, r"--builder-memory allows; allow"),
    ],
)
def test_what_is_refused_is_one_line(
    tiny: Path, tmp_path: Path, flags: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "e"), *TENSORRT, *SIZES, *flags]) == code
    said = capsys.readouterr().err
    assert re.search(says, said)
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--builder-memory", "--timing-cache"])
def test_only_tensorrt_has_a_builder(
    tiny: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "e"), flag, "1GiB"]) == UsageError.exit_code
    assert f"{flag}: only --executor tensorrt" in capsys.readouterr().err


@pytest.mark.tensorrt
def test_without_a_compiler_the_kernels_around_the_plan_wait_for_the_first_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable() -> None:
        raise DeviceError("no NVRTC")

    monkeypatch.setattr(cuda_kernels, "Compiler", unavailable)
    assert main(["build", str(tiny), "-o", str(tmp_path / "e"), *TENSORRT, "--sm", "86", *SIZES]) == 0
    assert "compiled at the first start (no NVRTC)" in capsys.readouterr().err
    assert not (tmp_path / "e" / "kernels").exists()


MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


def test_without_tensorrt_the_alternative_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["build", str(tiny), "-o", str(tmp_path / "e"), *TENSORRT]) == TensorRtMissing.exit_code == 69
    assert re.search(r"no TensorRT is installed.*JetPack.*--executor cuda", capsys.readouterr().err)


def test_jetpack_6s_tensorrt_is_too_old(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old: Any = ModuleType("tensorrt")
    old.__version__, old.INetworkDefinition = "10.3.0", SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    assert main(["build", str(tiny), "-o", str(tmp_path / "e"), *TENSORRT]) == TensorRtMissing.exit_code
    assert re.search(r"tensorrt 10\.3\.0 has no attention.*10\.15.*--executor cuda", capsys.readouterr().err)


class TimingConfig:
    """A builder's configuration that knows caches by their first byte."""

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return not cache.content or cache.content.startswith(b"mine")


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("held", "used"), [(b"mine, measured", b"mine, measured"), (b"another's", b""), (None, b"")]
)
def test_a_timing_cache_of_another_library_is_not_used(
    held: bytes | None, used: bytes, tmp_path: Path
) -> None:
    if held is not None:
        (tmp_path / "cache").write_bytes(held)
    api = replace(trt_api(), name="tensorrt")
    assert open_timing_cache(api, TimingConfig(), tmp_path / "cache").content == used
    assert open_timing_cache(trt_api(), TimingConfig(), tmp_path / "cache") is None
    with pytest.raises(BuildError, match=r"--timing-cache .* cannot be read"):
        open_timing_cache(api, TimingConfig(), tmp_path)

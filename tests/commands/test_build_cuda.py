"""`edgellm build --executor cuda`: cubins without a GPU, flags that belong together, what does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_llama import TinyLlama

from edgellm.cli import main
from edgellm.config import EngineConfig
from edgellm.cuda import nvrtc
from edgellm.cuda.cubin import read_resources
from edgellm.cuda.launch import Device
from edgellm.enginedir import open_engine, verify_engine
from edgellm.errors import DeviceError, EngineError, UsageError
from edgellm.executor import cuda_kernels
from edgellm.executor.base import Executor
from edgellm.executor.cuda import CudaExecutor
from edgellm.executor.cuda_build import programs_of
from edgellm.executor.factory import make_executor
from edgellm.executor.program import kernels_of

# Columns in multiples of 64, as the kernels want them.
TINY = TinyLlama(128, 2, 1, 64, 192, tied=True, rotary_base=1e6, seed=13, family="Qwen3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return TINY.write_gguf(path, "Q4_0", "Q8_0")


@pytest.fixture(scope="module")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For Orin, of 2 slots."""
    path = tmp_path_factory.mktemp("built") / "engine"
    flags = ["--max-batch-size", "2", "--max-seq-len", "64", "--max-num-tokens", "16"]
    assert main(["build", str(tiny), "-o", str(path), "--executor", "cuda", "--sm", "87", *flags]) == 0
    return path


def test_the_engine_holds_hashed_cubins_for_every_orin(engine: Path) -> None:
    directory = open_engine(engine)
    verify_engine(directory)
    ours = directory.config.edgellm
    assert (ours.executor, ours.compute, ours.kv_cache) == ("cuda", "fp16", "fp16")
    assert {"network.json", "weights.safetensors"} < set(ours.files)
    cubins = [name for name in ours.files if name.startswith("kernels/sm_87/")]
    assert len(cubins) > 10
    for name in cubins:
        assert len(read_resources((engine / name).read_bytes())) == 1


@pytest.mark.parametrize("multiprocessors", [16, 14, 8, 4])
def test_no_orin_compiles_anything(
    engine: Path, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> None:
        raise DeviceError("no NVRTC")

    monkeypatch.setattr(cuda_kernels, "Compiler", unavailable)
    directory = open_engine(engine)
    device = Device(87, multiprocessors, 163 << 10)
    programs = programs_of(engine, directory.spec, directory.build, kv_cache="fp16", device=device)
    found = cuda_kernels.load_cubins(engine, kernels_of(programs), 87, lambda _done: None)
    assert found.keys() == set(kernels_of(programs))


def test_another_sm_without_a_compiler_says_how_to_rebuild(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> None:
        raise DeviceError("CUDA's compiler library, libnvrtc, is not installed")

    monkeypatch.setattr(cuda_kernels, "Compiler", unavailable)
    directory = open_engine(engine)
    device = Device(90, 132, 227 << 10)
    programs = programs_of(engine, directory.spec, directory.build, kv_cache="fp16", device=device)
    with pytest.raises(EngineError, match=r"sm_90 .*libnvrtc.*edgellm build --executor cuda --sm 90"):
        cuda_kernels.load_cubins(engine, kernels_of(programs), 90, lambda _done: None)


def test_cubins_of_another_source_are_not_found(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    for source in nvrtc.SOURCES.glob("*.cu*"):
        (sources / source.name).write_text(source.read_text() + "// changed\n")
    monkeypatch.setattr(cuda_kernels, "read_program", lambda k, sm: nvrtc.read_program(k, sm, sources))

    def unavailable() -> None:
        raise DeviceError("no NVRTC")

    monkeypatch.setattr(cuda_kernels, "Compiler", unavailable)
    directory = open_engine(engine)
    device = Device(87, 16, 163 << 10)
    programs = programs_of(engine, directory.spec, directory.build, kv_cache="fp16", device=device)
    with pytest.raises(EngineError, match=r"lacks \d+ of the kernels"):
        cuda_kernels.load_cubins(engine, kernels_of(programs), 87, lambda _done: None)


def test_the_factory_makes_its_executor_which_says_that_there_is_no_driver(engine: Path) -> None:
    executor: Executor = make_executor(open_engine(engine), EngineConfig(max_batch_size=1))
    assert isinstance(executor, CudaExecutor)
    assert (executor.info.name, executor.info.max_batch_size, executor.info.pipeline_depth) == ("cuda", 1, 2)
    with pytest.raises(DeviceError, match=r"no CUDA d(river|evice)"):
        executor.load(lambda _what, _done: None)
    executor.close()


def test_int8_caches_are_planned_at_half(tiny: Path, tmp_path: Path) -> None:
    sizes = {}
    for kind in ("fp16", "int8"):
        path = tmp_path / kind
        assert main(["build", str(tiny), "-o", str(path), "--executor", "cuda", "--kv-cache", kind]) == 0
        sizes[kind] = make_executor(open_engine(path), EngineConfig()).info.kv_bytes_per_token
    spec = TINY
    assert sizes["fp16"] == spec.layers * 2 * spec.kv_heads * spec.head_size * 2
    assert sizes["int8"] == spec.layers * 2 * spec.kv_heads * (spec.head_size + 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--executor", "cuda", "--compute", "int8"], r"--compute int8: the cuda executor has fp16"),
        (
            ["--executor", "cuda", "--kv-cache", "fp32"],
            r"--kv-cache fp32: the cuda executor has fp16 and int8",
        ),
        (["--kv-cache", "int8"], r"--kv-cache int8: the cpu executor has fp32 and fp16"),
        (["--sm", "87"], r"--sm: only --executor cuda"),
        (["--executor", "cuda", "--sm", "72"], r"--sm 72: kernels can be built ahead for 80, 86, 87"),
        (["--executor", "cuda", "--sm", "orin"], r"--sm orin: 'orin' is no compute capability, such as 87"),
    ],
)
def test_flags_that_do_not_go_together(
    tiny: Path, tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "e"), *flags]) == UsageError.exit_code
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "e").exists()


def test_a_missing_compiler_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> object:
        raise DeviceError("CUDA's compiler library, libnvrtc, is not installed")

    monkeypatch.setattr("edgellm.cuda.bindings.load_nvrtc", missing)
    words = ["build", "/no/such.gguf", "-o", str(tmp_path / "e"), "--executor", "cuda", "--sm", "87"]
    assert main(words) == DeviceError.exit_code
    assert "libnvrtc, is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--random", "qwen9"], r"--random qwen9: there are smollm2-135m"),
        ([], r"name either a CHECKPOINT or --random"),
        (["tiny.gguf", "--random", "qwen3-8b"], r"name either a CHECKPOINT or --random"),
        (["--random", "smollm2-135m", "--quant", "int4", "--group-size", "64"], r"--group-size"),
    ],
)
def test_what_random_can_be(
    tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *words, "-o", str(tmp_path / "e")]) == UsageError.exit_code
    assert re.search(says, capsys.readouterr().err)


def test_the_plan_of_an_engine_and_of_its_checkpoint_agree(
    engine: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--max-batch-size", "2", "--max-seq-len", "64", "--max-num-tokens", "16"]
    plans = []
    for words in ([str(engine)], [str(tiny), "--executor", "cuda", *sizes]):
        assert main(["plan", *words, "--budget", "8GiB", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["lines"] == plans[1]["lines"]
    assert plans[0]["executor"] == plans[1]["executor"] == "cuda"
    lines = {line["name"]: line for line in plans[0]["lines"]}
    header = (engine / "weights.safetensors").stat().st_size
    assert 0 < header - lines["weights"]["bytes"] <= 64 << 10
    assert lines["weights"]["kind"] == "device"
    assert plans[0]["on_device"] >= lines["weights"]["bytes"]

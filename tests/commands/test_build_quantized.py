"""`edgellm build --quant`: the engine, its quantization.json, the table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_directories import write_directory
from tiny_llama import TinyLlama

from edgellm.cli import main
from edgellm.enginedir import QUANTIZATION, open_engine, verify_engine
from edgellm.errors import CheckpointError, UsageError

TINY = TinyLlama(64, 4, 2, 32, 96, tied=True, rotary_base=1e4)
WORDS = "hello world, what a day it is. " * 100


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("tiny") / "tiny", TINY)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def _build(tiny: Path, tmp_path: Path, *flags: object) -> int:
    return main(["build", str(tiny), "-o", str(tmp_path / "engine"), *map(str, flags)])


def test_none_keeps_the_weights(tiny: Path, tmp_path: Path) -> None:
    assert _build(tiny, tmp_path) == 0
    directory = open_engine(tmp_path / "engine")
    assert directory.config.pretrained_config.quantization.quant_algo == "NO_QUANT"
    assert QUANTIZATION not in directory.config.edgellm.files


def test_int4(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _build(tiny, tmp_path, "--quant", "int4", "--group-size", 32) == 0
    directory = open_engine(tmp_path / "engine")
    verify_engine(directory)
    quantization = directory.config.pretrained_config.quantization
    assert (quantization.quant_algo, quantization.group_size) == ("W4A16", 32)
    stored = {(one.role, one.bits, one.group, one.offsets) for one in directory.config.edgellm.weights}
    assert {("linear", 4, 32, True), ("embedding", 8, 32, False), ("head", 8, 32, False)} < stored
    report = json.loads((tmp_path / "engine" / QUANTIZATION).read_text())
    assert len(report["matrices"]) == 1 + 2 * 7
    assert len(report["layers"]) == 2
    assert all(0.05 < error < 0.1 for error in report["layers"])
    assert report["divergence"] is None
    assert report["calibration_tokens"] == 0

    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{tmp_path / 'engine'}: tiny, ")
    heading = next(line for line in printed if line.startswith("layer"))
    assert heading.split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "all"]
    [first] = [line.split() for line in printed if line.startswith("0 ")]
    assert float(first[-1]) == pytest.approx(100 * report["layers"][0], abs=0.005)


def test_calibrated_with_its_last_fifth_held_out(
    tiny: Path, tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _build(tiny, tmp_path, "--quant", "int4", "--group-size", 32, "--calibrate", words) == 0
    directory = open_engine(tmp_path / "engine")
    assert directory.config.pretrained_config.quantization.quant_algo == "W4A16_AWQ"
    report = json.loads((tmp_path / "engine" / QUANTIZATION).read_text())
    assert report["calibration_tokens"] >= 512
    assert report["divergence"]["tokens"] >= 64
    assert 0 < report["divergence"]["kl"] < report["divergence"]["largest_kl"]
    assert f"mean {report['divergence']['kl']:.4f} nats" in capsys.readouterr().out


def test_int8_is_closer_than_int4(tiny: Path, tmp_path: Path, words: Path) -> None:
    found = {}
    for kind in ("int4", "int8"):
        flags = ("--quant", kind, "--group-size", 32, "--quant-head", "none", "--evaluate", words)
        assert _build(tiny, tmp_path, *flags) == 0
        found[kind] = json.loads((tmp_path / "engine" / QUANTIZATION).read_text())
    assert found["int8"]["error"] < found["int4"]["error"] / 10
    assert found["int8"]["divergence"]["kl"] < found["int4"]["divergence"]["kl"] / 10
    assert all(matrix["name"] != "embed_tokens" for matrix in found["int8"]["matrices"])


@pytest.mark.parametrize(
    "flags", [("--group-size", "32"), ("--quant-head", "none"), ("--evaluate", "x"), ("--calibrate", "x")]
)
def test_flags_that_want_quant(
    tiny: Path, tmp_path: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _build(tiny, tmp_path, *flags) == UsageError.exit_code
    assert f"{flags[0]} {flags[1]} goes with --quant int4 or --quant int8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("length", "named"),
    [(0, "has 0 tokens; at least 512 are needed"), (200, "without its last fifth, which is held out, has ")],
)
def test_a_calibration_text_that_is_too_short(
    tiny: Path, tmp_path: Path, words: Path, length: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words.write_text(WORDS[:length])
    code = _build(tiny, tmp_path, "--quant", "int4", "--group-size", 32, "--calibrate", words)
    assert code == UsageError.exit_code
    message = capsys.readouterr().err
    assert named in message
    assert f"--calibrate {words}" in message
    assert list(tmp_path.iterdir()) == [words]


def test_groups_that_do_not_fit(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _build(tiny, tmp_path, "--quant", "int4") == UsageError.exit_code
    message = capsys.readouterr().err
    assert "--group-size 64 does not divide the 96 columns of layers.0.mlp.down_proj" in message
    assert "--group-size 32 divides every row" in message
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = TINY.write_gguf(tmp_path / "q.gguf", linear="Q4_0")
    code = _build(path, tmp_path, "--quant", "int4", "--group-size", 32)
    assert code == CheckpointError.exit_code
    assert "q.gguf is quantized already (layers.0.self_attn.q_proj, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]

"""`edgellm plan`: engines and checkpoints, text and JSON, and its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ggufs import Llama
from tiny_llama import TinyLlama

from edgellm.cli import main
from edgellm.errors import UsageError
from edgellm.memory.sizes import parse_size

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.gguf"
    Llama().write(path)
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    path = checkpoint.parent / "engine"
    assert (
        main(["build", str(checkpoint), "-o", str(path), "--max-batch-size", "2", "--max-seq-len", "64"]) == 0
    )
    return path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json", "--budget", "4GiB"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_checkpoint_and_its_engine_take_the_same(
    checkpoint: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = plan(capsys, str(engine))
    unbuilt = plan(capsys, str(checkpoint), "--max-batch-size", "2", "--max-seq-len", "64")
    assert built["shape"] == {"max_batch_size": 2, "max_seq_len": 64, "max_num_tokens": 128}
    assert built["shape"] == unbuilt["shape"]
    assert built["lines"] == unbuilt["lines"]
    assert built["total"] == sum(line["bytes"] for line in built["lines"])
    assert built["headroom"] == built["budget"]["bytes"] - built["total"] == (4 << 30) - built["total"]
    assert built["rebuild"] == []


def test_a_checkpoint_that_is_to_be_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = TinyLlama(64, 4, 2, 32, 96, tied=True, rotary_base=1e4)
    checkpoint, engine = tiny.write_gguf(tmp_path / "f32.gguf"), tmp_path / "engine"
    flags = ["--quant", "int4", "--group-size", "32", "--quant-head", "int4"]
    assert main(["build", str(checkpoint), "-o", str(engine), *flags]) == 0
    unbuilt = plan(capsys, str(checkpoint), *flags)
    assert unbuilt["lines"] == plan(capsys, str(engine))["lines"]
    assert unbuilt["total"] < plan(capsys, str(checkpoint))["total"]
    assert main(["plan", str(engine), *flags]) == UsageError.exit_code
    assert "--quant int4 goes with a checkpoint" in capsys.readouterr().err


def test_an_engine_may_be_thought_of_otherwise(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-batch-size", "4", "--kv-cache", "fp16", "--compute", "fp32"]
    found = plan(capsys, str(engine), *flags)
    assert (found["compute"], found["kv_cache"], found["shape"]["max_batch_size"]) == ("fp32", "fp16", 4)
    assert found["rebuild"] == ["--max-batch-size", "--kv-cache", "--compute"]
    assert plan(capsys, str(engine), "--max-batch-size", "1")["rebuild"] == []


def test_what_fits_is_bounded_by_the_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(checkpoint))
    assert [shape["max_batch_size"] for shape in found["fits"]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(shape["max_seq_len"] == 128 for shape in found["fits"])  # the model's context


def test_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(checkpoint), "--budget", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny: 4 slots of 128 tokens, steps of 256, cpu int8, KV cache fp32\n")
    sizes = dict(re.findall(r"^([\w -]+?)  +([\d.]+ [MG]iB)", text, re.MULTILINE))
    named = [size for name, size in sizes.items() if name not in ("total", "budget", "headroom")]
    total = parse_size(sizes["total"])
    assert sum(map(parse_size, named)) == pytest.approx(total, abs=0.1 * MIB * len(named))
    assert parse_size(sizes["budget"]) - total == pytest.approx(parse_size(sizes["headroom"]), abs=MIB)
    assert re.search(r"^max_batch_size +1 +2 +4 .* 256\nmax_seq_len +128 +128", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("budget", "total_mib", "available_mib", "code"),
    [
        ("40MiB", 4096, 4000, 78),
        ("auto", 4096, 290, 75),
        ("auto", 300, 299, 78),
        ("auto", 4096, 4000, 0),
        ("1GiB", 4096, 10, 0),  # a size is the operator's word, whatever is free
    ],
)
def test_exit_codes(
    budget: str,
    total_mib: int,
    available_mib: int,
    code: int,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "proc").mkdir()
    meminfo = f"MemTotal: {total_mib * 1024} kB\nMemAvailable: {available_mib * 1024} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    assert main(["plan", str(checkpoint), "--budget", budget, "--root", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert "headroom" in said.out  # the plan is there to read in any case
    assert ("do not fit" in said.err) == bool(code)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--budget", "much"], 64, "--budget"),
        (["--max-seq-len", "1000"], 64, "--max-seq-len 1000"),
        (["--max-batch-size", "0"], 64, "--max-batch-size 0"),
    ],
)
def test_what_makes_no_sense_is_named(
    flags: list[str],
    code: int,
    words: str,
    checkpoint: Path,
    engine: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (checkpoint, engine):
        assert main(["plan", str(path), *flags]) == code
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""


def test_what_is_neither_engine_nor_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none")]) == 65
    assert main(["plan", "smollm2-135m"]) == 64
    assert "edgellm fetch smollm2-135m" in capsys.readouterr().err

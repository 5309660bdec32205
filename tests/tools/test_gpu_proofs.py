"""Proofs of several models in a row, on the emulated device: built, recorded or not, and told one by one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from emulator.compile import EmulatedCompiler
from emulator.driver import ORIN, EmulatedDriver

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import proofs
from random_engines import LARGEST_FLOAT32, REFERENCE, reference_engine

from edgellm.cli import main
from edgellm.cuda import driver
from edgellm.executor import cuda_kernels

pytestmark = pytest.mark.emulated


def test_a_recorded_reference_stands_in_for_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "load_driver", lambda: EmulatedDriver(ORIN))
    monkeypatch.setattr(cuda_kernels, "Compiler", EmulatedCompiler)
    monkeypatch.setattr("random_engines.SEQ_LEN", 48)
    monkeypatch.setattr("random_engines.REFERENCE_SEQ_LEN", 48)
    reference = reference_engine(tmp_path / "elsewhere", "tiny-qwen3")
    recorded = tmp_path / "references"
    recorded.mkdir()
    record = ["doctor", "--record", str(recorded / "tiny-qwen3.npz"), "--reference", str(reference.path)]
    assert main([*record, "--length", "10"]) == 0
    engines = tmp_path / "engines"
    capsys.readouterr()
    flags = ["--engines", str(engines), "--references", str(recorded), "--length", "10"]
    monkeypatch.setattr(sys, "argv", ["proofs.py", *flags, "tiny-qwen3", "tiny-llama", "no-such-model"])
    assert proofs.main() == 1
    out, err = capsys.readouterr()
    assert out.count("| passed |") == 18
    assert out.count(": passed") == 2
    assert "no-such-model" in err
    assert sorted(path.name for path in engines.iterdir()) == [
        "tiny-llama",
        f"tiny-llama{REFERENCE}",
        "tiny-qwen3",
    ]


@pytest.mark.parametrize(("least", "compute"), [(0, "int8"), (LARGEST_FLOAT32, "fp32")])
def test_a_reference_is_float32_unless_it_were_too_large(
    least: int, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random_engines.LARGEST_FLOAT32", least)
    assert reference_engine(tmp_path / "reference", "tiny-llama").compute == compute

"""The CUDA executor's kernels compute the model, as `edgellm doctor --prove` finds on an emulated device."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulator.compile import EmulatedCompiler
from emulator.driver import HOPPER, ORIN, EmulatedDriver
from tiny_llama import TinyLlama

from edgellm.cli import main
from edgellm.cuda import driver as module
from edgellm.cuda.launch import Device
from edgellm.executor import cuda_kernels

pytestmark = pytest.mark.emulated

MODELS = {
    "llama, tied": (TinyLlama(128, 2, 1, 64, 192, tied=True, rotary_base=1e4), "Q4_1", ORIN),
    "qwen3, untied": (
        TinyLlama(192, 2, 1, 64, 128, tied=False, rotary_base=1e6, family="Qwen3"),
        "Q4_0",
        HOPPER,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_engine_computes_its_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, quantization, device = MODELS[name]
    _emulate(monkeypatch, device)
    checkpoint = str(model.write_gguf(tmp_path / "tiny.gguf", quantization, "Q8_0"))
    sizes = ["--max-seq-len", "48", "--max-batch-size", "2", "--max-num-tokens", "32"]
    engine, reference = str(tmp_path / "engine"), str(tmp_path / "reference")
    assert main(["build", checkpoint, "-o", engine, "--executor", "cuda", *sizes]) == 0
    assert main(["build", checkpoint, "-o", reference, "--compute", "fp32", *sizes]) == 0
    capsys.readouterr()
    code = main(["doctor", "--prove", "--engine", engine, "--reference", reference, "--length", "20"])
    said = capsys.readouterr().out
    assert code == 0, said
    rows = [line.split(" | ") for line in said.splitlines() if line.endswith("| passed |")]
    assert len(rows) == 9
    assert all(float(cells[2]) <= 0.001 for cells in rows)
    assert "device memory taken after READY: 0 bytes asked for" in said


def _emulate(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(module, "load_driver", lambda: EmulatedDriver(device))
    monkeypatch.setattr(cuda_kernels, "Compiler", EmulatedCompiler)

"""The doctor's lines about CUDA, on a stand-in for the driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_driver import FakeDriver, Status
from trees import expand, put

from edgellm.cli import main
from edgellm.cuda import driver as module
from edgellm.cuda.driver import Driver
from edgellm.doctor import cuda
from edgellm.doctor.finding import Level
from edgellm.doctor.host import CONFIGURATION, Host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(expand("pc", tmp_path / "pc"), lambda _words: None)


def with_driver(monkeypatch: pytest.MonkeyPatch, api: FakeDriver) -> None:
    monkeypatch.setattr(module, "load_driver", lambda: api)


def test_what_can_run_is_told_without_making_a_context(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeDriver(sm=87)
    with_driver(monkeypatch, api)
    (finding,) = cuda.check_cuda(host, present=True)
    assert finding.level is Level.OK
    assert "can run: Fake Orin, sm_87, 8 SMs, driver for CUDA 12.6, NVRTC" in finding.value
    assert "cuDevicePrimaryCtxRetain" not in [name for name, _ in api.calls]
    assert Driver(api=api, context=False).facts.device.sm == 87


def test_why_it_cannot(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeDriver()
    api.fails["cuInit"] = Status.CUDA_ERROR_NO_DEVICE
    with_driver(monkeypatch, api)
    (finding,) = cuda.check_cuda(host, present=True)
    assert (finding.level, finding.value) == (Level.OK, "cannot run")
    assert "no CUDA device" in finding.meaning
    (missing,) = cuda.check_cuda(host, present=False)
    assert missing.value == "cannot run"


@pytest.mark.parametrize(("sm", "compiler"), [(87, True), (87, False), (90, True), (90, False)])
def test_the_engines_kernels(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sm: int, compiler: bool
) -> None:
    from tiny_llama import TinyLlama

    tiny = TinyLlama(128, 2, 1, 64, 192, tied=True, rotary_base=1e6, layers=1)
    checkpoint = tiny.write_gguf(tmp_path / "tiny.gguf", "Q4_0")
    engine = tmp_path / "engine"
    flags = ["--executor", "cuda", "--sm", "87", "--max-batch-size", "1", "--max-num-tokens", "16"]
    assert main(["build", str(checkpoint), "-o", str(engine), *flags]) == 0
    put(host.root, CONFIGURATION, f'[engine]\npath = "{engine}"\n')
    with_driver(monkeypatch, FakeDriver(sm=sm))
    if not compiler:
        monkeypatch.setattr(cuda, "_compiler", lambda: None)
    executor, kernels = cuda.check_cuda(Host(host.root, lambda _words: None), present=True)
    assert ("no NVRTC" in executor.value) == (not compiler)
    assert kernels.check == "kernels"
    if sm == 87:
        assert (kernels.level, kernels.value) == (Level.OK, "the engine has them for sm_87")
    else:
        assert kernels.level is (Level.OK if compiler else Level.FAIL)
        assert "--sm 90" in kernels.remedy

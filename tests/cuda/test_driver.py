"""The driver's errors as an operator meets them, against a stand-in for cuda-bindings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_driver import FakeDriver, Status

from edgellm.cuda.bindings import instantiate_graph
from edgellm.cuda.driver import Driver, resolve
from edgellm.cuda.launch import At
from edgellm.errors import DeviceError, DeviceLost, ExecutorFault, TemporaryShortage


def test_facts() -> None:
    facts = Driver(api=FakeDriver(sm=87)).facts
    assert facts.name == "Fake Orin"
    assert (facts.device.sm, facts.device.multiprocessors, facts.device.shared_per_block) == (
        87,
        8,
        163 << 10,
    )
    assert facts.integrated
    assert facts.driver == (12, 6)


def test_no_driver() -> None:
    def missing(_flags: int) -> tuple[Any, ...]:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(DeviceError, match=r"no CUDA driver .*nvidia-l4t-cuda.*--executor cpu"):
        Driver(api=SimpleNamespace(cuInit=missing))


@pytest.mark.parametrize(
    ("api", "says"),
    [
        (FakeDriver(version=11040), r"knows CUDA 11\.4, .* for CUDA 12: pip install 'edgellm\[cuda11\]'"),
        (FakeDriver(sm=72), r"compute capability 7\.2; the kernels need 8\.0"),
        (FakeDriver(devices=0), r"no CUDA device 0; the driver finds none"),
    ],
)
def test_what_can_never_work(api: FakeDriver, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        Driver(api=api)


def test_a_driver_newer_than_the_bindings_will_do() -> None:
    assert Driver(api=FakeDriver(version=13000)).facts.driver == (13, 0)


def test_a_driver_that_does_not_match_its_module() -> None:
    api = FakeDriver()
    api.fails["cuInit"] = Status.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
    with pytest.raises(DeviceError, match=r"too old or does not match"):
        Driver(api=api)


def test_no_device_says_which_of_three_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeDriver()
    api.fails["cuInit"] = Status.CUDA_ERROR_NO_DEVICE
    with pytest.raises(DeviceError, match=r"no device node in .*/dev"):
        Driver(api=api, root=tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvmap").touch()
    with pytest.raises(DeviceError, match=r"though there is .*nvmap: dmesg"):
        Driver(api=api, root=tmp_path)
    monkeypatch.setattr("edgellm.cuda.failures.os.access", lambda path, mode: False)  # root may open anything
    with pytest.raises(DeviceError, match=r"may not open .*nvmap .*video,render"):
        Driver(api=api, root=tmp_path)


def test_too_little_memory_names_the_knobs() -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    api.fails["cuMemAlloc"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(
        TemporaryShortage,
        match=r"3\.00 GiB .* 512\.0 MiB of 1\.00 GiB are free; lower engine\.max_batch_size",
    ):
        driver.allocate(3 << 30)


@pytest.mark.parametrize("status", [Status.CUDA_ERROR_ILLEGAL_ADDRESS, Status.CUDA_ERROR_LAUNCH_FAILED])
def test_a_sticky_error_is_a_lost_device(status: Status) -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    api.fails["cuGraphLaunch"] = api.fails["cuEventQuery"] = status
    with pytest.raises(DeviceLost, match=rf"{status.name}.*start anew"):
        driver.call("cuGraphLaunch", 1, 2)
    with pytest.raises(DeviceLost):
        driver.done(1)


def test_other_errors() -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    api.fails["cuModuleLoadData"] = Status.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(DeviceError, match=r"built for another GPU"):
        driver.load(b"", "name", 0)
    api.fails["cuStreamCreate"] = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(ExecutorFault, match=r"cuStreamCreate failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.stream()


def test_an_event_that_is_not_reached_yet() -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    assert driver.done(1)
    api.fails["cuEventQuery"] = Status.CUDA_ERROR_NOT_READY
    assert not driver.done(1)


def test_close_gives_everything_back_and_again_does_nothing() -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    address, pinned = driver.allocate(100), driver.pin(100)
    driver.stream()
    driver.load(b"", "name", 100_000)
    assert pinned.size == 100
    assert not pinned.any()
    driver.free(address)
    driver.unpin(pinned)
    driver.close()
    before = len(api.calls)
    driver.close()
    assert len(api.calls) == before
    assert not api.live
    names = [name for name, _ in api.calls]
    for made, given in (("ModuleLoadData", "ModuleUnload"), ("StreamCreate", "StreamDestroy")):
        assert names.count(f"cu{made}") == names.count(f"cu{given}") == 1
    assert names.count("cuDevicePrimaryCtxRelease") == 1


def test_a_launch_is_what_was_asked() -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    arguments = resolve([At("x", 16), 7, 0.5, None], lambda at: 0x1000 + at.offset)
    driver.launch(9, (3, 2, 1), threads=128, shared=1024, arguments=arguments, stream=5, early=True)
    name, (config, function, (values, types), _) = api.calls[-1]
    assert (name, function) == ("cuLaunchKernelEx", 9)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX) == (3, 2, 1, 128)
    assert (config.sharedMemBytes, config.numAttrs) == (1024, 1)
    assert values == (0x1010, 7, 0.5, 0)
    assert [each.__name__ for each in types] == ["c_void_p", "c_int", "c_float", "c_void_p"]


def test_a_capture_that_fails_ends_the_capture() -> None:
    api = FakeDriver()
    driver = Driver(api=api)

    def body() -> None:
        raise ExecutorFault("a launch failed")

    with pytest.raises(ExecutorFault, match="a launch failed"):
        driver.capture(1, body)
    assert api.calls[-1][0] == "cuStreamEndCapture"


def test_graphs_are_instantiated_as_each_version_wants() -> None:
    old = SimpleNamespace(cuGraphInstantiate=None, cuGraphInstantiateWithFlags=lambda *a: (0, ("old", *a)))
    new = SimpleNamespace(cuGraphInstantiate=lambda *a: (0, ("new", *a)))
    assert instantiate_graph(old, "g") == (0, ("old", "g", 0))
    assert instantiate_graph(new, "g") == (0, ("new", "g", 0))


def test_edgellm_on_a_cpu_imports_no_cuda() -> None:
    program = (
        "import sys, edgellm.cli, edgellm.daemon, edgellm.executor.cpu, edgellm.commands.build\n"
        "import edgellm.model.onnx\n"
        "cuda = ('cuda.', 'edgellm.cuda.')\n"
        "print([name for name in sys.modules if name == 'cuda' or name.startswith(cuda)])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

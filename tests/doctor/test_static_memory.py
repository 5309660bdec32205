"""Memory that a device's executor takes after READY is seen, whoever took it; and the proof says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice
from fake_driver import FakeDriver
from tiny_llama import TinyLlama

from edgellm.cli import main
from edgellm.cuda import driver as module
from edgellm.cuda.driver import Driver
from edgellm.doctor.static_memory import StaticMemory, Taken

MIB = 1 << 20
TINY = TinyLlama(128, 3, 1, 64, 192, tied=True, rotary_base=1e4)


class Discrete(FakeDriver):
    """A device with memory of its own, of which somebody may take some."""

    def __init__(self) -> None:
        super().__init__()
        self._attributes[18] = 0
        self.others = 0

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "cuMemGetInfo":
            own = sum(len(memory) for memory in self.live.values())
            return (self._memory - own - self.others, self._memory)
        return super()._results(name, arguments)


def test_nothing_is_taken_by_what_is_given_back() -> None:
    driver = Driver(api=Discrete())
    kept, pinned = driver.allocate(MIB), driver.pin(4096)
    assert driver.held == MIB + 4096
    memory = StaticMemory(driver)
    driver.free(driver.allocate(2 * MIB))
    driver.unpin(driver.pin(MIB))
    assert memory.taken() == Taken(0, 0)
    assert memory.taken().nothing
    driver.unpin(pinned)
    driver.free(kept)
    assert driver.held == 0


@pytest.mark.parametrize("pinned", [False, True])
def test_what_was_asked_for_is_seen(pinned: bool) -> None:
    driver = Driver(api=Discrete())
    memory = StaticMemory(driver)
    _ = driver.pin(MIB) if pinned else driver.allocate(MIB)
    assert memory.taken() == Taken(MIB, MIB)
    assert not memory.taken().nothing


def test_what_the_driver_takes_for_itself_is_seen_where_the_device_has_its_own_memory() -> None:
    api = Discrete()
    memory = StaticMemory(Driver(api=api))
    api.others = 3 * MIB
    assert memory.taken() == Taken(0, 3 * MIB)
    assert not memory.taken().nothing
    assert f"{3 * MIB} bytes less free on the device, by the driver itself" in str(memory.taken())


def test_where_the_gpu_has_the_hosts_memory_others_are_not_counted() -> None:
    api = FakeDriver()
    memory = StaticMemory(Driver(api=api))
    api._memory //= 2
    assert memory.taken() == Taken(0, None)
    assert "the GPU has the host's DRAM" in str(memory.taken())


class Leaking(FakeDevice):
    """A device whose driver takes memory whenever a graph of prompts runs, from a certain one on."""

    graphs = 0

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self._attributes[18] = 0
        if name == "cuGraphLaunch":
            self.graphs += 1
        if name == "cuMemGetInfo":
            return (self._memory - 4096 * max(0, self.graphs - 40), self._memory)
        return super()._results(name, arguments)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda")
    checkpoint = TINY.write_gguf(path / "tiny.gguf", "Q4_1", "Q8_0")
    # One slot: the device knows nothing of caches that are copied.
    sizes = ["--max-seq-len", "48", "--max-batch-size", "1", "--max-num-tokens", "32"]
    assert main(["build", str(checkpoint), "-o", str(path / "engine"), "--executor", "cuda", *sizes]) == 0
    return path / "engine"


@pytest.mark.parametrize(("device", "code", "says"), [(FakeDevice, 0, "passed"), (Leaking, 2, "FAILED")])
def test_a_cuda_engine_is_proved_with_its_memory(
    device: type[FakeDevice],
    code: int,
    says: str,
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On devices that compute the same noise: what is proved is that the command goes all the way."""
    vocabulary = TINY.vocab
    monkeypatch.setattr(module, "load_driver", lambda: device(vocabulary, 1))
    capsys.readouterr()
    assert main(["doctor", "--prove", "--engine", str(engine), "--reference", str(engine)]) == code
    lines = capsys.readouterr().out.splitlines()
    assert "executor cuda on Fake Orin (sm_87, 8 SMs at up to 918 MHz, driver for CUDA 12.6)" in lines[0]
    assert all(line.endswith("| passed |") for line in lines[4:10])
    assert lines[11].startswith("device memory taken after READY: 0 bytes asked for")
    assert lines[11].endswith(says)

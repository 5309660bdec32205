"""Weights on their way to the device: every byte arrives, whatever the file system does."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice
from fake_driver import Status

from edgellm.cuda.driver import Driver
from edgellm.errors import DeviceLost, EngineError
from edgellm.executor.cuda_memory import Pinned, load_weights
from edgellm.model.weights_file import (
    DIGESTS_FILE,
    Entry,
    WeightsFile,
    constant,
    read_digests,
    read_weights_header,
    write_weights,
)

PIECE = 8192


def write(path: Path, size: int) -> tuple[WeightsFile, bytes]:
    values = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    write_weights(path, [Entry("one", size, constant(values))], lambda _what, _done: None, piece=PIECE)
    file = read_weights_header(path)
    return file, path.read_bytes()[file.data :]


def load(file: WeightsFile, device: FakeDevice) -> bytes:
    driver = Driver(api=device)
    target = (ctypes.c_uint8 * file.bytes)()
    fractions: list[float] = []
    load_weights(
        driver,
        driver.stream(),
        file,
        ctypes.addressof(target),
        digests=read_digests(file.path),
        progress=fractions.append,
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert not device.live  # the pieces are given back
    driver.close()
    return bytes(target)


@pytest.mark.parametrize("size", [1, 256, 4096, 8192, 8193, 12_000, 49_152, 200_000])
def test_every_byte_arrives(tmp_path: Path, size: int) -> None:
    file, expected = write(tmp_path / "w", size)
    assert load(file, FakeDevice(1, 1)) == expected


@pytest.mark.parametrize("at", [3000, 4096 + 256, 4096 + 60_000])
def test_a_byte_that_changed_is_found_on_the_way(tmp_path: Path, at: int) -> None:
    file, _ = write(tmp_path / "w", 70_000)
    raw = bytearray(file.path.read_bytes())
    raw[at] ^= 1
    file.path.write_bytes(raw)
    with pytest.raises(EngineError, match=r"not as it was built: its SHA-256 differs"):
        load(file, FakeDevice(1, 1))


def test_the_digests_are_those_of_the_pieces(tmp_path: Path) -> None:
    file, _ = write(tmp_path / "w", 70_000)
    raw = file.path.read_bytes()
    expected = [hashlib.sha256(raw[at : at + PIECE]).hexdigest() for at in range(0, len(raw), PIECE)]
    assert (tmp_path / DIGESTS_FILE).read_text().split() == [str(PIECE), *expected]


@pytest.mark.parametrize("text", ["", "8192", "x\n", "100\n00", "-4096\n", "8192\n00", "\xff"])
def test_digests_that_are_not_the_files(tmp_path: Path, text: str) -> None:
    file, _ = write(tmp_path / "w", 70_000)
    (tmp_path / DIGESTS_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(EngineError, match="build the engine again"):
        load(file, FakeDevice(1, 1))
    (tmp_path / DIGESTS_FILE).unlink()
    with pytest.raises(EngineError, match=rf"cannot read .*{DIGESTS_FILE}"):
        load(file, FakeDevice(1, 1))


@pytest.mark.parametrize("how", ["no direct files", "no direct reads", "short reads"])
def test_file_systems_that_do_it_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    file, expected = write(tmp_path / "w", 70_000)
    opened, read = os.open, os.preadv
    direct: set[int] = set()

    def open_(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT and how == "no direct files":
            raise OSError(22, "Invalid argument")
        descriptor = opened(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        if descriptor in direct:
            assert offset % 4096 == 0
            if how == "no direct reads":
                raise OSError(22, "Invalid argument")
            if how == "short reads":
                return read(descriptor, [buffers[0][:4096]], offset)
        elif how == "short reads":
            return read(descriptor, [buffers[0][:1000]], offset)
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    assert load(file, FakeDevice(1, 1)) == expected


def test_a_file_that_lost_its_end_or_is_gone(tmp_path: Path) -> None:
    file, _ = write(tmp_path / "w", 70_000)
    os.truncate(file.path, file.data + 30_000)
    with pytest.raises(EngineError, match="is cut off; build the engine again"):
        load(file, FakeDevice(1, 1))
    file.path.unlink()
    with pytest.raises(EngineError, match=r"cannot read .*No such file"):
        load(file, FakeDevice(1, 1))


def test_a_device_lost_while_loading(tmp_path: Path) -> None:
    file, _ = write(tmp_path / "w", 70_000)
    device = FakeDevice(1, 1)
    device.fails["cuMemcpyHtoDAsync"] = Status.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DeviceLost):
        load(file, device)


def test_arrays_in_page_locked_memory_lie_apart() -> None:
    device = FakeDevice(1, 1)
    pinned = Pinned(Driver(api=device), 1024)
    one, two = pinned.take((3, 5), np.int32), pinned.take((100,), np.uint8)
    assert two.ctypes.data - one.ctypes.data == 256
    one[:], two[:] = 7, 9
    assert (one == 7).all()
    assert pinned.bytes == 1024
    pinned.close()
    assert not device.live

"""The CUDA executor's memory: one device allocation, carved, and a page-locked block for what goes across."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import At
from edgellm.errors import EngineError
from edgellm.executor.cuda_programs import Program
from edgellm.memory.arena import Buffer, aligned, place
from edgellm.model.weights_file import PAGE, WeightsFile

PIECE_BYTES: Final = 16 << 20
"""Of the weights file, read and sent at a time."""
PIECES: Final = 3
"""On their way: one being read, one being sent, one about to be."""


class DeviceMemory:
    """Lasting buffers, then the piece that all programs share, in one allocation.

    Args:
        driver: its context is current.
        lasting: buffers that keep something between steps.
        programs: whose own buffers take turns.

    Raises:
        TemporaryShortage: the device has not as much.
    """

    def __init__(self, driver: Driver, lasting: Iterable[Buffer], programs: Iterable[Program]) -> None:
        self._driver = driver
        self._lasting = {buffer.name: buffer.bytes for buffer in lasting}
        placement = place(Buffer(name, size) for name, size in self._lasting.items())
        self._offsets = placement.offsets
        self.lasting_bytes = placement.bytes
        self.shared_bytes = max((program.placement.bytes for program in programs), default=0)
        self.address: int | None = driver.allocate(self.lasting_bytes + self.shared_bytes)

    @property
    def bytes(self) -> int:
        """Of the allocation."""
        return self.lasting_bytes + self.shared_bytes

    def size(self, name: str) -> int:
        """Bytes of a lasting buffer."""
        return self._lasting[name]

    def at(self, name: str) -> int:
        """Address of a lasting buffer."""
        assert self.address is not None, "the memory was given back"
        return self.address + self._offsets[name]

    def resolver(self, program: Program) -> Callable[[At], int]:
        """Where a program's launches find their buffers."""
        assert self.address is not None, "the memory was given back"
        shared = self.address + self.lasting_bytes
        own: Mapping[str, int] = program.placement.offsets

        def address_of(at: At) -> int:
            base = shared + own[at.buffer] if at.buffer in own else self.at(at.buffer)
            return base + at.offset

        return address_of

    def address_in(self, program: Program, name: str) -> int:
        """Address of one of a program's own buffers."""
        return self.resolver(program)(At(name))

    def clear(self, stream: Any, *, keep: Sequence[str] = ()) -> None:
        """Zero every lasting buffer but those to keep: counters begin at 0, and no cache holds a NaN."""
        for name, size in self._lasting.items():
            if name not in keep and size:
                self._driver.call("cuMemsetD8Async", self.at(name), 0, size, stream)

    def close(self) -> None:
        """Give it back; idempotent."""
        if self.address is not None:
            address, self.address = self.address, None
            self._driver.free(address)


class Pinned:
    """Page-locked memory, cut into arrays one after the other."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver = driver
        self._raw: NDArray[np.uint8] | None = driver.pin(size)
        self._at = 0

    @property
    def bytes(self) -> int:
        """Of the block."""
        return 0 if self._raw is None else self._raw.nbytes

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """The next array, 256-byte aligned."""
        assert self._raw is not None, "the memory was given back"
        size = pinned_size(shape, dtype)
        raw = self._raw[self._at : self._at + int(np.prod(shape)) * np.dtype(dtype).itemsize]
        self._at += size
        array: NDArray[Any] = raw.view(dtype).reshape(shape)
        return array

    def close(self) -> None:
        """Give it back; nothing may look at the arrays any more. Idempotent."""
        if self._raw is not None:
            raw, self._raw = self._raw, None
            self._driver.unpin(raw)


def pinned_size(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes that `Pinned.take` uses for an array."""
    return aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize)


def load_weights(
    driver: Driver, stream: Any, file: WeightsFile, address: int, progress: Callable[[float], None]
) -> None:
    """Read a weights file into device memory, without the page cache: there is never a second copy of it.

    Direct reads go into page-locked pieces; where a file system has none (tmpfs), pages are dropped behind.

    Raises:
        EngineError: the file cannot be read, or is shorter than its header says.
    """
    size = -(-file.bytes // PAGE) * PAGE
    piece = min(PIECE_BYTES, max(size, PAGE))
    pinned = Pinned(driver, PIECES * piece)
    buffers = [pinned.take((piece,), np.uint8) for _ in range(PIECES)]
    events = [driver.event() for _ in buffers]
    sent = [False] * len(buffers)
    reader = _Reader(file.path)
    starts = range(0, file.bytes, piece)
    try:
        with ThreadPoolExecutor(1, "weights") as pool:
            # One piece is read while the ones in front of it are sent.
            ahead: list[Future[int]] = []

            def read(index: int) -> None:
                slot = index % PIECES
                if sent[slot]:
                    driver.call("cuEventSynchronize", events[slot])
                ahead.append(pool.submit(reader.read, buffers[slot], file.data + starts[index]))

            if starts:
                read(0)
            for index, start in enumerate(starts):
                wanted = min(piece, file.bytes - start)
                if ahead.pop(0).result() < wanted:
                    raise EngineError(f"{file.path} is cut off; build the engine again")
                slot = index % PIECES
                driver.call("cuMemcpyHtoDAsync", address + start, buffers[slot].ctypes.data, wanted, stream)
                driver.call("cuEventRecord", events[slot], stream)
                sent[slot] = True
                if index + 1 < len(starts):
                    read(index + 1)
                progress((start + wanted) / file.bytes)
            driver.call("cuStreamSynchronize", stream)
    finally:
        reader.close()
        for event in events:
            driver.call("cuEventDestroy", event)
        pinned.close()


class _Reader:
    """Reads a file around the page cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._direct = True
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            self._direct = False
            self._file = self._guarded(lambda: os.open(path, os.O_RDONLY))

    def read(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill the buffer from `offset` on; gives how much there was."""
        done = 0
        while done < buffer.nbytes:
            try:
                count = os.preadv(self._file, [buffer[done:].data], offset + done)
            except OSError as error:
                if not self._direct:
                    raise EngineError(f"cannot read {self._path}: {error.strerror}") from error
                self._fall_back()
                continue
            if count == 0:
                break
            done += count
            if self._direct and done % PAGE:
                # The end of the file, or a read cut short: direct ones begin at whole pages only.
                self._fall_back()
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _fall_back(self) -> None:
        self._direct = False
        os.close(self._file)
        self._file = self._guarded(lambda: os.open(self._path, os.O_RDONLY))

    def _guarded(self, function: Callable[[], int]) -> int:
        try:
            return function()
        except OSError as error:
            raise EngineError(f"cannot read {self._path}: {error.strerror}") from error

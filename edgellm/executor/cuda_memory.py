"""The CUDA executor's memory: one device allocation, carved, and a page-locked block for what goes across."""

from __future__ import annotations

import collections
import hashlib
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
from edgellm.executor.program import Program
from edgellm.memory.arena import Buffer, aligned, place
from edgellm.model.weights_file import PAGE, PieceDigests, WeightsFile

READERS: Final = 4
"""Pieces that are being read: what a disk needs to have in its queue to be fast."""
PIECES: Final = READERS + 2
"""On their way: those being read, and two being sent."""


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
    driver: Driver,
    stream: Any,
    file: WeightsFile,
    address: int,
    *,
    digests: PieceDigests,
    progress: Callable[[float], None],
) -> None:
    """Read a weights file into device memory, without the page cache: there is never a second copy of it.

    Direct reads go into page-locked pieces; where a file system has none (tmpfs), pages are dropped behind.
    Who reads a piece compares it, too.

    Args:
        address: on the device, of the first tensor.
        digests: of the file's pieces, which it is read in.

    Raises:
        EngineError: the file cannot be read, is shorter than its header says, or is not as it was built.
    """
    size = file.data + file.bytes
    starts = range(0, size, digests.piece)
    if len(starts) != len(digests.sha256):
        raise EngineError(f"{file.path} is longer or shorter than its digests; build the engine again")
    piece = min(digests.piece, -(-size // PAGE) * PAGE)
    count = min(PIECES, len(starts))
    pinned = Pinned(driver, count * piece)
    buffers = [pinned.take((piece,), np.uint8) for _ in range(count)]
    sent = [driver.event() for _ in buffers]
    reading: collections.deque[Future[NDArray[np.uint8]]] = collections.deque()
    try:
        with ThreadPoolExecutor(READERS, "weights") as pool, _Reader(file.path) as reader:
            begun = 0

            def fetch(number: int) -> NDArray[np.uint8]:
                buffer = buffers[number % count]
                here = buffer[: min(piece, size - starts[number])]
                if reader.read(buffer, starts[number]) < here.nbytes:
                    raise EngineError(f"{file.path} is cut off; build the engine again")
                if hashlib.sha256(here.data).hexdigest() != digests.sha256[number]:
                    raise EngineError(
                        f"{file.path} is not as it was built: its SHA-256 differs; build the engine again"
                    )
                return here

            for index, start in enumerate(starts):
                while begun < min(len(starts), index + READERS):
                    slot = begun % count
                    if begun >= count:
                        driver.call("cuEventSynchronize", sent[slot])
                    reading.append(pool.submit(fetch, begun))
                    begun += 1
                here = reading.popleft().result()
                end = start + here.nbytes
                here = here[max(file.data - start, 0) :]
                if here.nbytes:
                    target = address + end - here.nbytes - file.data
                    driver.call("cuMemcpyHtoDAsync", target, here.ctypes.data, here.nbytes, stream)
                driver.call("cuEventRecord", sent[index % count], stream)
                progress(end / size)
            driver.call("cuStreamSynchronize", stream)
    finally:
        for event in sent:
            driver.call("cuEventDestroy", event)
        pinned.close()


class _Reader:
    """Reads a file around the page cache; any thread may."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain = self._open(os.O_RDONLY)
        try:
            self._direct: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            self._direct = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._plain, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def read(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill the buffer from `offset` on, a multiple of PAGE; gives how much there was.

        Raises:
            EngineError: it cannot be read.
        """
        done = self._read_direct(buffer, offset)
        plain = done
        while done < buffer.nbytes:
            try:
                count = os.preadv(self._plain, [buffer[done:].data], offset + done)
            except OSError as error:
                raise EngineError(f"cannot read {self._path}: {error.strerror}") from error
            if count == 0:
                break
            done += count
        if done > plain and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain, offset + plain, done - plain, os.POSIX_FADV_DONTNEED)
        return done

    def _read_direct(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """As far as the file system lets it, in whole pages."""
        done = 0
        while self._direct is not None and done < buffer.nbytes:
            try:
                count = os.preadv(self._direct, [buffer[done:].data], offset + done)
            except OSError:
                break  # no direct reads here; the others tell a real error
            done += count
            if not count or done % PAGE:
                break  # the end of the file; direct reads begin at whole pages only
        return done

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._path, flags)
        except OSError as error:
            raise EngineError(f"cannot read {self._path}: {error.strerror}") from error

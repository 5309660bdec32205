"""`weights.safetensors` of a CUDA engine: bytes in the order in which kernels read them.

A safetensors file whose tensors are all U8 and padded to a multiple of 256 bytes, data beginning at a
multiple of 4096: read as one piece into device memory, every tensor is as aligned as any kernel needs it. Its
sizes are known before anything is read, so the file is written front to back, a piece at a time.

`weights.sha256` beside it has the SHA-256 of every 16 MiB of the file, so that several threads can compare
them while they read: one thread hashes more slowly than a disk reads. Its first line is the number of bytes
of a piece, each further one a piece's digest in hex.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import EngineError
from edgellm.executor.base import Progress
from edgellm.memory.arena import aligned

WEIGHTS_FILE: Final = "weights.safetensors"
DIGESTS_FILE: Final = "weights.sha256"
PIECE_BYTES: Final = 16 << 20
PAGE: Final = 4096
"""What O_DIRECT wants offsets to be a multiple of."""

Pieces = Callable[[], Iterable[NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written.

    Attributes:
        bytes: of all its pieces.
        pieces: makes them, in order.
    """

    name: str
    bytes: int
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """Where things lie in a file.

    Attributes:
        path: the file.
        data: bytes in front of the first tensor, a multiple of PAGE.
        bytes: of all tensors.
        offsets: of each, from `data` on, a multiple of 256.
    """

    path: Path
    data: int
    bytes: int
    offsets: dict[str, int]


@dataclass(frozen=True, slots=True)
class PieceDigests:
    """What the pieces of a file are to be.

    Attributes:
        piece: bytes of each but the last; a multiple of PAGE.
        sha256: of each, in hex, in order.
    """

    piece: int
    sha256: tuple[str, ...]


def write_weights(
    path: Path, entries: Iterable[Entry], progress: Progress, *, piece: int = PIECE_BYTES
) -> str:
    """Write the file, and its pieces' digests beside it; gives the SHA-256 of the whole in hex.

    Raises:
        OSError: it cannot be written.
        CheckpointError, BuildError: as an entry's pieces raise it.
    """
    entries = list(entries)
    header, at = {}, 0
    for entry in entries:
        size = aligned(entry.bytes)
        header[entry.name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    if len(header) != len(entries):
        raise ValueError("two tensors have the same name")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    whole, pieces = hashlib.sha256(), _Pieces(piece)
    with path.open("wb") as file:

        def write(raw: Any) -> None:
            file.write(raw)
            whole.update(raw)
            pieces.update(memoryview(raw))

        write(struct.pack("<Q", len(text)) + text)
        done = 0
        for entry in entries:
            progress("weights", done / max(at, 1))
            written = 0
            for part in entry.pieces():
                raw = np.ascontiguousarray(part).view(np.uint8).reshape(-1)
                write(raw.data)
                written += raw.nbytes
            if written != entry.bytes:
                raise AssertionError(f"{entry.name} took {written} bytes, not {entry.bytes}")
            write(bytes(aligned(written) - written))
            done += aligned(written)
    lines = [str(piece), *pieces.ended()]
    (path.parent / DIGESTS_FILE).write_text("\n".join(lines) + "\n", encoding="ascii")
    return whole.hexdigest()


def read_weights_header(path: Path) -> WeightsFile:
    """Read where the tensors of a file lie.

    Raises:
        EngineError: it cannot be read, or is not as `write_weights` leaves it.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if 8 + length > size:
                raise EngineError(f"{path} is cut off; build the engine again")
            header = json.loads(file.read(length))
        data = 8 + length
        offsets = {name: int(tensor["data_offsets"][0]) for name, tensor in header.items()}
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise EngineError(f"{path} is damaged; build the engine again") from error
    if data % PAGE or any(offset != aligned(offset) for offset in offsets.values()):
        raise EngineError(f"{path} is not in the layout of this edgellm; build the engine again")
    return WeightsFile(path, data, size - data, offsets)


def read_digests(path: Path) -> PieceDigests:
    """Read what the pieces of a weights file are to be, from beside it.

    Raises:
        EngineError: it cannot be read, or is not as `write_weights` leaves it.
    """
    digests = path.parent / DIGESTS_FILE
    try:
        piece, *lines = digests.read_text(encoding="ascii").split()
        size = int(piece)
    except OSError as error:
        raise EngineError(f"cannot read {digests}: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(f"{digests} is damaged; build the engine again") from error
    if size <= 0 or size % PAGE:
        raise EngineError(f"{digests} is damaged; build the engine again")
    return PieceDigests(size, tuple(lines))


class _Pieces:
    """SHA-256 of every `size` bytes of what it is given."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._room = size
        self._digest = hashlib.sha256()
        self._ended: list[str] = []

    def update(self, raw: memoryview) -> None:
        while raw.nbytes:
            part, raw = raw[: self._room], raw[self._room :]
            self._digest.update(part)
            self._room -= part.nbytes
            if not self._room:
                self._end()

    def ended(self) -> list[str]:
        """Of all pieces, the last one maybe shorter."""
        if self._room < self._size:
            self._end()
        return self._ended

    def _end(self) -> None:
        self._ended.append(self._digest.hexdigest())
        self._digest, self._room = hashlib.sha256(), self._size


def constant(array: NDArray[Any]) -> Pieces:
    """Pieces of what is at hand already."""

    def pieces() -> Iterator[NDArray[Any]]:
        yield array

    return pieces

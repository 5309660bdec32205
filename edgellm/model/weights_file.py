"""`weights.safetensors` of a CUDA engine: bytes in the order in which kernels read them.

A safetensors file whose tensors are all U8 and padded to a multiple of 256 bytes, data beginning at a
multiple of 4096: read as one piece into device memory, every tensor is as aligned as any kernel needs it. Its
sizes are known before anything is read, so the file is written front to back, a piece at a time.
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


def write_weights(path: Path, entries: Iterable[Entry], progress: Progress) -> str:
    """Write the file; gives its SHA-256 in hex.

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
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(raw: Any) -> None:
            file.write(raw)
            digest.update(raw)

        write(struct.pack("<Q", len(text)) + text)
        done = 0
        for entry in entries:
            progress("weights", done / max(at, 1))
            written = 0
            for piece in entry.pieces():
                raw = np.ascontiguousarray(piece).view(np.uint8).reshape(-1)
                write(raw.data)
                written += raw.nbytes
            if written != entry.bytes:
                raise AssertionError(f"{entry.name} took {written} bytes, not {entry.bytes}")
            write(bytes(aligned(written) - written))
            done += aligned(written)
    return digest.hexdigest()


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


def constant(array: NDArray[Any]) -> Pieces:
    """Pieces of what is at hand already."""

    def pieces() -> Iterator[NDArray[Any]]:
        yield array

    return pieces

"""A file whose tensors are read where they lie, by system calls at an offset.

It is read with pread, not mapped: pages of a mapping count as this process's memory, and a file that shrinks
meanwhile is a SIGBUS there and an error here.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import CheckpointError


class TensorFile:
    """A file that stays open as long as someone holds this.

    Attributes:
        descriptor: of the open file.
        size: its bytes when it was opened.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self.descriptor)
            self.size = os.fstat(self.descriptor).st_size
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def read(self, count: int, offset: int = 0) -> bytes:
        """`count` bytes, or fewer where the file ends.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            return os.pread(self.descriptor, count, offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def fill(self, raw: NDArray[np.uint8], offset: int, name: str) -> None:
        """Read as many bytes as the array has, of a tensor.

        Raises:
            CheckpointError: the file is shorter than it was, or cannot be read.
        """
        view, done = raw.reshape(-1).data, 0
        while done < raw.size:
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends inside tensor {name}; it has changed since it was opened"
                )
            done += count

"""The SHA-256 of a file that is still being written: reading a large one again at the end takes as long.

What has been hashed is also sent to the disk. Left to itself, Linux begins when a tenth of the memory is to
be written, and the fsync at the end waits for all of that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from typing import Final

CHUNK_BYTES: Final = 1 << 20


class RunningDigest:
    """Hashes a file on a thread of its own, behind whoever writes it.

    Args:
        fd: of the file, readable; it stays open until `finish` or `abandon` has returned.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()
        self._ends: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self._thread.start()

    def advance(self, end: int) -> None:
        """Say that the bytes before `end` will not change any more."""
        self._ends.put(end)

    def finish(self) -> str:
        """The digest in hex of the bytes before the last `advance`.

        Raises:
            OSError: they could not be read.
        """
        self._ends.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """End the thread, whatever is left; after `finish` nothing happens."""
        self._abandoned = True
        self._ends.put(None)
        self._thread.join()

    def _run(self) -> None:
        done, view = 0, memoryview(bytearray(CHUNK_BYTES))
        while (end := self._ends.get()) is not None:
            begin = done
            while done < end and not self._abandoned and self._error is None:
                try:
                    count = os.preadv(self._fd, [view[: end - done]], done)
                except OSError as error:
                    self._error = error
                    break
                if count == 0:
                    self._error = OSError(errno.EIO, "a file that is being written became shorter")
                self._digest.update(view[:count])
                done += count
            if done > begin:
                # Begins to write dirty pages, which stay (mm/fadvise.c); Python has no sync_file_range(2).
                os.posix_fadvise(self._fd, begin, done - begin, os.POSIX_FADV_DONTNEED)

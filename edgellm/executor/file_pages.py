"""Give back the pages of a mapped file that a library has read and copied, and keeps mapped."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

MADV_DONTNEED: Final = 4  # linux/mman-common.h


def drop_mapped_pages(file: Path) -> None:
    """Drop this process's resident pages of `file`, where it is mapped read-only.

    What is still used comes back, page by page, from the page cache. Does nothing where there is no
    /proc/self/maps: it saves memory and changes nothing else.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in maps.read_text().splitlines():
        # start-end perms offset dev inode path
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != str(file.resolve()) or "w" in fields[1]:
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        if libc.madvise(start, end - start, MADV_DONTNEED) != 0:
            log.debug("madvise on %s: %s", file, os.strerror(ctypes.get_errno()))

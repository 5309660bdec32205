"""Give back the pages of a mapped file that a library has read and copied, and keeps mapped."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

SMAPS: Final = Path("/proc/self/smaps")
MADV_DONTNEED: Final = 4  # linux/mman-common.h

_MAPPING: Final = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) \S+ \S+ \S+ \d+\s*(?P<path>.*)")


def drop_mapped_pages(file: Path) -> None:
    """Drop this process's resident pages of `file`, as far as none was written to.

    What is still used comes back, page by page, from the page cache. Does nothing where there is no
    /proc/self/smaps: it saves memory and changes nothing else.
    """
    if not SMAPS.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in list(_clean_mappings(str(file.resolve()))):
        if libc.madvise(start, end - start, MADV_DONTNEED) != 0:
            log.debug("madvise on %s: %s", file, os.strerror(ctypes.get_errno()))


def _clean_mappings(path: str) -> Iterator[tuple[int, int]]:
    """Where the file is mapped without a page of our own in it (proc(5), smaps)."""
    start = end = 0
    with SMAPS.open() as smaps:
        for line in smaps:
            if mapping := _MAPPING.match(line):
                ours = mapping["path"] == path
                start, end = (int(mapping["start"], 16), int(mapping["end"], 16)) if ours else (0, 0)
            elif end and line.startswith("Anonymous:") and int(line.split()[1]) == 0:
                yield start, end

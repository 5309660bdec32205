"""Give back the pages of a mapped file that a library has read and copied, and keeps mapped."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edgellm.executor.madvise import MADV_DONTNEED, madvise

log = logging.getLogger(__name__)

SMAPS: Final = Path("/proc/self/smaps")

_MAPPING: Final = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) \S+ \S+ \S+ \d+\s*(?P<path>.*)")


def drop_mapped_pages(file: Path) -> None:
    """Drop this process's resident pages of `file`, as far as none was written to.

    What is still used comes back, page by page, from the page cache. Does nothing where there is no
    /proc/self/smaps: it saves memory and changes nothing else.
    """
    if not SMAPS.exists():
        return
    for start, end in list(_clean_mappings(str(file.resolve()))):
        if error := madvise(start, end - start, MADV_DONTNEED):
            log.debug("madvise on %s: %s", file, os.strerror(error))


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

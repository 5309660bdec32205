"""Back what a library has allocated with huge pages, where the kernel can (Linux 6.1, THP not `never`).

A step reads all weights once, so with pages of 4 KiB it misses the TLB tens of thousands of times. Memory
that we allocate ourselves gets huge pages through numpy; what ONNX Runtime packs its weights into does not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edgellm.executor.madvise import MADV_COLLAPSE, MADV_HUGEPAGE, MADV_NOHUGEPAGE, madvise

log = logging.getLogger(__name__)

MAPS: Final = Path("/proc/self/maps")
HUGE_PAGE: Final = 2 << 20
SMALLEST: Final = 4 * HUGE_PAGE
"""Smaller mappings are left alone: what they could gain is less than rounding them up may cost."""


def use_huge_pages() -> int:
    """Collapse this process's large anonymous mappings into huge pages, now; gives the bytes advised.

    Does nothing where the kernel cannot: it saves time and changes nothing else.
    """
    advised = 0
    for start, end in list(_large_mappings()):
        if madvise(start, end - start, MADV_HUGEPAGE):
            return advised
        # Part of a range may not be collapsible; the rest is, and errno tells of the part.
        if error := madvise(start, end - start, MADV_COLLAPSE):
            log.debug("huge pages for %d MB: %s", (end - start) >> 20, os.strerror(error))
        # From here on the kernel's own daemon would fill the holes between allocations, for ever a bit more.
        madvise(start, end - start, MADV_NOHUGEPAGE)
        advised += end - start
    return advised


def _large_mappings() -> Iterator[tuple[int, int]]:
    """Whole huge pages inside of writable memory that is neither a file nor a stack (proc(5), maps)."""
    if not MAPS.exists():
        return
    for line in MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[1].startswith("rw-p") or (len(fields) > 5 and fields[5] != "[heap]"):
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if end - start >= SMALLEST:
            yield start, end

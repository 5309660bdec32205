"""madvise(2), which Python has for its own mappings only."""

from __future__ import annotations

import ctypes
from typing import Final

# linux/mman-common.h
MADV_DONTNEED: Final = 4
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_COLLAPSE: Final = 25

_libc = ctypes.CDLL(None, use_errno=True)


def madvise(start: int, length: int, advice: int) -> int:
    """Advise the kernel about this process's addresses; gives errno, or 0."""
    call = _libc.madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return 0 if call(start, length, advice) == 0 else ctypes.get_errno()

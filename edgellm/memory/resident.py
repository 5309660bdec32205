"""This process's own memory: what is resident, what can go back, and keeping the rest in place."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Final

from edgellm.errors import ConfigError
from edgellm.memory.sizes import show_size

STATM: Final = Path("/proc/self/statm")

# sys/mman.h, the same on x86-64 and aarch64.
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4

# malloc.h.
M_MMAP_THRESHOLD: Final = -3
LARGE: Final = 1 << 20
"""Larger than any array that a step makes and drops, so that steps do not pay for it."""

_libc = ctypes.CDLL(None, use_errno=True)


def resident_size() -> int:
    """Bytes of the resident set (proc(5), statm); 0 where there is no /proc."""
    try:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def keep_freed_small() -> None:
    """Let the allocator give large pieces back at once (mallopt(3)); to be called before there are threads.

    By itself glibc keeps what was freed for next time, up to 32 MiB a piece and in an arena for each thread,
    and what is small and stays then comes to lie in between: the resident set creeps up for hours.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_MMAP_THRESHOLD, LARGE)


def give_back_freed() -> None:
    """Give the pages of freed memory back to the kernel (malloc_trim(3)); does nothing without glibc.

    Loading leaves holes: reading a tokenizer takes twice what it keeps.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def lock_memory() -> None:
    """Keep what is resident, and what will be, in memory (mlockall(2)).

    Pages are locked as they come in (MCL_ONFAULT), not brought in first: every thread's stack and the whole
    weights file would come, too, and nobody would ever look at them.

    Raises:
        ConfigError: the limit on locked memory is too small, or the kernel refuses.
    """
    if _libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0:
        return
    error = ctypes.get_errno()
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "unlimited" if limit == resource.RLIM_INFINITY else show_size(limit)
    raise ConfigError(
        f"memory.lock = true, but mlockall failed: {os.strerror(error)}; RLIMIT_MEMLOCK is {allowed}. "
        "Set LimitMEMLOCK=infinity in the unit (drop-in memory-lock), or memory.lock = false"
    )

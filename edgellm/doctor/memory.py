"""Memory: how much is free, swap and zram, pressure, and releases whose driver refuses free memory."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host

PRESSURE = "proc/pressure/memory"


def check_memory(host: Host) -> Iterator[Finding]:
    """Free memory, swap, pressure, and the NVIDIA driver's own limits."""
    if host.running:
        yield _free(host)
        yield _swap(host)
        yield _pressure(host)
    else:
        yield Finding.not_asked("memory")
    if host.board.l4t is not None:
        yield _nvmap(host)


def _free(host: Host) -> Finding:
    memory, governor = host.readings.memory, host.config.governor
    if memory.total is None or memory.available is None:
        return Finding(
            "memory",
            Level.FAIL,
            "unknown",
            "/proc/meminfo cannot be read, and the memory promise is built on it",
            "do not set ProcSubset=pid; mount /proc into the container",
        )
    value = f"{_size(memory.available)} of {_size(memory.total)} available"
    shared = " (MemAvailable − CmaFree: CPU and GPU share it)" if host.tegra else ""
    free = "stop what is not needed, or build the engine smaller (edgellm plan)"
    if memory.available < governor.memory_hard_mib << 20:
        return Finding(
            "memory", Level.FAIL, value + shared, "the governor is SHED before anything is loaded", free
        )
    if memory.available < governor.memory_soft_mib << 20:
        return Finding("memory", Level.WARN, value + shared, "the governor is THROTTLED", free)
    return Finding("memory", Level.OK, value + shared)


def _swap(host: Host) -> Finding:
    memory = host.readings.memory
    rows = [line.split() for line in (host.text("proc/swaps") or "").splitlines()[1:]]
    zram = [row[0] for row in rows if row and "zram" in row[0]]
    kind = "zram" if zram and len(zram) == len(rows) else "swap and zram" if zram else "swap"
    if not memory.swap_total:
        return Finding("swap", Level.OK, "none", "edgellm needs none")
    used = memory.swap_total - (memory.swap_free or 0)
    value = f"{kind}: {_size(used)} of {_size(memory.swap_total)} used"
    why = "zram takes its memory from the same DRAM and cannot hold GPU pages" if zram else "disk is slow"
    if used > memory.swap_total // 2:
        return Finding(
            "swap",
            Level.WARN,
            value,
            f"other processes are short of memory; {why}",
            "free memory, then swapoff -a",
        )
    return Finding("swap", Level.OK, value, "edgellm itself never swaps under systemd (MemorySwapMax=0)")


def _pressure(host: Host) -> Finding:
    memory, governor = host.readings.memory, host.config.governor
    if memory.psi_some is None:
        return Finding(
            "pressure",
            Level.OK,
            "not counted by this kernel",
            "CONFIG_PSI is off, as in Jetson Linux r35: free memory alone decides",
        )
    value = f"some {memory.psi_some:.1f} %, full {memory.psi_full or 0:.1f} % of the last 10 s"
    if memory.psi_some >= governor.psi_some_percent:
        return Finding(
            "pressure",
            Level.WARN,
            value,
            "processes wait for memory: the governor is THROTTLED",
            "find who grows: systemd-cgtop -m",
        )
    return Finding("pressure", Level.OK, value)


def _nvmap(host: Host) -> Finding:
    board = host.board
    if board.nvmap_refuses_free_memory:
        return Finding(
            "nvmap",
            Level.WARN,
            f"L4T {board.l4t}",
            "GPU allocations can fail with NvMapMemAllocInternalTagged … error 12 although memory is free",
            "update (mended in L4T 35.6.4 and 36.5); until then keep memory.budget well below what is free",
        )
    if (board.l4t or "").startswith("35."):
        return Finding(
            "nvmap",
            Level.OK,
            f"L4T {board.l4t}",
            "its driver does not stop before the OOM killer does: set memory.budget to a size, not to auto",
        )
    return Finding("nvmap", Level.OK, f"L4T {board.l4t}", "not one of the releases that refuse free memory")


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"

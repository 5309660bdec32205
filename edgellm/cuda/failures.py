"""What a driver function's status is to an operator.

What one can mend (no driver, an old one, no permission, an old GPU) is a `DeviceError`, too little memory a
`TemporaryShortage`, a device that nothing in this process can bring back `DeviceLost`, anything else an
`ExecutorFault`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from edgellm.errors import DeviceError, DeviceLost, ExecutorFault, OperatorError, TemporaryShortage

NODES: Final = ("nvidiactl", "nvidia0", "nvidia-uvm", "nvmap", "nvgpu/igpu0/ctrl", "nvhost-gpu")
"""Device nodes below /dev without which CUDA finds no device: a PC's, then Tegra's."""

# cuda.h, CUresult.
_OUT_OF_MEMORY: Final = 2
_TOO_OLD: Final = frozenset({35, 803, 804})
"""INSUFFICIENT_DRIVER (the runtime's number), SYSTEM_DRIVER_MISMATCH, COMPAT_NOT_SUPPORTED_ON_DEVICE."""
_NO_DEVICE: Final = frozenset({3, 100, 304, 800, 802})
"""NOT_INITIALIZED, NO_DEVICE, OPERATING_SYSTEM, NOT_PERMITTED, SYSTEM_NOT_READY."""
_WRONG_IMAGE: Final = frozenset({200, 209, 218, 222, 223})
"""INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, UNSUPPORTED_PTX_VERSION, JIT_COMPILATION_DISABLED."""
_LOST: Final = frozenset({46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})
"""Errors that stick to the context: illegal accesses and instructions, ECC, timeouts, an unknown end."""


def failure(name: str, status: Any, root: Path) -> OperatorError:
    """The error of a status that is not success.

    Args:
        name: of the function.
        status: a CUresult.
        root: where /dev is.
    """
    number, what = int(status), getattr(status, "name", str(status))
    if number == _OUT_OF_MEMORY:
        return TemporaryShortage(f"{name}: the device's memory is used up")
    if number in _TOO_OLD:
        return DeviceError(
            f"the NVIDIA driver is too old or does not match its kernel module ({what}): update it, "
            "restart, or install the extra for its CUDA version (edgellm[cuda11], [cuda12])"
        )
    if number in _NO_DEVICE:
        return DeviceError(_why_no_device(what, root))
    if number in _WRONG_IMAGE:
        return DeviceError(
            f"the driver cannot load the kernels ({what}): they were built for another GPU, or by a "
            "newer CUDA than the driver knows. Build the engine again here, or update the driver"
        )
    if number in _LOST:
        return DeviceLost(f"the device failed in {name} ({what}, {number}); the process must start anew")
    return ExecutorFault(f"{name} failed: {what} ({number})")


def _why_no_device(what: str, root: Path) -> str:
    nodes = [root / "dev" / node for node in NODES]
    there = [node for node in nodes if node.exists()]
    closed = [node for node in there if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        return (
            f"this user may not open {', '.join(map(str, closed))} ({what}): "
            "usermod --append --groups video,render USER, or the unit's drop-in gpu-devices.conf"
        )
    if not there:
        return (
            f"there is no CUDA device ({what}), and no device node in {root / 'dev'}: load the "
            "driver's kernel module; a container needs the NVIDIA runtime"
        )
    return f"the driver finds no CUDA device ({what}), though there is {there[0]}: dmesg may say why"

"""A stand-in for cuda-bindings' driver module: a device that is all bookkeeping.

Every function answers as the real one does, a tuple of a status and results; `fails` makes one fail.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
from typing import Any

from cuda_names import CudaNames


class Status(enum.IntEnum):
    """Of cuda.h."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_NOT_READY = 600


class FakeDriver(CudaNames):
    """What `Driver(api=…)` takes.

    Attributes:
        fails: function → status that it gives.
        calls: names and arguments, in order.
        live: addresses that were allocated and not freed.
    """

    def __init__(
        self, *, sm: int = 87, version: int = 12060, devices: int = 1, memory: int = 1 << 30
    ) -> None:
        self.fails: dict[str, Status] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.live: dict[int, Any] = {}
        self._attributes = {75: sm // 10, 76: sm % 10, 16: 8, 18: 1, 97: 163 << 10, 13: 918_000}
        self._version = version
        self._devices = devices
        self._memory = memory
        self._handles = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            if name in self.fails:
                return (self.fails[name], *([None] * (name != "cuInit")))
            return (Status.CUDA_SUCCESS, *self._results(name, arguments))

        return call

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        match name:
            case "cuDriverGetVersion":
                return (self._version,)
            case "cuDeviceGetCount":
                return (self._devices,)
            case "cuDeviceGetAttribute":
                return (self._attributes[arguments[0]],)
            case "cuDeviceGetName":
                return (b"Fake Orin\0\0",)
            case "cuDeviceTotalMem":
                return (self._memory,)
            case "cuMemGetInfo":
                return (self._memory // 2, self._memory)
            case "cuMemAlloc" | "cuMemHostAlloc":
                # 256-byte aligned, as the driver's is.
                room = (ctypes.c_uint8 * (arguments[0] + 256))()
                memory = (ctypes.c_uint8 * arguments[0]).from_buffer(room, -ctypes.addressof(room) % 256)
                self.live[ctypes.addressof(memory)] = memory
                return (ctypes.addressof(memory),)
            case "cuMemFree" | "cuMemFreeHost":
                del self.live[arguments[0]]
                return ()
            case _ if "Create" in name or "Get" in name or "Load" in name or "End" in name:
                return (next(self._handles),)
            case "cuDevicePrimaryCtxRetain" | "cuGraphInstantiate" | "cuGraphInstantiateWithFlags":
                return (next(self._handles),)
        return ()

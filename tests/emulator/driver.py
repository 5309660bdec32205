"""What `edgellm.cuda.driver.Driver(api=…)` takes in the place of cuda-bindings: a device that is this CPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from cuda_names import CudaNames
from fake_driver import Status
from numpy.typing import NDArray

from edgellm.cuda.launch import Device
from emulator.compile import machine, place_of, read_image

POISON: Final = 0xFF
"""Fills memory that is allocated: NaN as float16 and float32."""
RED_ZONE: Final = 4096
UNASKED_SHARED: Final = 48 << 10
"""Bytes of dynamic shared memory that a launch may have without having asked."""
COPIES: Final = {"late": 0, "at once": 1, "either": 2}

ORIN: Final = Device(87, 4, 163 << 10)
HOPPER: Final = Device(90, 4, 227 << 10)


class EmulationError(AssertionError):
    """A kernel did what it must not do, or the host asked for what a device would refuse."""


class _Entry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kinds", ctypes.c_char_p),
        ("invoke", ctypes.c_void_p),
        ("most_threads", ctypes.c_int),
        ("cluster", ctypes.c_int * 3),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("touch", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint64),
        ("arguments", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("number", ctypes.c_uint32),
        ("chain", ctypes.c_uint32),
        ("early", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("copies", ctypes.c_int),
        ("error", ctypes.c_void_p),
        ("error_size", ctypes.c_uint64),
    )


@dataclass(slots=True)
class _Function:
    entry: int
    touch: int
    kinds: str
    name: str
    library: Path
    shared: int = UNASKED_SHARED


_KINDS: Final[dict[Any, str]] = {ctypes.c_int32: "i", ctypes.c_float: "f", ctypes.c_void_p: "p"}


class EmulatedDriver(CudaNames):
    """A device's driver API. What is put into a stream runs when somebody waits, as late as a device might.

    Who does not wait sees what was there before.

    Args:
        device: what it says it is; few multiprocessors keep grids small.
        memory: bytes of device memory.
        seed: 0: threads run in order, each as far as it can; otherwise in an order drawn anew at each wait.
        copies: when cp.async copies: as `late` as the kernel allows, `at once`, or `either`.
        workers: blocks that run side by side, clusters aside.

    Attributes:
        launches: kernels launched, by name.
    """

    def __init__(
        self,
        device: Device = HOPPER,
        *,
        memory: int = 1 << 30,
        seed: int = 0,
        copies: str = "late",
        workers: int = 2,
    ) -> None:
        self.device, self.seed, self.copies, self.workers = device, seed, copies, workers
        self.launches: dict[str, int] = {}
        self._machine = machine()
        self._memory = memory
        self._handles = itertools.count(1)
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._device_bytes = 0
        self._number = 0
        self._chain = 0
        self._functions: dict[int, _Function] = {}
        self._modules: dict[int, dict[str, _Function]] = {}
        self._events: dict[int, float] = {}
        self._capturing: list[Callable[[], None]] | None = None
        self._waiting: deque[Callable[[], None]] = deque()
        self._draining = threading.RLock()
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    # The device.

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS,)

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, 12090)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, 1)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, index)

    def cuDeviceGetName(self, size: int, device: Any) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, b"Emulated\0")

    def cuDeviceTotalMem(self, device: Any) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, self._memory)

    def cuDeviceGetAttribute(self, attribute: int, device: Any) -> tuple[Any, ...]:
        sm = self.device.sm
        known = {75: sm // 10, 76: sm % 10, 16: self.device.multiprocessors, 18: 1}
        known |= {97: self.device.shared_per_block, 13: 1_000_000}
        return (Status.CUDA_SUCCESS, known[attribute])

    def cuDevicePrimaryCtxRetain(self, device: Any) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, next(self._handles))

    def cuDevicePrimaryCtxRelease(self, device: Any) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: Any) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS,)

    # Memory.

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, self._memory - self._device_bytes, self._memory)

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        if size > self._memory - self._device_bytes:
            return (Status.CUDA_ERROR_OUT_OF_MEMORY, None)
        self._device_bytes += size
        return (Status.CUDA_SUCCESS, self._allocate(size))

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        self._device_bytes -= self._free(address)
        return (Status.CUDA_SUCCESS,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, self._allocate(size))

    def cuMemFreeHost(self, address: int) -> tuple[Any, ...]:
        self._free(address)
        return (Status.CUDA_SUCCESS,)

    def _allocate(self, size: int) -> int:
        raw = np.full(size + 2 * RED_ZONE + 256, POISON, np.uint8)
        address = raw.ctypes.data + RED_ZONE
        address += -address % 256
        start = address - raw.ctypes.data
        self._blocks[address] = raw[start - RED_ZONE : start + size + RED_ZONE]
        self._machine.machine_add_memory(ctypes.c_void_p(address), ctypes.c_size_t(size))
        return address

    def _free(self, address: int) -> int:
        self._drain()
        self.check_red_zones()
        self._machine.machine_remove_memory(ctypes.c_void_p(address))
        return len(self._blocks.pop(address)) - 2 * RED_ZONE

    def check_red_zones(self) -> None:
        """That nothing was written in front of an allocation or behind it.

        Raises:
            EmulationError: something was.
        """
        for block in self._blocks.values():
            for zone, place in ((block[:RED_ZONE], "in front of"), (block[-RED_ZONE:], "behind")):
                if (zone != POISON).any():
                    raise EmulationError(
                        f"something was written {place} an allocation of {len(block) - 2 * RED_ZONE} bytes"
                    )

    def _is_known(self, address: int, size: int) -> bool:
        return any(
            base <= address and address + size <= base + len(block) - 2 * RED_ZONE
            for base, block in self._blocks.items()
        )

    def _require(self, address: int, size: int) -> None:
        if self._is_known(address, size):
            return
        raise EmulationError(f"a copy or memset of {size} bytes at {address:#x}, not within an allocation")

    def _put(self, work: Callable[[], None]) -> tuple[Any, ...]:
        """Do something in the stream, or note it for the graph."""
        (self._waiting if self._capturing is None else self._capturing).append(work)
        return (Status.CUDA_SUCCESS,)

    def _drain(self) -> None:
        """Run all that waits in streams, in the order in which it was put there."""
        with self._draining:
            try:
                while self._waiting:
                    self._waiting.popleft()()
            except EmulationError:
                self._waiting.clear()
                raise

    def _move(self, to: int, source: int, size: int) -> None:
        self._chain = 0
        ctypes.memmove(to, source, size)

    def cuMemcpyHtoD(self, to: int, source: int, size: int) -> tuple[Any, ...]:
        self._require(to, size)
        self._move(to, source, size)
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyDtoH(self, to: int, source: int, size: int) -> tuple[Any, ...]:
        self._require(source, size)
        self._move(to, source, size)
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyDtoD(self, to: int, source: int, size: int) -> tuple[Any, ...]:
        self._require(to, size)
        self._require(source, size)
        self._move(to, source, size)
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[Any, ...]:
        self._require(to, size)
        if self._capturing is None and not self._is_known(source, size):
            # Of memory that is not page-locked a copy is made before the call returns.
            staged = ctypes.create_string_buffer(ctypes.string_at(source, size), size)
            return self._put(lambda: self._move(to, ctypes.addressof(staged), size))
        return self._put(lambda: self._move(to, source, size))

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[Any, ...]:
        self._require(source, size)
        return self._put(lambda: self._move(to, source, size))

    def cuMemcpy2DAsync(self, copy: Any, stream: Any) -> tuple[Any, ...]:
        for base, pitch in ((copy.srcDevice, copy.srcPitch), (copy.dstDevice, copy.dstPitch)):
            self._require(base, (copy.Height - 1) * pitch + copy.WidthInBytes)

        def work() -> None:
            for row in range(copy.Height):
                to, source = copy.dstDevice + row * copy.dstPitch, copy.srcDevice + row * copy.srcPitch
                self._move(to, source, copy.WidthInBytes)

        return self._put(work)

    def cuMemsetD8(self, to: int, value: int, size: int) -> tuple[Any, ...]:
        self._require(to, size)
        ctypes.memset(to, value, size)
        return (Status.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, to: int, value: int, size: int, stream: Any) -> tuple[Any, ...]:
        self._require(to, size)

        def work() -> None:
            self._chain = 0
            ctypes.memset(to, value, size)

        return self._put(work)

    # Streams and events.

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, next(self._handles))

    def cuStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        assert self._capturing is None, "waits for a stream that is being captured"
        self._drain()
        self._chain = 0
        return (Status.CUDA_SUCCESS,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS, next(self._handles))

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        self._events.pop(event, None)
        return (Status.CUDA_SUCCESS,)

    def cuEventRecord(self, event: int, stream: Any) -> tuple[Any, ...]:
        def work() -> None:
            self._events[event] = time.perf_counter()

        return self._put(work)

    def cuEventQuery(self, event: int) -> tuple[Any, ...]:
        self._drain()
        return (Status.CUDA_SUCCESS,)

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:
        self._drain()
        return (Status.CUDA_SUCCESS,)

    def cuEventElapsedTime(self, begin: int, end: int) -> tuple[Any, ...]:
        self._drain()
        return (Status.CUDA_SUCCESS, (self._events[end] - self._events[begin]) * 1000)

    # Modules and launches.

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        path, expression = read_image(image)
        library = ctypes.CDLL(str(path))
        touch = ctypes.cast(library.machine_touch, ctypes.c_void_p).value
        at = ctypes.addressof(ctypes.c_char.in_dll(library, "machine_entries"))
        while True:
            entry = _Entry.from_address(at)
            assert entry.name is not None, f"{path} has no {expression}"
            if entry.name.decode() == expression:
                break
            at += ctypes.sizeof(_Entry)
        assert touch is not None
        handle = next(self._handles)
        self._modules[handle] = {expression: _Function(at, touch, entry.kinds.decode(), expression, path)}
        return (Status.CUDA_SUCCESS, handle)

    def cuModuleUnload(self, module: int) -> tuple[Any, ...]:
        self._drain()
        del self._modules[module]
        return (Status.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._functions[handle] = self._modules[module][name.decode()]
        return (Status.CUDA_SUCCESS, handle)

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[Any, ...]:
        assert attribute == 8, "MAX_DYNAMIC_SHARED_SIZE_BYTES"
        if value > self.device.shared_per_block:
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        self._functions[function].shared = max(value, UNASKED_SHARED)
        return (Status.CUDA_SUCCESS,)

    def cuLaunchKernelEx(self, config: Any, function: int, parameters: Any, extra: int) -> tuple[Any, ...]:
        known = self._functions[function]
        values, types = parameters
        kinds = "".join(_KINDS[each] for each in types)
        if kinds != known.kinds:
            raise EmulationError(f"{known.name} takes {known.kinds}, not {kinds} (pointer, int, float)")
        if config.sharedMemBytes > known.shared:
            raise EmulationError(
                f"{known.name}: {config.sharedMemBytes} bytes of dynamic shared memory, of {known.shared}"
            )
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        assert (config.blockDimY, config.blockDimZ) == (1, 1)
        early = any(
            each.id == 6 and each.value.programmaticStreamSerializationAllowed
            for each in (config.attrs[: config.numAttrs] if config.numAttrs else ())
        )
        if early and not self.device.has_dependent_launch:
            raise EmulationError(f"{known.name}: dependent launches need compute capability 9.0")
        threads, shared = config.blockDimX, config.sharedMemBytes
        arguments = [kind(value) for kind, value in zip(types, values, strict=True)]
        return self._put(lambda: self._launch(known, grid, threads, shared, arguments, early=early))

    def _launch(
        self,
        function: _Function,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: list[Any],
        *,
        early: bool,
    ) -> None:
        name = function.name.partition("<")[0]
        self.launches[name] = self.launches.get(name, 0) + 1
        error = ctypes.create_string_buffer(1024)
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        self._number += 1
        if not early or not self._chain:
            self._chain = self._number
        seed = (self.seed * 0x9E3779B97F4A7C15 + self._number) % 2**64 if self.seed else 0
        request = _Request(
            function.entry,
            function.touch,
            (ctypes.c_uint32 * 3)(*grid),
            threads,
            shared,
            ctypes.addressof(places),
            seed,
            self._number,
            self._chain,
            early,
            self.workers,
            COPIES[self.copies],
            ctypes.addressof(error),
            len(error),
        )
        if self._machine.machine_launch(ctypes.byref(request)):
            raise EmulationError(_with_place(error.value.decode(), function.library))

    # Graphs.

    def cuStreamBeginCapture(self, stream: Any, mode: int) -> tuple[Any, ...]:
        assert self._capturing is None
        self._capturing = []
        return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        assert self._capturing is not None
        handle = next(self._handles)
        self._graphs[handle], self._capturing = self._capturing, None
        return (Status.CUDA_SUCCESS, handle)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self._graphs[handle] = self._graphs[graph]
        return (Status.CUDA_SUCCESS, handle)

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self._graphs[graph]
        return (Status.CUDA_SUCCESS,)

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph: int, stream: Any) -> tuple[Any, ...]:
        def begin() -> None:
            self._chain = 0

        self._put(begin)
        for work in self._graphs[graph]:
            self._put(work)
        return (Status.CUDA_SUCCESS,)


def _with_place(message: str, library: Path) -> str:
    """The message with lines of the source in the place of an address in the library."""
    found = re.search(r" \[\+(0x[0-9a-f]+)\]$", message)
    place = place_of(library, found.group(1)) if found else ""
    return f"{message[: found.start()]} [{place}]" if found and place else message


def by_name(launches: Mapping[str, int]) -> str:
    """Kernels and how often each was launched, for messages."""
    return ", ".join(f"{name} {count}" for name, count in sorted(launches.items()))

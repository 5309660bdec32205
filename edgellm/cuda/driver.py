"""The CUDA driver: one device's primary context, its memory, streams, modules and graphs.

Every call's status is checked; `failures.py` says what it becomes. Addresses are plain ints.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.bindings import instantiate_graph, load_driver
from edgellm.cuda.failures import failure
from edgellm.cuda.launch import Argument, At, Device
from edgellm.errors import DeviceError, OperatorError, TemporaryShortage
from edgellm.memory.sizes import show_size

OLDEST_SM: Final = 80
"""cp.async, bf16 and mma.m16n8k16 begin with compute capability 8.0."""

# cuda.h, CUresult.
_SUCCESS: Final = 0
_NOT_READY: Final = 600

# cuda.h, CUdevice_attribute.
_MULTIPROCESSORS: Final = 16
_INTEGRATED: Final = 18
_MAJOR, _MINOR = 75, 76
_SHARED_OPTIN: Final = 97
_CLOCK_KHZ: Final = 13

_STREAM_NON_BLOCKING: Final = 1
_EVENT_DISABLE_TIMING: Final = 2
_MAX_DYNAMIC_SHARED: Final = 8
_HOST_PORTABLE: Final = 1


@dataclass(frozen=True, slots=True)
class Facts:
    """What a device is.

    Attributes:
        name: as the driver calls it.
        device: what launches depend on.
        memory: bytes of device memory; on an integrated GPU all of the board's.
        integrated: whether the device shares the host's DRAM.
        clock_khz: of the SMs, at most.
        driver: newest CUDA version that the driver knows, as (12, 6).
    """

    name: str
    device: Device
    memory: int
    integrated: bool
    clock_khz: int
    driver: tuple[int, int]

    @property
    def described(self) -> str:
        """For a report's first line."""
        return (
            f"{self.name} (sm_{self.device.sm}, {self.device.multiprocessors} SMs at up to "
            f"{self.clock_khz / 1000:.0f} MHz, driver for CUDA {self.driver[0]}.{self.driver[1]})"
        )


class Driver:
    """The primary context of a device, current on the thread that made this; see `attach`.

    Args:
        index: of the device.
        api: cuda-bindings' driver module, or what stands in for it; None: the one installed.
        root: where /dev is.
        context: whether there is to be a context; without one, only `facts` can be asked for.

    Raises:
        DeviceError: CUDA or the device cannot be used; the message says what would help.
    """

    def __init__(
        self, index: int = 0, *, api: Any = None, root: Path = Path("/"), context: bool = True
    ) -> None:
        self._api = load_driver() if api is None else api
        self._root = root
        self._streams: list[Any] = []
        self._modules: list[Any] = []
        self._held: dict[int, int] = {}
        self._device: Any = None
        self._context: Any = None
        try:
            self.call("cuInit", 0)
        except (RuntimeError, OSError, ImportError) as error:
            if isinstance(error, OperatorError):
                raise
            raise DeviceError(
                "there is no CUDA driver (libcuda.so.1 cannot be loaded). On a Jetson install "
                "nvidia-l4t-cuda, elsewhere NVIDIA's driver; a container needs the NVIDIA runtime. An engine "
                "that was built with --executor cpu needs none"
            ) from error
        version = self.call("cuDriverGetVersion")
        self._version = (version // 1000, version % 1000 // 10)
        self._require_version()
        count = self.call("cuDeviceGetCount")
        if index >= count:
            raise DeviceError(f"there is no CUDA device {index}; the driver finds {count or 'none'}")
        self._device = self.call("cuDeviceGet", index)
        self.facts = self._read_facts()
        sm = self.facts.device.sm
        if sm < OLDEST_SM:
            raise DeviceError(
                f"{self.facts.name} has compute capability {sm // 10}.{sm % 10}; the kernels need 8.0 "
                "(Ampere) or newer. Build the engine with --executor cpu for this machine"
            )
        if context:
            self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
            self.attach()

    def attach(self) -> None:
        """Make the context current on the calling thread, which every thread that calls needs once."""
        self.call("cuCtxSetCurrent", self._context)

    def call(self, name: str, *arguments: Any) -> Any:
        """A driver function by its name; gives its one result, a tuple of several, or None.

        Raises:
            OperatorError: see `failures.py`.
        """
        function: Callable[..., tuple[Any, ...]] = getattr(self._api, name)
        status, *values = function(*arguments)
        if int(status) != _SUCCESS:
            raise failure(name, status, self._root)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    # Memory.

    def allocate(self, size: int) -> int:
        """Device memory, 256-byte aligned; its address."""
        try:
            address = int(self.call("cuMemAlloc", size))
        except TemporaryShortage as error:
            free, total = self.memory()
            raise TemporaryShortage(
                f"{show_size(size)} of device memory are needed in one piece, {show_size(free)} of "
                f"{show_size(total)} are free; lower engine.max_batch_size or engine.max_seq_len, or end "
                "what else uses the GPU"
            ) from error
        self._held[address] = size
        return address

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._held.pop(address, None)
        self.call("cuMemFree", address)

    def pin(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, zeroed: uint8 [size]; its address is what the device sees, too."""
        address = int(self.call("cuMemHostAlloc", size, _HOST_PORTABLE))
        self._held[address] = size
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return array

    def unpin(self, array: NDArray[np.uint8]) -> None:
        """Give page-locked memory back; nothing may look at it any more."""
        self._held.pop(array.ctypes.data, None)
        self.call("cuMemFreeHost", array.ctypes.data)

    @property
    def held(self) -> int:
        """Bytes of device and page-locked memory that were asked for here and not given back."""
        return sum(self._held.values())

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all, as the driver sees it."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def copy_rows(self, source: int, target: int, *, pitch: int, width: int, rows: int, stream: Any) -> None:
        """Copy `width` bytes of each of `rows` rows that lie `pitch` bytes apart, within device memory."""
        api = self._api
        copy = api.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.dstDevice = api.CUdeviceptr(source), api.CUdeviceptr(target)
        copy.srcPitch = copy.dstPitch = pitch
        copy.WidthInBytes, copy.Height = width, rows
        self.call("cuMemcpy2DAsync", copy, stream)

    # Streams and events.

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        stream = self.call("cuStreamCreate", _STREAM_NON_BLOCKING)
        self._streams.append(stream)
        return stream

    def event(self, *, timed: bool = False) -> Any:
        """An event; timed ones measure."""
        return self.call("cuEventCreate", 0 if timed else _EVENT_DISABLE_TIMING)

    def done(self, event: Any) -> bool:
        """Whether all in front of an event has run."""
        status, *_ = self._api.cuEventQuery(event)
        if int(status) == _NOT_READY:
            return False
        if int(status) != _SUCCESS:
            raise failure("cuEventQuery", status, self._root)
        return True

    def time(self, body: Callable[[], None], stream: Any, *, rounds: int = 9, warm_up: int = 2) -> float:
        """Seconds that what `body` puts into the stream takes: the median of some rounds, back to back."""
        for _ in range(warm_up):
            body()
        events = [self.event(timed=True) for _ in range(rounds + 1)]
        self.call("cuEventRecord", events[0], stream)
        for event in events[1:]:
            body()
            self.call("cuEventRecord", event, stream)
        self.call("cuStreamSynchronize", stream)
        taken = [self.call("cuEventElapsedTime", one, other) for one, other in pairwise(events)]
        for event in events:
            self.call("cuEventDestroy", event)
        return float(median(taken)) / 1000

    # Modules and launches.

    def load(self, image: bytes, name: str, shared: int) -> Any:
        """A function of a cubin, allowed `shared` bytes of dynamic shared memory."""
        module = self.call("cuModuleLoadData", image)
        self._modules.append(module)
        function = self.call("cuModuleGetFunction", module, name.encode())
        if shared:
            # Beyond 48 KiB it must be asked for; what the kernel declares itself counts, too.
            attribute = self._api.CUfunction_attribute(_MAX_DYNAMIC_SHARED)
            self.call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        *,
        threads: int,
        shared: int,
        arguments: Sequence[int | float | ctypes.c_void_p],
        stream: Any,
        early: bool = False,
    ) -> None:
        """Launch a kernel.

        Args:
            arguments: an int is an int32, a float a float32, a c_void_p a pointer.
            early: it may start before the kernel in front of it has ended (compute capability 9).
        """
        api = self._api
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = stream
        config.numAttrs = 0
        if early:
            attribute = api.CUlaunchAttribute()
            attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            value = api.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute.value = value
            config.attrs = [attribute]
            config.numAttrs = 1
        values = tuple(each.value or 0 if isinstance(each, ctypes.c_void_p) else each for each in arguments)
        types = tuple(_C_TYPES[type(each)] for each in arguments)
        self.call("cuLaunchKernelEx", config, function, (values, types), 0)

    def capture(self, stream: Any, body: Callable[[], None]) -> Any:
        """A graph of what `body` puts into the stream, ready to be launched."""
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", stream, mode)
        try:
            body()
        except BaseException:
            self._api.cuStreamEndCapture(stream)
            raise
        graph = self.call("cuStreamEndCapture", stream)
        try:
            status, ready = instantiate_graph(self._api, graph)
            if int(status) != _SUCCESS:
                raise failure("cuGraphInstantiate", status, self._root)
            return ready
        finally:
            self.call("cuGraphDestroy", graph)

    def close(self) -> None:
        """Give modules, streams and the context back; idempotent. A lost device is left as it is."""
        if self._context is None:
            return
        with suppress(OperatorError):
            for module in self._modules:
                self.call("cuModuleUnload", module)
            for stream in self._streams:
                self.call("cuStreamDestroy", stream)
        self._modules.clear()
        self._streams.clear()
        with suppress(OperatorError):
            self.call("cuDevicePrimaryCtxRelease", self._device)
        self._context = None

    def _read_facts(self) -> Facts:
        attribute = self._api.CUdevice_attribute

        def read(number: int) -> int:
            return int(self.call("cuDeviceGetAttribute", attribute(number), self._device))

        name = self.call("cuDeviceGetName", 256, self._device)
        return Facts(
            name=name.split(b"\0")[0].decode(errors="replace"),
            device=Device(
                sm=read(_MAJOR) * 10 + read(_MINOR),
                multiprocessors=read(_MULTIPROCESSORS),
                shared_per_block=read(_SHARED_OPTIN),
            ),
            memory=int(self.call("cuDeviceTotalMem", self._device)),
            integrated=bool(read(_INTEGRATED)),
            clock_khz=read(_CLOCK_KHZ),
            driver=self._version,
        )

    def _require_version(self) -> None:
        """Minor versions get along within a major one; across, a new runtime needs a new driver."""
        built = getattr(self._api, "CUDA_VERSION", 0)
        if self._version[0] < built // 1000:
            major = self._version[0]
            raise DeviceError(
                f"the driver knows CUDA {major}.{self._version[1]}, cuda-bindings here is for CUDA "
                f"{built // 1000}: pip install 'edgellm[cuda{max(major, 11)}]', or a newer driver"
            )


def resolve(arguments: Sequence[Argument], address_of: Callable[[At], int]) -> list[Any]:
    """A launch's arguments as `Driver.launch` takes them."""
    return [
        ctypes.c_void_p(0)
        if each is None
        else ctypes.c_void_p(address_of(each))
        if isinstance(each, At)
        else each
        for each in arguments
    ]


_C_TYPES: Final[dict[type, type]] = {
    int: ctypes.c_int32,
    float: ctypes.c_float,
    ctypes.c_void_p: ctypes.c_void_p,
}

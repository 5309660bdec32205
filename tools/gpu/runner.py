"""Runs launches on a device from numpy arrays: what the checks and benchmarks of kernels share."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver, resolve
from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.cuda.nvrtc import Compiler

Arrays = Mapping[str, NDArray[Any]]

POISON: Final = 0xFF
"""Fills what a kernel must write: NaN as float16 and float32."""


class Runner:
    """A device with its stream, compiled kernels and buffers by name.

    Args:
        driver: of the device; None: the first one here.
        compiler: of its kernels, or what stands in for it; None: NVRTC.
    """

    def __init__(self, driver: Driver | None = None, compiler: Any = None) -> None:
        self.driver = driver or Driver()
        self.device: Device = self.driver.facts.device
        self.stream = self.driver.stream()
        self._compiler = compiler or Compiler()
        self._functions: dict[Kernel, Any] = {}
        self._addresses: dict[str, int] = {}

    def prepare(self, launches: Iterable[Launch]) -> None:
        """Compile and load, side by side, what was not yet."""
        kernels = {launch.kernel for launch in launches} - self._functions.keys()
        for kernel, image in self._compiler.cubins(kernels, self.device.sm).items():
            (resources,) = read_resources(image)
            self._functions[kernel] = self.driver.load(image, resources.name, kernel.shared)

    def allocate(self, name: str, size: int) -> int:
        """A named buffer; its address."""
        self._addresses[name] = self.driver.allocate(size)
        return self._addresses[name]

    def address(self, at: At) -> int:
        """Where a place is on the device."""
        return self._addresses[at.buffer] + at.offset

    def upload(self, name: str, array: NDArray[Any]) -> None:
        """Copy into the buffer of this name."""
        raw = np.ascontiguousarray(array)
        self.driver.call("cuMemcpyHtoD", self._addresses[name], raw.ctypes.data, raw.nbytes)

    def download(self, name: str, like: NDArray[Any]) -> NDArray[Any]:
        """What is in a buffer, as an array of this shape and type."""
        array = np.empty_like(like, order="C")
        self.driver.call("cuMemcpyDtoH", array.ctypes.data, self._addresses[name], array.nbytes)
        return array

    def release(self) -> None:
        """Free all buffers."""
        for address in self._addresses.values():
            self.driver.free(address)
        self._addresses.clear()

    @contextmanager
    def buffers(self, arrays: Arrays) -> Iterator[None]:
        """Buffers with these contents, for a while."""
        for name, array in arrays.items():
            self.allocate(name, max(array.nbytes, 16))
            self.upload(name, array)
        try:
            yield
        finally:
            self.release()

    def launch(self, launches: Sequence[Launch], *, early: bool = True) -> None:
        """Put launches into the stream; `early` lets those that can start before their predecessors end."""
        for each in launches:
            self.driver.launch(
                self._functions[each.kernel],
                each.grid,
                threads=each.kernel.threads,
                shared=each.kernel.shared,
                arguments=resolve(each.arguments, self.address),
                stream=self.stream,
                early=early and each.early and self.device.has_dependent_launch,
            )

    def run(self, launches: Sequence[Launch], arrays: Arrays, *, early: bool = True) -> dict[str, Any]:
        """Launch once over buffers with these contents; gives every buffer's contents after."""
        self.prepare(launches)
        with self.buffers(arrays):
            self.launch(launches, early=early)
            self.driver.call("cuStreamSynchronize", self.stream)
            return {name: self.download(name, array) for name, array in arrays.items()}

    def time(self, launches: Sequence[Launch], *, early: bool = True, repeats: int = 10) -> float:
        """Median µs of these launches as one graph, over buffers that are there already."""
        self.prepare(launches)
        graph = self.driver.capture(self.stream, lambda: self.launch(launches, early=early))
        return self._median(lambda: self.driver.call("cuGraphLaunch", graph, self.stream), repeats)

    def memory_gb_per_s(self) -> float:
        """What the device's memory can give at most: its clock (twice a cycle) times its width."""
        khz, bits = (
            self.driver.call("cuDeviceGetAttribute", self.driver._api.CUdevice_attribute(number), 0)
            for number in (36, 37)
        )
        return float(2 * khz * bits / 8 / 1e6)

    def _median(self, body: Callable[[], object], repeats: int) -> float:
        for _ in range(2):
            body()
        events = [self.driver.event(timed=True) for _ in range(repeats + 1)]
        self.driver.call("cuEventRecord", events[0], self.stream)
        for event in events[1:]:
            body()
            self.driver.call("cuEventRecord", event, self.stream)
        self.driver.call("cuStreamSynchronize", self.stream)
        times: list[float] = [
            self.driver.call("cuEventElapsedTime", a, b) * 1e3 for a, b in itertools.pairwise(events)
        ]
        return statistics.median(times)


def poisoned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of NaN that shows what was not written."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(POISON)
    return array

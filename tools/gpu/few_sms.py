"""Part of a device: as many multiprocessors as a smaller one has, and launches cut as that one's are.

Streams are of a green context (CUDA driver API, green contexts; CUDA 12.4), so that kernels run on those
multiprocessors alone. Where there are none, launches are only cut as for the smaller device: their blocks
then spread over all of it, and where two of them would share a multiprocessor each has one to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final
from unittest import mock

from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Device, Kernel
from edgellm.cuda.nvrtc import Compiler
from edgellm.errors import OperatorError
from edgellm.executor import cuda_kernels

# cuda.h.
_RESOURCE_SM: Final = 1
_IGNORE_COSCHEDULING: Final = 1
_DEFAULT_STREAM: Final = 1
_NON_BLOCKING: Final = 1

ORIN_SM: Final = 87
ORIN_SHARED: Final = 163 << 10


class FewMultiprocessors(Driver):
    """A device that says, and does, what an Orin would with so many multiprocessors.

    Attributes:
        partition: multiprocessors that kernels run on; None: they are not held to any.
        own_sm: compute capability that kernels must be compiled for.
    """

    def __init__(self, multiprocessors: int, *, api: Any = None) -> None:
        super().__init__(api=api)
        self.own_sm = self.facts.device.sm
        self._green: Any = None
        self.partition = self._make_partition(multiprocessors)
        self.facts = replace(self.facts, device=Device(ORIN_SM, multiprocessors, ORIN_SHARED))

    def stream(self) -> Any:
        """A stream on those multiprocessors."""
        if self._green is None:
            return super().stream()
        stream = self.call("cuGreenCtxStreamCreate", self._green, _NON_BLOCKING, 0)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """Give the green context back, too."""
        green, self._green = self._green, None
        super().close()
        if green is not None:
            self.call("cuGreenCtxDestroy", green)

    def compiler(self) -> OwnCompiler:
        """For kernels that are cut for Orin and run here."""
        return OwnCompiler(self.own_sm)

    def compiles(self) -> AbstractContextManager[object]:
        """Let an executor that is loaded meanwhile compile with that."""
        return mock.patch.object(cuda_kernels, "Compiler", self.compiler)

    def _make_partition(self, multiprocessors: int) -> int | None:
        try:
            kind = self._api.CUdevResourceType(_RESOURCE_SM)
            everything = self.call("cuDeviceGetDevResource", self._device, kind)
            groups, count, _ = self.call(
                "cuDevSmResourceSplitByCount", 1, everything, _IGNORE_COSCHEDULING, multiprocessors
            )
            if not count:
                return None
            description = self.call("cuDevResourceGenerateDesc", groups[:1], 1)
            self._green = self.call("cuGreenCtxCreate", description, self._device, _DEFAULT_STREAM)
            return int(groups[0].sm.smCount)
        except (OperatorError, AttributeError, TypeError, ValueError, RuntimeError):
            return None  # a driver, or bindings, from before them


class OwnCompiler(Compiler):
    """Compiles for the device at hand, whatever launches were cut for.

    Args:
        sm: its compute capability.
    """

    def __init__(self, sm: int) -> None:
        super().__init__()
        self._own = sm

    def cubins(
        self, kernels: Iterable[Kernel], sm: int, progress: Callable[[float], None] = lambda _done: None
    ) -> dict[Kernel, bytes]:
        """The cubin of each kernel, for the device at hand."""
        assert sm == ORIN_SM
        return super().cubins(kernels, self._own, progress)

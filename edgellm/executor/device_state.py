"""What an executor on a device keeps: of the device, in page-locked memory, of slots and steps in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.driver import Driver
from edgellm.executor.base import Result, Row, Ticket
from edgellm.executor.buckets import HISTORY
from edgellm.executor.cuda_memory import DeviceMemory, Pinned, pinned_size
from edgellm.executor.cuda_steps import StepBuffers
from edgellm.kernels.adjust import AdjustmentsShape
from edgellm.kernels.sample import SAMPLING
from edgellm.memory.plan import Shape
from edgellm.model.spec import ModelSpec

PIPELINE_DEPTH: Final = 2
"""Steps in flight."""


@dataclass(slots=True)
class OpenStep:
    """A step on its way.

    Attributes:
        wanted: rows that want something, in the step's order.
        by_host: for each of them, whether the host samples it.
        at: for each of them, where in the buffers its result or logits come to lie.
        event: when everything is back.
    """

    ticket: Ticket
    buffers: StepBuffers
    wanted: list[Row]
    by_host: list[bool]
    at: list[int]
    mask: NDArray[np.uint32] | None
    event: Any
    started: float
    result: Result | None = None


@dataclass(slots=True)
class SlotState:
    """What the host knows of a slot.

    Attributes:
        index: of the next token to be sampled.
        on_device: whether the device can sample for its request.
        token: sampled last, if the host did it; None: the device knows.
        adjusted: whether the device changes its logits first. What it counts, it counts alone: once the host
            has sampled for such a request, it does so to the end.
        behind: whether the device's count of sampled tokens lacks some that the host has sampled.
        held: tokens in the cache.
    """

    index: int = 0
    on_device: bool = True
    token: int | None = None
    adjusted: bool = False
    behind: bool = False
    held: int = 0


class HostMemory:
    """Page-locked memory of an executor.

    Attributes:
        ring: buffers of each step in flight, and the event that says that it is back.
        sampling: SAMPLING [max_batch_size], as sent last.
        adjustments: likewise, what requests want changed of their logits.
    """

    def __init__(self, driver: Driver, spec: ModelSpec, shape: Shape, *, longest: int) -> None:
        sizes, slots = (shape, spec.vocab_size, longest), (shape.max_batch_size,)
        adjustments = AdjustmentsShape(spec.vocab_size, HISTORY)
        self._driver = driver
        self._pinned = Pinned(
            driver,
            PIPELINE_DEPTH * StepBuffers.size(*sizes)
            + pinned_size(slots, SAMPLING)
            + pinned_size(slots, adjustments.dtype),
        )
        self.ring = [(StepBuffers(self._pinned, *sizes), driver.event()) for _ in range(PIPELINE_DEPTH)]
        self.sampling: NDArray[Any] = self._pinned.take(slots, SAMPLING)
        self.adjustments: NDArray[Any] = self._pinned.take(slots, adjustments.dtype)

    @property
    def bytes(self) -> int:
        """In all."""
        return self._pinned.bytes

    def close(self) -> None:
        """Give it back; idempotent."""
        for _, event in self.ring:
            self._driver.call("cuEventDestroy", event)
        self.ring.clear()
        self._pinned.close()


@dataclass(slots=True)
class DeviceState:
    """What `load` made.

    Attributes:
        memory: with at least the buffers `rows`, `chunk`, `sampling`, `adjustments` and `results`.
    """

    driver: Driver
    stream: Any
    memory: DeviceMemory
    host: HostMemory

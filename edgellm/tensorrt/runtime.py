"""A plan on a device: deserialized, a context for each profile, tensors bound by name, faults with a type.

Nothing here knows a model. Memory that TensorRT asks for comes from one allocator, which counts it while the
plan is loaded and refuses it from READY on; activations live in memory that the caller gives. The contexts
share it: they run on one stream, one after the other.
"""

from __future__ import annotations

import collections
import logging
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from edgellm.cuda.driver import Driver
from edgellm.errors import DeviceLost, EngineError, ExecutorFault, OperatorError, TemporaryShortage
from edgellm.memory.sizes import show_size
from edgellm.tensorrt.api import Api
from edgellm.tensorrt.build_log import make_logger

log = logging.getLogger(__name__)

PREFILL: Final = 0
DECODE: Final = 1
PROFILES: Final = (PREFILL, DECODE)


class RuntimeLog:
    """TensorRT's errors and warnings go to the journal; nothing is kept of a log that never ends but these.

    Attributes:
        errors: the last ones.
    """

    def __init__(self) -> None:
        self.errors: collections.deque[str] = collections.deque(maxlen=8)

    def add(self, severity: str, message: str) -> None:
        """Take a message in."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
            log.error("TensorRT: %s", message)
        elif severity == "WARNING":
            log.warning("TensorRT: %s", message)


class Ledger:
    """What TensorRT's runtime holds of the device's memory.

    Attributes:
        bytes: of all allocations.
        ready: whether everything is there; further allocations are refused.
        refused: bytes of the last one that was, or None.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._sizes: dict[int, int] = {}
        self.ready = False
        self.refused: int | None = None

    @property
    def bytes(self) -> int:
        """Of all allocations."""
        return sum(self._sizes.values())

    def allocate(self, size: int) -> int:
        """An address, or 0: TensorRT then reports FAILED_ALLOCATION. Nothing is raised through C++."""
        if size == 0:
            return 0
        if self.ready:
            self.refused = size
            return 0
        try:
            address = self._driver.allocate(size)
        except OperatorError:
            self.refused = size
            return 0
        self._sizes[address] = size
        return address

    def free(self, address: int) -> bool:
        """Give an allocation back."""
        if address == 0:
            return True
        if self._sizes.pop(address, None) is None:
            return False
        try:
            self._driver.free(address)
        except OperatorError:
            return False  # a lost device frees nothing
        return True


class Faults:
    """What TensorRT reported, in order: (name of the ErrorCodeTRT, description)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def error(self, what: str, ledger: Ledger) -> OperatorError:
        """The typed error for what was reported, which is then forgotten."""
        seen, self.seen = self.seen, []
        refused, ledger.refused = ledger.refused, None
        text = (
            "; ".join(f"{code}: {description[:300]}" for code, description in seen[:3]) or "no reason given"
        )
        if refused is not None and ledger.ready:
            return ExecutorFault(
                f"{what}: TensorRT asked for {show_size(refused)} after READY, which is refused ({text})"
            )
        if refused is not None or any(code == "FAILED_ALLOCATION" for code, _ in seen):
            return TemporaryShortage(
                f"{what}: the device has too little memory free ({text}); lower engine.max_batch_size, or "
                "end what else uses the GPU"
            )
        if any(code in ("FAILED_EXECUTION", "INTERNAL_ERROR") for code, _ in seen) and ledger.ready:
            return DeviceLost(f"{what} failed ({text}); the process must start anew")
        return ExecutorFault(f"{what} failed ({text})")


class PlanRuntime:
    """A plan's engine and contexts.

    Args:
        api: the TensorRT at hand.
        driver: its context is current.
        stream: what everything runs on.
        path: of the plan.

    Attributes:
        ledger: what TensorRT holds of the device's memory.
        inputs, outputs: names of the plan's tensors.

    Raises:
        EngineError: the plan is not one that this TensorRT runs on this device; says how to build it again.
        TemporaryShortage: the device has too little memory free.
        ExecutorFault: TensorRT failed.
    """

    def __init__(self, api: Api, driver: Driver, stream: Any, path: Path) -> None:
        trt = api.module
        self._api = api
        self._stream = int(stream)
        self._log, self._faults = RuntimeLog(), Faults()
        self.ledger = Ledger(driver)
        # The runtime uses these as long as it lives, and does not keep them.
        self._callbacks = (
            make_logger(trt, self._log),
            _make_allocator(trt, self.ledger),
            _make_recorder(trt, self._faults),
        )
        logger, allocator, recorder = self._callbacks
        self._runtime = trt.Runtime(logger)
        self._runtime.gpu_allocator = allocator
        self._runtime.error_recorder = recorder
        self._engine: Any = self._deserialize(path)
        self.inputs, self.outputs = self._tensors()
        self._contexts: list[Any] = []

    @property
    def context_bytes(self) -> int:
        """Of activations, for the profile that needs more."""
        return max(int(self._engine.get_device_memory_size_for_profile_v2(profile)) for profile in PROFILES)

    def require(self, inputs: Iterable[str], aliases: dict[str, str], path: Path) -> None:
        """See that the plan's tensors are those that will be bound.

        Args:
            inputs: all.
            aliases: outputs that must be an input's memory, beside the output `logits`.

        Raises:
            EngineError: they are not, or an output is memory of its own.
        """
        wanted = ({*inputs}, {"logits", *aliases})
        if (set(self.inputs), set(self.outputs)) != wanted:
            odd = set(self.inputs) ^ wanted[0] | set(self.outputs) ^ wanted[1]
            raise EngineError(
                f"{path} is not a plan of this edgellm: it differs in {', '.join(sorted(odd)[:4])}; build it "
                "again"
            )
        aliased_to = getattr(self._engine, "get_aliased_input_tensor", None)
        if aliased_to is None:
            return
        for output, source in aliases.items():
            if aliased_to(output) != source:
                raise EngineError(f"{path} keeps {output} apart from {source}, its cache; build it again")

    def create_contexts(self, memory: int) -> None:
        """Make both contexts, their activations at an address with room for `context_bytes`.

        Raises:
            ExecutorFault: TensorRT failed.
        """
        for profile in PROFILES:
            context = self._context()
            if context is None:
                raise self._faults.error("making a context", self.ledger)
            context.set_optimization_profile_async(profile, self._stream)
            context.set_device_memory(memory, self.context_bytes)
            self._contexts.append(context)

    def bind(self, profile: int, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Say where a tensor lies, and an input's shape.

        Raises:
            ExecutorFault: TensorRT refuses it.
        """
        context = self._contexts[profile]
        if shape is not None and not context.set_input_shape(name, shape):
            raise self._faults.error(f"the shape {shape} of {name}", self.ledger)
        if not context.set_tensor_address(name, address):
            raise self._faults.error(f"the address of {name}", self.ledger)

    def execute(self, profile: int) -> None:
        """Put the network, with what is bound, into the stream.

        Raises:
            ExecutorFault: TensorRT failed, or asked for memory.
        """
        if not self._contexts[profile].execute_async_v3(self._stream) or self._faults.seen:
            raise self._faults.error("a step", self.ledger)

    def can_capture(self) -> bool:
        """Whether a decode step can be captured into a graph; where the library does not say, it can."""
        says = getattr(self._contexts[DECODE], "is_stream_capturable", None)
        return True if says is None else bool(says(self._stream))

    def close(self) -> None:
        """Give contexts, engine and runtime back, in this order; idempotent."""
        self._contexts.clear()
        self._engine = self._runtime = None

    def _deserialize(self, path: Path) -> Any:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                engine = self._runtime.deserialize_cuda_engine(raw)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        if engine is None:
            if self.ledger.refused is not None:
                raise self._faults.error(f"loading {path}", self.ledger)
            reasons = [description for _, description in self._faults.seen] or list(self._log.errors)
            raise EngineError(
                f"{self._api.name} {self._api.version} does not load {path}: "
                f"{' '.join(reasons)[:500] or 'it gives no reason'}. Build the engine again here: edgellm "
                "build CHECKPOINT --executor tensorrt"
            )
        return engine

    def _tensors(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        engine, mode = self._engine, self._api.module.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        sides = {name: engine.get_tensor_mode(name) for name in names}
        return (
            tuple(name for name in names if sides[name] == mode.INPUT),
            tuple(name for name in names if sides[name] == mode.OUTPUT),
        )

    def _context(self) -> Any:
        trt = self._api.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._api.name != "tensorrt_rtx":
            return self._engine.create_execution_context(strategy)
        # TensorRT-RTX compiles kernels on the device: once, not anew for each shape that comes along; and
        # graphs are ours.
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.NONE
        )
        return self._engine.create_execution_context(config)


def _make_allocator(trt: Any, ledger: Ledger) -> Any:
    class Allocator(trt.IGpuAllocator):  # type: ignore[misc]
        """Which of the two forms is called differs by version; addresses are plain ints."""

        def __init__(self) -> None:
            trt.IGpuAllocator.__init__(self)

        def allocate(self, size: int, alignment: int, flags: int) -> int:  # noqa: ARG002 - TensorRT's names
            return ledger.allocate(size)

        def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int:  # noqa: ARG002
            return ledger.allocate(size)

        def reallocate(self, address: int, alignment: int, new_size: int) -> int:  # noqa: ARG002
            return 0  # not done; what is there stays valid

        def deallocate(self, memory: int) -> bool:
            return ledger.free(int(memory or 0))

        def deallocate_async(self, memory: int, stream: int) -> bool:  # noqa: ARG002
            return ledger.free(int(memory or 0))

    return Allocator()


def _make_recorder(trt: Any, faults: Faults) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def num_errors(self) -> int:
            return len(faults.seen)

        def get_error_code(self, index: int) -> Any:
            return getattr(trt.ErrorCodeTRT, faults.seen[index][0])

        def get_error_desc(self, index: int) -> str:
            return faults.seen[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            faults.seen.clear()

        def report_error(self, code: Any, description: str) -> bool:
            faults.seen.append((code.name, description))
            return True

    return Recorder()

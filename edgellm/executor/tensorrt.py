"""The TensorRT executor: a plan in the place of kernels; sampling and feedback are the CUDA executor's.

A decode step of n rows is one graph: the plan's inputs made of what the host says, its decode profile over n
rows of the caches, adjusting, sampling. A piece of a prompt goes in with as many tokens as it has, so it is
not captured: the plan's other profile runs over its slot's row alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver, resolve
from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.enginedir import EngineDir
from edgellm.errors import EngineError
from edgellm.executor.base import ExecutorInfo, MemoryReport, Progress, Row
from edgellm.executor.buckets import MOST_ROWS
from edgellm.executor.cuda_kernels import load_cubins
from edgellm.executor.cuda_memory import DeviceMemory
from edgellm.executor.cuda_steps import Piece
from edgellm.executor.device import STEP_LIMIT_S, DeviceExecutor
from edgellm.executor.device_state import PIPELINE_DEPTH, DeviceState, HostMemory
from edgellm.executor.sampling_launches import tokens_of_logits
from edgellm.executor.tensorrt_buffers import HALF, cache_bytes, lasting_buffers, longest_chunk
from edgellm.executor.tensorrt_launches import before_chunk, before_rows, kernels_around
from edgellm.executor.tensorrt_rows import DeviceRows
from edgellm.memory.plan import Shape
from edgellm.tensorrt.api import Api, find_api
from edgellm.tensorrt.engine_files import PLAN_FILE, plan_record, software_at_hand
from edgellm.tensorrt.runtime import DECODE, PREFILL, PlanRuntime

SMALLEST_CHUNK: Final = 2
"""A single token goes through the decode profile, whose kernels sum in another order."""

_REBUILD: Final = "Build the engine again here: edgellm build CHECKPOINT --executor tensorrt"


@dataclass(slots=True)
class _Loaded(DeviceState):
    """With the plan, the caches' rows, and a graph for each number of rows.

    Attributes:
        functions: the kernels around the plan.
        graphs: (first row, rows) → graph; without one, a step is put into the stream piece by piece.
    """

    runtime: PlanRuntime
    rows: DeviceRows
    functions: dict[Kernel, Any]
    graphs: dict[tuple[int, int], Any] = field(default_factory=dict)


class TensorRtExecutor(DeviceExecutor):
    """Runs an engine directory's plan; see `executor.base.Executor` for the methods.

    Args:
        directory: the engine directory.
        shape: slots, their length, tokens in a step; at most what the plan was built for.
        step_limit_s: a step that takes longer hangs.
        open_driver: opens the device.
        find_library: finds the TensorRT at hand.

    Raises:
        EngineError: the directory has no plan.
    """

    def __init__(
        self,
        directory: EngineDir,
        shape: Shape,
        *,
        step_limit_s: float = STEP_LIMIT_S,
        open_driver: Callable[[], Driver] = Driver,
        find_library: Callable[[], Api] = find_api,
    ) -> None:
        spec = directory.spec
        info = ExecutorInfo(
            name="tensorrt",
            max_batch_size=shape.max_batch_size,
            max_seq_len=shape.max_seq_len,
            max_num_tokens=shape.max_num_tokens,
            vocab_size=spec.vocab_size,
            kv_bytes_per_token=spec.num_hidden_layers * 2 * spec.num_key_value_heads * spec.head_size * HALF,
            pipeline_depth=PIPELINE_DEPTH,
            smallest_chunk=SMALLEST_CHUNK,
        )
        super().__init__(info, spec, step_limit_s=step_limit_s, open_driver=open_driver)
        self._directory = directory
        self._record = plan_record(directory)
        self._find_library = find_library

    def load(self, progress: Progress) -> MemoryReport:
        """Deserialize the plan, allocate, run and capture every number of rows once.

        Raises:
            TensorRtMissing: there is none that could run the plan.
            DeviceError: there is no CUDA, or no device that will do.
            EngineError: the plan is of another TensorRT, device or board software; says how to build again.
            TemporaryShortage: the device has too little memory free.
            ExecutorFault: the device or TensorRT failed.
        """
        assert self._loaded is None, "loaded already"
        api = self._find_library()
        self._require_library(api)
        driver = self._open_driver()
        self._thread = threading.get_ident()
        try:
            self._require_device(driver)
            self._load(api, driver, progress)
        except BaseException:
            self.close()
            driver.close()
            raise
        progress("ready", 1.0)
        state = self._device_state
        sizes = {name: state.memory.size(name) for name in ("kv_cache", "spare_row")}
        caches = sum(sizes.values())
        return MemoryReport(
            {
                "weights": state.runtime.ledger.bytes,
                "kv_cache": caches,
                "activations": state.memory.bytes - caches,
                "pinned": state.host.bytes,
            }
        )

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the KV of the first `length` tokens from one slot to another."""
        if source == target or not length:
            return
        self._attach()
        rows = self._held_rows()
        rows.copy_prefix(source, target, length)
        self._slots[target].held = length

    # Loading.

    def _require_library(self, api: Api) -> None:
        record, path = self._record, self._directory.path
        if (api.name, api.version) != (record.library, record.version):
            raise EngineError(
                f"{path} was built by {record.library} {record.version}, here is {api.name} {api.version}; a "
                f"plan runs with the version that built it alone. {_REBUILD}"
            )
        software = None if api.builds_ahead else software_at_hand()
        if software != record.software:
            raise EngineError(
                f"{path} was built on {record.software or 'no board'}, here is {software or 'none'}. "
                f"{_REBUILD}"
            )

    def _require_device(self, driver: Driver) -> None:
        sm, targets = driver.facts.device.sm, self._record.targets
        if sm not in targets:
            raise EngineError(
                f"{self._directory.path} was built for compute capability "
                f"{', '.join(f'{target / 10:.1f}' for target in targets)}, {driver.facts.name} has "
                f"{sm / 10:.1f}. {_REBUILD} (--sm {sm} with TensorRT-RTX)"
            )

    def _load(self, api: Api, driver: Driver, progress: Progress) -> None:
        spec, build, shape = self._spec, self._directory.build, self._shape
        path = self._directory.path / PLAN_FILE
        stream = driver.stream()
        progress("kernels", 0.0)
        cubins = load_cubins(
            self._directory.path,
            kernels_around(spec.vocab_size),
            driver.facts.device.sm,
            lambda done: progress("kernels", done),
        )
        functions = {
            kernel: driver.load(image, read_resources(image)[0].name, kernel.shared)
            for kernel, image in cubins.items()
        }
        progress("plan", 0.0)
        runtime = PlanRuntime(api, driver, stream, path)
        try:
            pasts = {f"present.{name}": f"past.{name}" for name in self._caches()}
            inputs = ["tokens", "positions", "past", "last", *(["lengths"] if self._record.lengths else [])]
            runtime.require([*inputs, *pasts.values()], pasts, path)
            buffers = lasting_buffers(spec, build, shape, context_bytes=runtime.context_bytes)
            memory = DeviceMemory(driver, buffers, ())
            memory.clear(stream)
            runtime.create_contexts(memory.at("context"))
        except BaseException:
            runtime.close()
            raise
        base, each = memory.at("kv_cache"), cache_bytes(spec, build, shape)
        rows = DeviceRows(
            driver,
            stream,
            rows=shape.max_batch_size,
            caches=[base + number * each for number in range(2 * spec.num_hidden_layers)],
            spare=memory.at("spare_row"),
            kv_heads=spec.num_key_value_heads,
            max_seq_len=build.max_seq_len,
            token_bytes=spec.head_size * HALF,
        )
        host = HostMemory(driver, spec, shape, longest=longest_chunk(shape))
        state = self._loaded = _Loaded(driver, stream, memory, host, runtime, rows, functions)

        sizes = range(1, shape.max_batch_size + 1)
        tokens = sorted({min(2, longest_chunk(shape)), longest_chunk(shape)})
        # TensorRT wants each shape to have run before it is captured.
        self._warm_up(sizes, tokens, progress)
        runtime.ledger.ready = True
        if runtime.can_capture():
            for first, count in decode_runs(shape.max_batch_size):
                progress("graphs", first / shape.max_batch_size)
                state.graphs[first, count] = self._capture(first, count)
        self._warm_up(sizes, tokens, progress)
        for name in ("kv_cache", "spare_row", "last_token", "results"):
            driver.call("cuMemsetD8Async", memory.at(name), 0, memory.size(name), stream)
        driver.call("cuStreamSynchronize", stream)

    def _capture(self, first: int, count: int) -> Any:
        state = self._device_state
        # What is bound is no part of the stream.
        self._bind(DECODE, first, count, 1)
        return state.driver.capture(state.stream, lambda: self._enqueue_rows(count))

    # Steps.

    @property
    def _device_state(self) -> _Loaded:
        assert isinstance(self._loaded, _Loaded), "not loaded"
        return self._loaded

    def _arrange(self, rows: list[Row]) -> list[Row]:
        if not rows:
            return rows
        held = self._held_rows()
        held.gather([row.slot for row in rows], first=0)
        return sorted(rows, key=lambda row: held.row(row.slot))

    def _rows_of_run(self, count: int) -> int:
        return count

    def _run_rows(self, first: int, count: int) -> int:
        state = self._device_state
        graph = state.graphs.get((first, count))
        if graph is not None:
            state.driver.call("cuGraphLaunch", graph, state.stream)
        else:
            self._bind(DECODE, first, count, 1)
            self._enqueue_rows(count)
        return state.memory.at("logits")

    @property
    def _longest_piece(self) -> int:
        return longest_chunk(self._shape)

    def _run_piece(self, piece: Piece) -> int:
        state, tokens = self._device_state, piece.end - piece.begin
        self._bind(PREFILL, state.rows.row(piece.row.slot), 1, tokens)
        self._launch(before_chunk(tokens))
        state.runtime.execute(PREFILL)
        self._launch(self._tokens_of(1, At("chunk")))
        return state.memory.at("logits")

    def _enqueue_rows(self, count: int) -> None:
        self._launch(before_rows(count))
        self._device_state.runtime.execute(DECODE)
        self._launch(self._tokens_of(count, At("rows")))

    def _free(self, state: DeviceState) -> None:
        assert isinstance(state, _Loaded)
        for graph in state.graphs.values():
            state.driver.call("cuGraphExecDestroy", graph)
        state.runtime.close()

    def _bind(self, profile: int, first: int, count: int, tokens: int) -> None:
        """Bind every tensor of the network: caches from row `first` on, all others at their one place."""
        state, spec = self._device_state, self._spec
        runtime, at = state.runtime, state.memory.at
        for name in ("tokens", "positions"):
            runtime.bind(profile, name, at(name), (count, tokens))
        for name in ("past", "last", *(["lengths"] if self._record.lengths else [])):
            runtime.bind(profile, name, at(name), (count,))
        runtime.bind(profile, "logits", at("logits"))
        shape = (count, spec.num_key_value_heads, self._directory.build.max_seq_len, spec.head_size)
        for number, name in enumerate(self._caches()):
            address = state.rows.address(number, first)
            runtime.bind(profile, f"past.{name}", address, shape)
            runtime.bind(profile, f"present.{name}", address)

    def _tokens_of(self, rows: int, rows_at: At) -> list[Launch]:
        device = self._device_state.driver.facts.device
        return tokens_of_logits(self._spec.vocab_size, rows, rows_at, device)

    def _launch(self, launches: Sequence[Launch]) -> None:
        state = self._device_state
        for each in launches:
            state.driver.launch(
                state.functions[each.kernel],
                each.grid,
                threads=each.kernel.threads,
                shared=each.kernel.shared,
                arguments=resolve(each.arguments, lambda at: state.memory.at(at.buffer) + at.offset),
                stream=state.stream,
            )

    def _held_rows(self) -> DeviceRows:
        """The caches' rows, told what the slots hold now."""
        rows = self._device_state.rows
        for slot, own in enumerate(self._slots):
            rows.set_held(slot, own.held)
        return rows

    def _caches(self) -> Iterator[str]:
        """The network's names of them, in the order in which they lie in memory."""
        for layer in range(self._spec.num_hidden_layers):
            yield f"{layer}.key"
            yield f"{layer}.value"


def decode_runs(slots: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of every run that decode steps of so many slots can have."""
    for first in range(0, slots, MOST_ROWS):
        for count in range(1, min(MOST_ROWS, slots - first) + 1):
            yield first, count

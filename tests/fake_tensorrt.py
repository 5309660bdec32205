"""A stand-in for TensorRT's bindings, whose plans compute in Python over a device's memory.

A plan's file is JSON: what `model/trt.py` says of the network's inputs and outputs. Running it writes each
token into the caches at its position, in every layer and head, and reads all of a row's text back out of them
to make its logits. So a cache that was bound elsewhere, a row that was not moved along, or a wrong `past`
shows in what comes out. What TensorRT would refuse, or silently get wrong, is asserted.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_device import FakeDevice, logits_of
from fake_driver import FakeDriver
from numpy.typing import NDArray

from edgellm.engine_config import BuildConfig
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.model.spec import ModelSpec
from edgellm.tensorrt.api import Api

Tensors = dict[str, tuple[str, list[int]]]

CONTEXT_BYTES = [3000, 5000]
WEIGHT_BYTES = 7000


def array(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """What lies at an address."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    seen: NDArray[Any] = raw.view(dtype).reshape(shape)
    return seen


def tensors_of(spec: ModelSpec, max_seq_len: int, *, lengths: bool = True) -> tuple[Tensors, Tensors]:
    """Inputs and outputs, with −1 for what a profile bounds, as `model/trt.py` documents them."""
    vectors = ["past", "last", *(["lengths"] if lengths else [])]
    inputs: Tensors = {name: ("int32", [-1, -1]) for name in ("tokens", "positions")}
    inputs |= {name: ("int32", [-1]) for name in vectors}
    outputs: Tensors = {"logits": ("float32", [-1, spec.vocab_size])}
    shape = [-1, spec.num_key_value_heads, max_seq_len, spec.head_size]
    for layer in range(spec.num_hidden_layers):
        for part in ("key", "value"):
            inputs[f"past.{layer}.{part}"] = ("float16", shape)
            outputs[f"present.{layer}.{part}"] = ("float16", shape)
    return inputs, outputs


def plan_bytes(spec: ModelSpec, build: BuildConfig, *, lengths: bool = True) -> bytes:
    """A plan's file."""
    inputs, outputs = tensors_of(spec, build.max_seq_len, lengths=lengths)
    most = [(1, min(build.max_num_tokens, build.max_seq_len)), (build.max_batch_size, 1)]
    return json.dumps({"inputs": inputs, "outputs": outputs, "most": most}).encode()


class PlanDevice(FakeDevice):
    """A device that runs the kernels around a plan, one by one or from a graph."""

    def __init__(self, vocab: int, slots: int, **options: Any) -> None:
        super().__init__(vocab, slots, **options)
        self._recording: list[Callable[[], None]] | None = None
        self._recorded: dict[int, list[Callable[[], None]]] = {}

    def put(self, work: Callable[[], None]) -> None:
        """What a library puts into the stream."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not name.startswith(("cuGraph", "cuStreamBegin", "cuStreamEnd", "cuLaunch", "cuMemcpy2D")):
            return super()._results(name, arguments)
        results = FakeDriver._results(self, name, arguments)
        match name:
            case "cuStreamBeginCapture":
                self._recording = []
            case "cuStreamEndCapture":
                assert self._recording is not None
                self._recorded[results[0]], self._recording = self._recording, None
            case "cuGraphLaunch":
                for work in self._recorded[arguments[0]]:
                    work()
            case "cuLaunchKernelEx":
                config, function, (values, _), _ = arguments
                self.put(lambda: self._kernel(self._names[function], config, values))
            case "cuMemcpy2DAsync":
                copy = arguments[0]
                for line in range(copy.Height):
                    at = line * copy.srcPitch
                    ctypes.memmove(copy.dstDevice + at, copy.srcDevice + at, copy.WidthInBytes)
            case "cuGraphInstantiate" | "cuGraphInstantiateWithFlags":
                self._recorded[results[0]] = self._recorded[arguments[0]]
            case "cuGraphDestroy" | "cuGraphExecDestroy":
                del self._recorded[arguments[0]]
        return results

    def _kernel(self, name: str, config: Any, values: tuple[Any, ...]) -> None:
        if re.search("feed_rows", name):
            rows_at, last_at, count, *into = values
            rows, last = array(rows_at, (count,), ROW), array(last_at, (self._slots,), np.int32)
            assert config.gridDimX * config.blockDimX >= count
            tokens, positions, past, wanted, lengths = (array(at, (count,), np.int32) for at in into)
            tokens[:] = np.where(rows["token"] < 0, last[rows["slot"]], rows["token"])
            positions[:] = past[:] = rows["past"]
            wanted[:], lengths[:] = 0, rows["past"] + 1
        elif re.search("feed_chunk", name):
            chunk_at, ids_at, *into = values
            chunk = array(chunk_at, (1,), CHUNK)[0]
            count = int(chunk["count"])
            assert config.gridDimX * config.blockDimX >= count
            array(into[0], (count,), np.int32)[:] = array(ids_at, (count,), np.int32)
            array(into[1], (count,), np.int32)[:] = chunk["past"] + np.arange(count)
            numbers = (chunk["past"], count - 1, chunk["past"] + count)
            for at, number in zip(into[2:], numbers, strict=True):
                array(at, (1,), np.int32)[0] = number
        else:
            assert re.search("sample", name), name
            rows_at, sampling_at, self._adjustments_at, logits_at, _, _, last_at, results_at = values
            count = config.gridDimY
            logits = array(logits_at, (count, self._vocab), np.float32)
            last = array(last_at, (self._slots,), np.int32)
            for number, row in enumerate(array(rows_at, (count,), ROW)):
                self._choose(row, logits[number], number, last, (sampling_at, logits_at, results_at))


@dataclass
class FakeTensorRt:
    """The library: `api()` is what `find_api` gives.

    Attributes:
        device: whose memory plans compute in.
        rtx: whether it is TensorRT-RTX.
        strict: whether a row's text must lie whole in its caches; not yet while loading.
        refuses: what deserializing reports, instead of an engine.
        aliased: whether outputs say which input's memory they are.
        allocates: bytes that the next run asks for.
        reports: (code, description) that the next run reports, and fails.
        calls: what contexts were told, in order: (profile, name, arguments).
    """

    device: PlanDevice
    rtx: bool = False
    strict: bool = False
    refuses: str | None = None
    aliased: bool = True
    allocates: int = 0
    reports: tuple[str, str] | None = None
    capturable: bool = True
    calls: list[tuple[int, str, tuple[Any, ...]]] = field(default_factory=list)

    def api(self) -> Api:
        """What can be done with it."""
        name = "tensorrt_rtx" if self.rtx else "tensorrt"
        module: Any = SimpleNamespace(
            __name__=name,
            ILogger=_Base,
            IGpuAllocator=_Base,
            IErrorRecorder=_Base,
            Runtime=lambda logger: FakeRuntime(self, logger),
            TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
            CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(NONE="none"),
        )
        return Api(module, name, "10.16.1", has_lengths=True, has_moe=False, builds_ahead=self.rtx)  # type: ignore[arg-type]


class _Base:
    """Of what an application implements."""


class FakeRuntime:
    """IRuntime."""

    def __init__(self, library: FakeTensorRt, logger: Any) -> None:
        self._library = library
        self.logger = logger
        self.gpu_allocator: Any = None
        self.error_recorder: Any = None

    def deserialize_cuda_engine(self, raw: Any) -> FakeEngine | None:
        if self._library.refuses is not None:
            self.error_recorder.report_error(SimpleNamespace(name="INVALID_STATE"), self._library.refuses)
            return None
        plan = json.loads(bytes(raw))
        address = self.gpu_allocator.allocate_async(WEIGHT_BYTES, 256, 0, 0)
        if not address:
            self.error_recorder.report_error(SimpleNamespace(name="FAILED_ALLOCATION"), "weights")
            return None
        return FakeEngine(self._library, self, plan, address)


class FakeEngine:
    """ICudaEngine."""

    def __init__(self, library: FakeTensorRt, runtime: FakeRuntime, plan: Any, weights: int) -> None:
        self.library = library
        self.runtime = runtime
        self.inputs: Tensors = plan["inputs"]
        self.outputs: Tensors = plan["outputs"]
        self.most: list[tuple[int, int]] = plan["most"]
        self._weights = weights
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = 2

    def __del__(self) -> None:
        assert self.runtime.gpu_allocator.deallocate_async(self._weights, 0)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past") if self.library.aliased and "present" in name else None

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return CONTEXT_BYTES[profile]

    def create_runtime_config(self) -> Any:
        assert self.library.rtx
        config = SimpleNamespace(strategy=None)
        config.set_execution_context_allocation_strategy = lambda given: setattr(config, "strategy", given)
        return config

    def create_execution_context(self, how: Any) -> FakeContext:
        if self.library.rtx:
            assert (how.cuda_graph_strategy, how.dynamic_shapes_kernel_specialization_strategy) == (
                "disabled",
                "none",
            )
            how = how.strategy
        assert how == "user managed"
        return FakeContext(self)


class FakeContext:
    """IExecutionContext."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._library = engine.library
        self.profile = -1
        self.memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        self._note("profile")
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= max(CONTEXT_BYTES)
        self.memory = address
        self._note("memory", address)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self._engine.inputs[name][1]
        rows, tokens = self._engine.most[self.profile]
        fits = len(shape) == len(declared) and 1 <= shape[0] <= rows
        for size, known in zip(shape[1:], declared[1:], strict=False):
            fits = fits and (size == known if known >= 0 else 1 <= size <= tokens)
        if not fits:
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.inputs and name not in self._engine.outputs:
            return False
        assert address % 256 == 0, f"{name} is not aligned"
        self.addresses[name] = address
        self._note("address", name, address)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._library.capturable

    def execute_async_v3(self, stream: int) -> bool:
        engine, library = self._engine, self._library
        engine.runtime.logger.log(SimpleNamespace(name="VERBOSE"), "a run")
        self._note("execute", dict(self.shapes), dict(self.addresses))
        assert self.memory
        assert self.addresses.keys() == {*engine.inputs, *engine.outputs}
        assert self.shapes.keys() == engine.inputs.keys()
        for name, address in self.addresses.items():
            if name.startswith("present"):
                assert address == self.addresses[name.replace("present", "past")]
        if library.allocates and not engine.runtime.gpu_allocator.allocate_async(
            library.allocates, 256, 0, stream
        ):
            engine.runtime.error_recorder.report_error(SimpleNamespace(name="FAILED_ALLOCATION"), "workspace")
            return False
        if library.reports is not None:
            code, description = library.reports
            engine.runtime.error_recorder.report_error(SimpleNamespace(name=code), description)
            return False
        # What is bound now counts, not what is bound when a graph runs.
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        library.device.put(lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, library = self._engine, self._library
        given = {
            name: array(addresses[name], shapes[name], dtype) for name, (dtype, _) in engine.inputs.items()
        }
        rows, count = given["tokens"].shape
        assert {shape[0] for shape in shapes.values()} == {rows}
        caches = {name: held for name, held in given.items() if "." in name}
        vocab = engine.outputs["logits"][1][1]
        logits = array(addresses["logits"], (rows, vocab), np.float32)
        for row in range(rows):
            past = int(given["past"][row])
            positions = past + np.arange(count)
            assert given["positions"][row].tolist() == positions.tolist()
            assert given["last"][row] == count - 1
            assert "lengths" not in given or given["lengths"][row] == past + count
            texts = set()
            for number, held in enumerate(caches.values()):
                assert past + count <= held.shape[2]
                held[row, :, positions, 0] = given["tokens"][row][:, None]
                held[row, :, positions, 1] = number + 1
                written = held[row, :, : past + count]
                if library.strict:
                    assert (written[..., 1] == number + 1).all(), "another layer's cache, or nothing"
                texts |= {tuple(head[:, 0].astype(int).tolist()) for head in written}
            if library.strict:
                assert len(texts) == 1, "heads or layers differ"
            logits[row] = logits_of(list(texts.pop()), vocab)

    def _note(self, name: str, *arguments: Any) -> None:
        self._library.calls.append((self.profile, name, arguments))

"""The CUDA executor: own kernels, a CUDA graph for each bucket of rows or of a prompt's tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver, resolve
from edgellm.cuda.launch import Launch
from edgellm.executor.base import (
    ExecutorInfo,
    MemoryReport,
    Progress,
)
from edgellm.executor.buckets import decode_buckets, prefill_buckets
from edgellm.executor.cuda_kernels import load_cubins
from edgellm.executor.cuda_memory import DeviceMemory, load_weights
from edgellm.executor.cuda_programs import Lowering
from edgellm.executor.cuda_steps import Piece
from edgellm.executor.device import STEP_LIMIT_S, DeviceExecutor
from edgellm.executor.device_state import PIPELINE_DEPTH, DeviceState, HostMemory
from edgellm.executor.program import Program, kernels_of
from edgellm.kernels.attention_shape import CacheKind, rope_table
from edgellm.model.network import NETWORK_FILE, Network, read_network
from edgellm.model.rotary import Rotary
from edgellm.model.spec import ModelSpec
from edgellm.model.weights_file import WEIGHTS_FILE, read_digests, read_weights_header

SMALLEST_CHUNK: Final = 2
"""A prompt's single tokens go through the decode kernels, which sum in another order. Pieces of different
buckets may still differ in the last bits."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured program.

    Attributes:
        handle: of the graph.
        logits: where on the device they lie.
        launches: what it was captured of.
        capture: captures some of them by themselves.
    """

    handle: Any
    logits: int
    launches: Sequence[Launch]
    capture: Callable[[Sequence[Launch]], Any]


@dataclass(slots=True)
class _Loaded(DeviceState):
    """With the network, and a graph for each bucket of rows and of tokens."""

    lowering: Lowering
    decode: dict[int, _Graph]
    prefill: dict[int, _Graph]


@dataclass(frozen=True, slots=True)
class Timing:
    """What some launches took together.

    Attributes:
        name: of their kernel, or `all`.
        count: launches.
        seconds: for all of them.
    """

    name: str
    count: int
    seconds: float


class CudaExecutor(DeviceExecutor):
    """Runs an engine directory's network; see `executor.base.Executor` for the methods.

    Args:
        directory: the engine directory.
        spec: its model's numbers.
        max_batch_size: slots.
        max_seq_len: tokens per slot; at most what the engine was built for.
        max_num_tokens: tokens that a step may feed.
        kv_cache: what the caches hold.
        dependent_launch: whether kernels may start before the one in front has ended, where the device can.
        step_limit_s: a step that takes longer hangs.
        open_driver: opens the device.
    """

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        *,
        max_batch_size: int,
        max_seq_len: int,
        max_num_tokens: int,
        kv_cache: CacheKind = "fp16",
        dependent_launch: bool = True,
        step_limit_s: float = STEP_LIMIT_S,
        open_driver: Callable[[], Driver] = Driver,
    ) -> None:
        per_head = spec.head_size * 2 if kv_cache == "fp16" else spec.head_size + 2
        info = ExecutorInfo(
            name="cuda",
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            vocab_size=spec.vocab_size,
            kv_bytes_per_token=spec.num_hidden_layers * 2 * spec.num_key_value_heads * per_head,
            pipeline_depth=PIPELINE_DEPTH,
            smallest_chunk=SMALLEST_CHUNK,
        )
        super().__init__(info, spec, step_limit_s=step_limit_s, open_driver=open_driver)
        self._directory = directory
        self._kv_cache: CacheKind = kv_cache
        self._dependent_launch = dependent_launch

    def load(self, progress: Progress) -> MemoryReport:
        """Read the weights, compile or load the kernels, capture and run every graph once.

        Raises:
            DeviceError: there is no CUDA, or no device that will do.
            EngineError: the engine's files are damaged, or of another layout.
            TemporaryShortage: the device has too little memory free.
            ExecutorFault: the device failed.
        """
        assert self._loaded is None, "loaded already"
        network = read_network(self._directory / NETWORK_FILE)
        weights = read_weights_header(self._directory / WEIGHTS_FILE)
        driver = self._open_driver()
        self._thread = threading.get_ident()
        try:
            self._load(driver, network, weights, progress)
        except BaseException:
            driver.close()
            raise
        progress("ready", 1.0)
        state = self._device_state
        return MemoryReport(
            {
                "weights": state.memory.size("weights"),
                "kv_cache": state.memory.size("kv_cache"),
                "activations": state.memory.bytes
                - state.memory.size("weights")
                - state.memory.size("kv_cache"),
                "pinned": state.host.bytes,
            }
        )

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the KV of the first `length` tokens from one slot to another."""
        if source == target or not length:
            return
        state = self._device_state
        self._attach()
        shape = state.lowering.caches.any_attention
        base = state.memory.at("kv_cache")
        for layer in range(self._spec.num_hidden_layers):
            cache = state.lowering.caches.of(layer)
            for at, slot, held in (
                (cache.held, shape.cache_bytes(1), shape.held_bytes(length)),
                (cache.scales, shape.scale_bytes(1), shape.held_scale_bytes(length)),
            ):
                if at is not None:
                    start = base + at.offset
                    state.driver.copy_rows(
                        start + source * slot,
                        start + target * slot,
                        pitch=held,
                        width=held,
                        rows=1,
                        stream=state.stream,
                    )
        self._slots[target].held = length

    def profile(self, *, rows: int | None = None, tokens: int | None = None) -> list[Timing]:
        """How long the kernels of a decode bucket, or of a prefill one, take: all, then each kind by itself.

        Launches of one kind run one after the other, each with its own layer's weights. What the caches hold
        is lost; nothing may be open.
        """
        assert not self._open, "a step is open"
        self._attach()
        state = self._device_state
        graph = state.prefill[tokens] if rows is None and tokens is not None else state.decode[rows or 1]
        kinds: dict[str, list[Launch]] = {"all": list(graph.launches)}
        for launch in graph.launches:
            kinds.setdefault(launch.kernel.expression, []).append(launch)
        timings = []
        for name, launches in kinds.items():
            handle = graph.capture(launches)
            seconds = state.driver.time(partial(self._replay, handle), state.stream)
            state.driver.call("cuGraphExecDestroy", handle)
            timings.append(Timing(name, len(launches), seconds))
        return timings

    def _replay(self, handle: Any) -> None:
        state = self._device_state
        state.driver.call("cuGraphLaunch", handle, state.stream)

    # Steps.

    @property
    def _device_state(self) -> _Loaded:
        assert isinstance(self._loaded, _Loaded), "not loaded"
        return self._loaded

    def _rows_of_run(self, count: int) -> int:
        return _bucket(self._device_state.decode, count)

    def _run_rows(self, first: int, count: int) -> int:  # noqa: ARG002 - rows say which slot they are
        graph = self._device_state.decode[self._rows_of_run(count)]
        self._replay(graph.handle)
        return graph.logits

    @property
    def _longest_piece(self) -> int:
        return max(self._device_state.prefill)

    def _run_piece(self, piece: Piece) -> int:
        prefill = self._device_state.prefill
        graph = prefill[_bucket(prefill, piece.end - piece.begin)]
        self._replay(graph.handle)
        return graph.logits

    def _free(self, state: DeviceState) -> None:
        assert isinstance(state, _Loaded)
        for graph in (*state.decode.values(), *state.prefill.values()):
            state.driver.call("cuGraphExecDestroy", graph.handle)

    # Loading.

    def _load(self, driver: Driver, network: Network, weights: Any, progress: Progress) -> None:
        facts, shape, spec = driver.facts, self._shape, self._spec
        progress("kernels", 0.0)
        lowering = Lowering(
            network,
            spec,
            shape,
            kv_cache=self._kv_cache,
            device=facts.device,
            weights=weights.offsets,
            weights_bytes=weights.bytes,
        )
        decode = {rows: lowering.decode(rows) for rows in decode_buckets(shape.max_batch_size)}
        prefill = {tokens: lowering.prefill(tokens) for tokens in prefill_buckets(shape)}
        programs = [*decode.values(), *prefill.values()]
        cubins = load_cubins(
            self._directory, kernels_of(programs), facts.device.sm, lambda done: progress("kernels", done)
        )
        functions = {
            kernel: driver.load(image, read_resources(image)[0].name, kernel.shared)
            for kernel, image in cubins.items()
        }
        stream = driver.stream()
        memory = DeviceMemory(driver, lowering.lasting(), programs)
        longest = min(max(prefill), shape.max_num_tokens)
        table = rope_table(
            Rotary(np.array(network.rotary), network.rotary_length), lowering.caches.any_attention.max_seq
        )
        host = HostMemory(driver, spec, shape, longest=longest)
        memory.clear(stream, keep=("weights",))
        # Behind the clearing: a copy outside the stream would not wait for it, and be cleared.
        driver.call("cuMemcpyHtoDAsync", memory.at("rope"), table.ctypes.data, table.nbytes, stream)
        driver.call("cuStreamSynchronize", stream)
        load_weights(
            driver,
            stream,
            weights,
            memory.at("weights"),
            digests=read_digests(weights.path),
            progress=lambda done: progress("weights", done),
        )

        dependent = self._dependent_launch and facts.device.has_dependent_launch

        def capture(program: Program) -> _Graph:
            address_of = memory.resolver(program)

            def of(launches: Sequence[Launch]) -> Any:
                def launch() -> None:
                    for each in launches:
                        driver.launch(
                            functions[each.kernel],
                            each.grid,
                            threads=each.kernel.threads,
                            shared=each.kernel.shared,
                            arguments=resolve(each.arguments, address_of),
                            stream=stream,
                            early=each.early and dependent,
                        )

                return driver.capture(stream, launch)

            logits = memory.address_in(program, "logits")
            return _Graph(of(program.launches), logits, program.launches, of)

        graphs: dict[int, dict[int, _Graph]] = {0: {}, 1: {}}
        for kind, programs_of_kind in enumerate((decode, prefill)):
            for size, program in programs_of_kind.items():
                progress("graphs", sum(map(len, graphs.values())) / len(programs))
                graphs[kind][size] = capture(program)
        self._loaded = _Loaded(driver, stream, memory, host, lowering, graphs[0], graphs[1])
        self._warm_up(decode, prefill, progress)
        memory.clear(stream, keep=("weights", "rope", *_COUNTERS))
        driver.call("cuStreamSynchronize", stream)


_COUNTERS: Final = ("linear_workspace", "prefill_workspace", "attention_workspace", "sample_workspace")
"""Buffers that launches leave as they must be."""


def _bucket(graphs: dict[int, _Graph], count: int) -> int:
    """The smallest that holds as many."""
    return min(size for size in graphs if size >= count)

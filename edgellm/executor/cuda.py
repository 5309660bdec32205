"""The CUDA executor: own kernels, a CUDA graph for each bucket of rows or of a prompt's tokens.

Two steps may be in flight. A sampled token stays on the device and feeds the next step there; the host learns
it when it collects, so what Python does costs the device no time. Rows that only the host's sampler can serve
(a mask, penalties, log-probabilities) wait for it: a step that feeds such a token back is not sent before.

All memory is allocated in `load`; a step allocates nothing.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver, resolve
from edgellm.cuda.launch import Launch
from edgellm.errors import DeviceLost, ExecutorFault
from edgellm.executor.base import (
    ExecutorInfo,
    Feedback,
    MemoryReport,
    Progress,
    Result,
    Row,
    Step,
    Ticket,
    Want,
)
from edgellm.executor.cuda_kernels import load_cubins
from edgellm.executor.cuda_memory import DeviceMemory, Pinned, load_weights, pinned_size
from edgellm.executor.cuda_programs import (
    HISTORY,
    MOST_ROWS,
    Lowering,
    Program,
    decode_buckets,
    kernels_of,
    prefill_buckets,
)
from edgellm.executor.cuda_steps import NOBODY, SAMPLED_LAST, StepBuffers, pieces_of
from edgellm.executor.sampler import Sampled, Sampler
from edgellm.kernels.adjust import adjustments_state, adjusts
from edgellm.kernels.attention_shape import CacheKind, rope_table
from edgellm.kernels.rows import WANTS_TOKEN
from edgellm.kernels.sample import CHOSEN, SAMPLED, SAMPLING, chooses_on_device, sampling_state
from edgellm.memory.plan import Shape
from edgellm.model.network import NETWORK_FILE, Network, read_network
from edgellm.model.rotary import Rotary
from edgellm.model.spec import ModelSpec
from edgellm.model.weights_file import WEIGHTS_FILE, read_weights_header
from edgellm.sampling import SamplingParams

PIPELINE_DEPTH: Final = 2
SMALLEST_CHUNK: Final = 2
"""A prompt's single tokens go through the decode kernels, which sum in another order. Pieces of different
buckets may still differ in the last bits."""
STEP_LIMIT_S: Final = 30.0
"""No step takes a hundredth of it."""
_NAP_S: Final = 50e-6
_LONGEST_NAP_S: Final = 1e-3
_NAP_SHARE: Final = 0.1
"""Between two looks at a step: a tenth of what it was waited for, so that it is not noticed late by more."""


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
class _Open:
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
class _Slot:
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


@dataclass(slots=True)
class _Loaded:
    """What `load` made."""

    driver: Driver
    stream: Any
    memory: DeviceMemory
    pinned: Pinned
    lowering: Lowering
    decode: dict[int, _Graph]
    prefill: dict[int, _Graph]
    ring: list[tuple[StepBuffers, Any]]
    sampling: NDArray[Any]
    adjustments: NDArray[Any]
    handles: list[Any] = field(default_factory=list)


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


class CudaExecutor:
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
        self._directory = directory
        self._spec = spec
        self._shape = Shape(max_batch_size, max_seq_len, max_num_tokens)
        self._kv_cache: CacheKind = kv_cache
        self._step_limit_s = step_limit_s
        self._open_driver = open_driver
        self._dependent_launch = dependent_launch
        kv_heads, layers = spec.num_key_value_heads, spec.num_hidden_layers
        per_head = spec.head_size * 2 if kv_cache == "fp16" else spec.head_size + 2
        self._info = ExecutorInfo(
            name="cuda",
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            vocab_size=spec.vocab_size,
            kv_bytes_per_token=layers * 2 * kv_heads * per_head,
            pipeline_depth=PIPELINE_DEPTH,
            smallest_chunk=SMALLEST_CHUNK,
        )
        self._slots = [_Slot() for _ in range(max_batch_size)]
        self._open: collections.deque[_Open] = collections.deque()
        self._next_ticket = 0
        self._thread = 0
        self._loaded: _Loaded | None = None

    @property
    def info(self) -> ExecutorInfo:
        """The fixed shape."""
        return self._info

    @property
    def driver(self) -> Driver:
        """Of the device that the engine is loaded on."""
        return self._device_state.driver

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
                "pinned": state.pinned.bytes,
            }
        )

    def bind(self, slot: int, sampling: SamplingParams, history: NDArray[np.int32]) -> None:
        """Give the slot to a new request."""
        state = self._device_state
        self._attach()
        self._sampler.bind(slot, sampling, history)
        own = self._slots[slot]
        adjusting = self._shape.max_seq_len <= HISTORY
        own.index, own.token, own.behind = 0, None, False
        own.on_device = chooses_on_device(sampling, adjusting=adjusting)
        own.adjusted = own.on_device and adjusts(sampling)
        state.sampling[slot] = sampling_state(sampling, adjusting=adjusting)
        self._upload("sampling", state.sampling[slot : slot + 1], at=slot)
        if own.adjusted:
            state.adjustments[slot] = adjustments_state(state.lowering.adjustments, sampling, history)
            self._upload("adjustments", state.adjustments[slot : slot + 1], at=slot)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the KV of the first `length` tokens from one slot to another."""
        if source == target or not length:
            return
        state = self._device_state
        self._attach()
        shape = state.lowering.attention
        base = state.memory.at("kv_cache")
        for layer in range(self._spec.num_hidden_layers):
            cache = state.lowering.cache(layer)
            for at, row in (
                (cache.keys, shape.row_bytes),
                (cache.values, shape.row_bytes),
                (cache.key_scales, 2),
                (cache.value_scales, 2),
            ):
                if at is not None:
                    head = shape.max_seq * row
                    slot = shape.kv_heads * head
                    state.driver.copy_rows(
                        base + at.offset + source * slot,
                        base + at.offset + target * slot,
                        pitch=head,
                        width=length * row,
                        rows=shape.kv_heads,
                        stream=state.stream,
                    )
        self._slots[target].held = length

    def submit(self, step: Step) -> Ticket:
        """Send the step to the device."""
        state = self._device_state
        self._attach()
        assert len(self._open) < PIPELINE_DEPTH, "too many steps are open"
        self._check(step)
        singles = [row for row in step.rows if len(row.tokens) == 1]
        prompts = [row for row in step.rows if len(row.tokens) > 1]
        for row in singles:
            if isinstance(row.tokens, Feedback) and self._waits_for_host(row.slot):
                # The token is not known before the step in front of this one has been sampled.
                for flight in self._open:
                    self._resolve(flight)
                break

        self._next_ticket += 1
        buffers, event = state.ring[self._next_ticket % PIPELINE_DEPTH]
        wanted = [row for row in step.rows if row.want is not Want.NONE]
        by_host = [self._needs_host(row, step) for row in wanted]
        host = {row.slot for row, is_host in zip(wanted, by_host, strict=True) if is_host}
        for row in wanted:
            own = self._slots[row.slot]
            if own.behind and row.slot not in host:
                state.sampling[row.slot]["index"] = own.index
                self._upload("sampling", state.sampling[row.slot : row.slot + 1], at=row.slot)
                own.behind = False
        started = time.monotonic()
        for number in range(0, len(singles), MOST_ROWS):
            self._decode(singles[number : number + MOST_ROWS], number, buffers, host)
        longest = max(state.prefill)
        places = {row.slot: number for number, row in enumerate(singles)}
        for number, piece in enumerate(pieces_of(prompts, longest)):
            wants = piece.last and piece.row.want is not Want.NONE
            raw = buffers.piece(number, piece, WANTS_TOKEN if wants and piece.row.slot not in host else 0)
            graph = state.prefill[_bucket(state.prefill, piece.end - piece.begin)]
            self._upload("chunk", raw)
            state.driver.call("cuGraphLaunch", graph.handle, state.stream)
            if wants:
                first = places[piece.row.slot] = len(places)
                self._download(graph, first, 1, buffers, (0,) if piece.row.slot in host else ())
        state.driver.call("cuEventRecord", event, state.stream)
        for row in step.rows:
            own = self._slots[row.slot]
            own.held = row.past + len(row.tokens)
            if row.want is not Want.NONE:
                own.index += 1
                own.token = None
                own.behind = own.behind or row.slot in host
                own.on_device = own.on_device and not (own.adjusted and row.slot in host)
        at = [places[row.slot] for row in wanted]
        self._open.append(_Open(self._next_ticket, buffers, wanted, by_host, at, step.mask, event, started))
        return self._next_ticket

    def collect(self, ticket: Ticket) -> Result:
        """Wait for the step's result."""
        assert self._open and self._open[0].ticket == ticket, f"step {ticket} is not the next one"
        self._attach()
        flight = self._open[0]
        self._resolve(flight)
        self._open.popleft()
        assert flight.result is not None
        return flight.result

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

    def close(self) -> None:
        """Give the memory back; idempotent."""
        state, self._loaded = self._loaded, None
        self._open.clear()
        if state is None:
            return
        try:
            state.driver.attach()
            state.driver.call("cuStreamSynchronize", state.stream)
            for graph in (*state.decode.values(), *state.prefill.values()):
                state.driver.call("cuGraphExecDestroy", graph.handle)
            for _, event in state.ring:
                state.driver.call("cuEventDestroy", event)
            state.pinned.close()
            state.memory.close()
        except ExecutorFault:
            pass  # a lost device frees nothing; the process is about to end
        state.driver.close()

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
        sizes = (shape, spec.vocab_size, longest)
        table = rope_table(
            Rotary(np.array(network.rotary), network.rotary_length), lowering.attention.max_seq
        )
        pinned = Pinned(
            driver,
            PIPELINE_DEPTH * StepBuffers.size(*sizes)
            + pinned_size((shape.max_batch_size,), SAMPLING)
            + pinned_size((shape.max_batch_size,), lowering.adjustments.dtype),
        )
        adjustments = pinned.take((shape.max_batch_size,), lowering.adjustments.dtype)
        ring = [(StepBuffers(pinned, *sizes), driver.event()) for _ in range(PIPELINE_DEPTH)]
        staged = pinned.take((shape.max_batch_size,), SAMPLING)
        memory.clear(stream, keep=("weights",))
        driver.call("cuMemcpyHtoD", memory.at("rope"), table.ctypes.data, table.nbytes)
        load_weights(driver, stream, weights, memory.at("weights"), lambda done: progress("weights", done))
        self._sampler = Sampler(shape.max_batch_size, spec.vocab_size, max_seq_len=shape.max_seq_len)

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
        self._loaded = _Loaded(
            driver, stream, memory, pinned, lowering, graphs[0], graphs[1], ring, staged, adjustments
        )
        self._warm_up(progress)

    def _warm_up(self, progress: Progress) -> None:
        """Run every graph once, at the ends of slots: what is loaded or allocated lazily, is then."""
        shape = self._shape
        greedy = SamplingParams(temperature=0.0)
        nothing = np.zeros(0, np.int32)
        for slot in range(shape.max_batch_size):
            self.bind(slot, greedy, nothing)
        rounds = [*self._device_state.decode, *self._device_state.prefill]
        for number, size in enumerate(rounds):
            progress("warm_up", number / len(rounds))
            if number < len(self._device_state.decode):
                count, rows = min(size, shape.max_batch_size), 1
            else:
                count, rows = 1, min(size, shape.max_num_tokens, shape.max_seq_len)
            past = shape.max_seq_len - rows
            for slot in range(count):
                self._slots[slot].held = past
            step = Step([Row(slot, past, np.zeros(rows, np.int32), Want.TOKEN) for slot in range(count)])
            try:
                self.collect(self.submit(step))
            except ExecutorFault as error:
                if isinstance(error, DeviceLost):
                    raise
                # Random or zero weights may give what cannot be sampled; it is memory that counts here.
        state = self._device_state
        state.memory.clear(state.stream, keep=("weights", "rope", *_COUNTERS))
        state.driver.call("cuStreamSynchronize", state.stream)
        for own in self._slots:
            own.held = own.index = 0

    # Steps.

    @property
    def _device_state(self) -> _Loaded:
        assert self._loaded is not None, "not loaded"
        return self._loaded

    def _attach(self) -> None:
        """A context is current on one thread; the daemon loads on another one than it runs on."""
        here = threading.get_ident()
        if here != self._thread:
            self._device_state.driver.attach()
            self._thread = here

    def _decode(
        self,
        rows: Sequence[Row],
        first: int,
        buffers: StepBuffers,
        host: set[int],
    ) -> None:
        """Launch rows of one token each, the step's from the `first` on, and send back what is wanted."""
        state = self._device_state
        bucket = _bucket(state.decode, len(rows))
        staged = buffers.rows[first // MOST_ROWS, :bucket]
        staged["slot"][len(rows) :] = NOBODY
        for number, row in enumerate(rows):
            if isinstance(row.tokens, Feedback):
                token = self._slots[row.slot].token
                token = SAMPLED_LAST if token is None else token
            else:
                token = int(row.tokens[0])
            wants = row.want is not Want.NONE and row.slot not in host
            staged[number] = (row.slot, row.past, token, WANTS_TOKEN if wants else 0)
        self._upload("rows", staged)
        graph = state.decode[bucket]
        state.driver.call("cuGraphLaunch", graph.handle, state.stream)
        hosted = [number for number, row in enumerate(rows) if row.slot in host]
        if any(row.want is not Want.NONE for row in rows):
            self._download(graph, first, len(rows), buffers, hosted)

    def _upload(self, name: str, array: NDArray[Any], *, at: int = 0) -> None:
        """Send an array to a lasting buffer, to the place of the `at`-th like it."""
        state = self._device_state
        target = state.memory.at(name) + at * array.nbytes
        state.driver.call("cuMemcpyHtoDAsync", target, array.ctypes.data, array.nbytes, state.stream)

    def _download(
        self, graph: _Graph, first: int, count: int, buffers: StepBuffers, hosted: Sequence[int]
    ) -> None:
        """Send back the results of a launch's first `count` rows, and the logits that the host samples from.

        Args:
            first: where in the buffers they come to lie.
        """
        state = self._device_state
        if len(hosted) < count:
            size = SAMPLED.itemsize
            target, source = buffers.results.ctypes.data + first * size, state.memory.at("results")
            state.driver.call("cuMemcpyDtoHAsync", target, source, count * size, state.stream)
        for number in hosted:
            row = buffers.logits[first + number]
            source = graph.logits + number * row.nbytes
            state.driver.call("cuMemcpyDtoHAsync", row.ctypes.data, source, row.nbytes, state.stream)

    def _needs_host(self, row: Row, step: Step) -> bool:
        return row.want is Want.LOGITS or step.mask is not None or not self._slots[row.slot].on_device

    def _waits_for_host(self, slot: int) -> bool:
        return any(
            flight.result is None and is_host and row.slot == slot
            for flight in self._open
            for row, is_host in zip(flight.wanted, flight.by_host, strict=True)
        )

    def _resolve(self, flight: _Open) -> None:
        """Wait for a step and make its result."""
        if flight.result is not None:
            return
        self._wait(flight)
        buffers, wanted = flight.buffers, flight.wanted
        results = buffers.results[flight.at]
        token = results["token"].copy()
        sampled: Sampled | None = None
        hosted = [number for number, is_host in enumerate(flight.by_host) if is_host]
        bad = [
            row.slot
            for row, is_host, status in zip(wanted, flight.by_host, results["status"].tolist(), strict=True)
            if not is_host and status != CHOSEN
        ]
        if bad:
            raise ExecutorFault(f"the logits of slot {bad[0]} are not finite")
        if hosted:
            mask = None if flight.mask is None else flight.mask[hosted]
            slots = [wanted[number].slot for number in hosted]
            sampled = self._sampler.sample(
                slots, buffers.logits[[flight.at[number] for number in hosted]], mask
            )
            token[hosted] = sampled.token
            for slot, chosen in zip(slots, sampled.token.tolist(), strict=True):
                self._slots[slot].token = chosen
        for row, is_host, chosen in zip(wanted, flight.by_host, token.tolist(), strict=True):
            if not is_host:
                self._sampler.record(row.slot, chosen)
        flight.result = self._result(flight, token, hosted, sampled)

    def _result(
        self, flight: _Open, token: NDArray[np.int32], hosted: list[int], sampled: Sampled | None
    ) -> Result:
        count = len(flight.wanted)
        width = 0 if sampled is None else sampled.top_ids.shape[1]
        logprob = flight.buffers.results["logprob"][flight.at]
        top_ids = np.full((count, width), -1, np.int32)
        top_logprobs = np.full((count, width), np.nan, np.float32)
        logits = None
        if sampled is not None:
            logprob[hosted] = sampled.logprob
            top_ids[hosted] = sampled.top_ids
            top_logprobs[hosted] = sampled.top_logprobs
        if any(row.want is Want.LOGITS for row in flight.wanted):
            logits = np.zeros((count, self._spec.vocab_size), np.float32)
            for number, row in enumerate(flight.wanted):
                if row.want is Want.LOGITS:
                    logits[number] = flight.buffers.logits[flight.at[number]]
        return Result(token, logprob, top_ids, top_logprobs, logits)

    def _wait(self, flight: _Open) -> None:
        """Sleep until the step is back, without keeping a core busy.

        Raises:
            DeviceLost: the device failed, or the step hangs.
        """
        driver, begun = self._device_state.driver, time.monotonic()
        while not driver.done(flight.event):
            now = time.monotonic()
            if now - flight.started > self._step_limit_s:
                raise DeviceLost(f"a step has not ended after {self._step_limit_s:.0f} s; the device hangs")
            time.sleep(min(max(_NAP_S, (now - begun) * _NAP_SHARE), _LONGEST_NAP_S))

    def _check(self, step: Step) -> None:
        """The scheduler keeps to these; what a client sends never gets here unchecked."""
        info = self._info
        assert step.rows, "a step without rows"
        assert len({row.slot for row in step.rows}) == len(step.rows), "a slot appears twice in a step"
        total = sum(len(row.tokens) for row in step.rows)
        assert total <= info.max_num_tokens, (
            f"{total} tokens in a step; max_num_tokens is {info.max_num_tokens}"
        )
        for row in step.rows:
            assert 0 <= row.slot < info.max_batch_size, f"slot {row.slot} of {info.max_batch_size}"
            held = self._slots[row.slot].held
            assert 0 <= row.past <= held, f"slot {row.slot} holds {held} tokens, not {row.past}"
            count = len(row.tokens)
            assert 0 < count <= info.max_seq_len - row.past, (
                f"slot {row.slot} cannot take {count} more tokens"
            )
            if not isinstance(row.tokens, Feedback):
                low, high = int(row.tokens.min()), int(row.tokens.max())
                assert low >= 0 and high < info.vocab_size, f"slot {row.slot} is fed ids {low} … {high}"


_COUNTERS: Final = ("linear_workspace", "prefill_workspace", "attention_workspace", "sample_workspace")
"""Buffers that launches leave as they must be."""


def _bucket(graphs: dict[int, _Graph], count: int) -> int:
    """The smallest that holds as many."""
    return min(size for size in graphs if size >= count)

"""What the executors on a device have in common: steps in flight, sampled tokens fed back, rows for the host.

Two steps may be in flight. A sampled token stays on the device and feeds the next step there; the host learns
it when it collects, so what Python does costs the device no time. Rows that only the host's sampler can serve
(a mask, log-probabilities of others) wait for it: a step that feeds such a token back is not sent before.

How rows and pieces of prompts become logits and tokens on the device is a subclass's: CUDA kernels, or a
TensorRT plan. All memory is allocated in `load`; a step allocates nothing.
"""

from __future__ import annotations

import abc
import collections
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.cuda.driver import Driver
from edgellm.errors import DeviceLost, ExecutorFault
from edgellm.executor.base import (
    NO_TOKEN,
    ExecutorInfo,
    Feedback,
    MemoryReport,
    Progress,
    Result,
    Row,
    Step,
    Ticket,
    Want,
    check_step,
)
from edgellm.executor.buckets import HISTORY, MOST_ROWS
from edgellm.executor.cuda_steps import NOBODY, SAMPLED_LAST, Piece, StepBuffers, pieces_of
from edgellm.executor.device_state import PIPELINE_DEPTH, DeviceState, OpenStep, SlotState
from edgellm.executor.sampler import Sampled, Sampler
from edgellm.kernels.adjust import AdjustmentsShape, adjustments_state, adjusts
from edgellm.kernels.rows import WANTS_TOKEN
from edgellm.kernels.sample import CHOSEN, NOTHING_LEFT, SAMPLED, chooses_on_device, sampling_state
from edgellm.memory.plan import Shape
from edgellm.model.spec import ModelSpec
from edgellm.sampling import SamplingParams

STEP_LIMIT_S: Final = 30.0
"""No step takes a hundredth of it."""
_NAP_S: Final = 50e-6
_LONGEST_NAP_S: Final = 1e-3
_NAP_SHARE: Final = 0.1
"""Between two looks at a step: a tenth of what it was waited for, so that it is not noticed late by more."""


class DeviceExecutor(abc.ABC):
    """See `executor.base.Executor` for the public methods.

    Args:
        info: the fixed shape.
        spec: the model's numbers.
        step_limit_s: a step that takes longer hangs.
        open_driver: opens the device.
    """

    def __init__(
        self,
        info: ExecutorInfo,
        spec: ModelSpec,
        *,
        step_limit_s: float = STEP_LIMIT_S,
        open_driver: Callable[[], Driver] = Driver,
    ) -> None:
        self._info = info
        self._spec = spec
        self._shape = Shape(info.max_batch_size, info.max_seq_len, info.max_num_tokens)
        self._adjustments = AdjustmentsShape(spec.vocab_size, HISTORY)
        self._step_limit_s = step_limit_s
        self._open_driver = open_driver
        self._sampler = Sampler(info.max_batch_size, spec.vocab_size, max_seq_len=info.max_seq_len)
        self._slots = [SlotState() for _ in range(info.max_batch_size)]
        self._open: collections.deque[OpenStep] = collections.deque()
        self._next_ticket = 0
        self._thread = 0
        self._loaded: DeviceState | None = None

    @property
    def info(self) -> ExecutorInfo:
        """The fixed shape."""
        return self._info

    @property
    def driver(self) -> Driver:
        """Of the device that the engine is loaded on."""
        return self._device_state.driver

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
        state.host.sampling[slot] = sampling_state(sampling, adjusting=adjusting)
        self._upload("sampling", state.host.sampling[slot : slot + 1], at=slot)
        if own.adjusted:
            state.host.adjustments[slot] = adjustments_state(self._adjustments, sampling, history)
            self._upload("adjustments", state.host.adjustments[slot : slot + 1], at=slot)

    def submit(self, step: Step) -> Ticket:
        """Send the step to the device."""
        state = self._device_state
        self._attach()
        assert len(self._open) < PIPELINE_DEPTH, "too many steps are open"
        check_step(step, self._info, lambda slot: self._slots[slot].held)
        singles = self._arrange([row for row in step.rows if len(row.tokens) == 1])
        prompts = [row for row in step.rows if len(row.tokens) > 1]
        for row in singles:
            if isinstance(row.tokens, Feedback) and self._waits_for_host(row.slot):
                # The token is not known before the step in front of this one has been sampled.
                for flight in self._open:
                    self._resolve(flight)
                break

        self._next_ticket += 1
        buffers, event = state.host.ring[self._next_ticket % PIPELINE_DEPTH]
        wanted = [row for row in step.rows if row.want is not Want.NONE]
        by_host = [self._needs_host(row, step) for row in wanted]
        host = {row.slot for row, is_host in zip(wanted, by_host, strict=True) if is_host}
        for row in wanted:
            own = self._slots[row.slot]
            if own.behind and row.slot not in host:
                state.host.sampling[row.slot]["index"] = own.index
                self._upload("sampling", state.host.sampling[row.slot : row.slot + 1], at=row.slot)
                own.behind = False
        started = time.monotonic()
        for number in range(0, len(singles), MOST_ROWS):
            self._decode(singles[number : number + MOST_ROWS], number, buffers, host)
        places = {row.slot: number for number, row in enumerate(singles)}
        for number, piece in enumerate(pieces_of(prompts, self._longest_piece)):
            wants = piece.last and piece.row.want is not Want.NONE
            raw = buffers.piece(number, piece, WANTS_TOKEN if wants and piece.row.slot not in host else 0)
            self._upload("chunk", raw)
            logits = self._run_piece(piece)
            if wants:
                first = places[piece.row.slot] = len(places)
                self._download(logits, first, 1, buffers, (0,) if piece.row.slot in host else ())
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
        self._open.append(
            OpenStep(self._next_ticket, buffers, wanted, by_host, at, step.mask, event, started)
        )
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

    def close(self) -> None:
        """Give the memory back; idempotent."""
        state, self._loaded = self._loaded, None
        self._open.clear()
        if state is None:
            return
        try:
            state.driver.attach()
            state.driver.call("cuStreamSynchronize", state.stream)
            self._free(state)
            state.host.close()
            state.memory.close()
        except ExecutorFault:
            pass  # a lost device frees nothing; the process is about to end
        state.driver.close()

    # What a subclass does.

    @abc.abstractmethod
    def load(self, progress: Progress) -> MemoryReport:
        """Sets `_loaded`; see `executor.base.Executor`."""

    @abc.abstractmethod
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `executor.base.Executor`."""

    def _arrange(self, rows: list[Row]) -> list[Row]:
        """The order in which rows of one token are computed: MOST_ROWS in a run, the rest in the next."""
        return rows

    @abc.abstractmethod
    def _rows_of_run(self, count: int) -> int:
        """Rows of the run that takes `count`; those beyond are nobody's."""

    @abc.abstractmethod
    def _run_rows(self, first: int, count: int) -> int:
        """Compute rows `first`, … of those arranged, which lie in `rows`; gives where their logits will be.

        Rows that want a token have it sampled from them, into `results` and for the slot's next row.
        """

    @property
    @abc.abstractmethod
    def _longest_piece(self) -> int:
        """Most tokens of a prompt in a run."""

    @abc.abstractmethod
    def _run_piece(self, piece: Piece) -> int:
        """Compute a piece of a prompt, which lies in `chunk`, as `_run_rows` does its rows."""

    @abc.abstractmethod
    def _free(self, state: DeviceState) -> None:
        """Give back what is neither in the device's nor in page-locked memory."""

    # Steps.

    @property
    def _device_state(self) -> DeviceState:
        assert self._loaded is not None, "not loaded"
        return self._loaded

    def _warm_up(self, rows: Iterable[int], tokens: Iterable[int], progress: Progress) -> None:
        """Compute steps of so many rows, then prompts of so many tokens, at the ends of slots.

        What is loaded or allocated lazily, is then. Caches hold anything afterwards.
        """
        shape = self._shape
        greedy = SamplingParams(temperature=0.0)
        nothing = np.zeros(0, np.int32)
        for slot in range(shape.max_batch_size):
            self.bind(slot, greedy, nothing)
        rounds = [(min(count, shape.max_batch_size), 1) for count in rows]
        rounds += [(1, min(count, shape.max_num_tokens, shape.max_seq_len)) for count in tokens]
        for number, (count, length) in enumerate(rounds):
            progress("warm_up", number / len(rounds))
            past = shape.max_seq_len - length
            for slot in range(count):
                self._slots[slot].held = past
            fed = np.zeros(length, np.int32)
            step = Step([Row(slot, past, fed, Want.TOKEN) for slot in range(count)])
            try:
                self.collect(self.submit(step))
            except ExecutorFault as error:
                if isinstance(error, DeviceLost):
                    raise
                # Random or zero weights may give what cannot be sampled; it is memory that counts here.
        for own in self._slots:
            own.held = own.index = 0

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
        staged = buffers.rows[first // MOST_ROWS, : self._rows_of_run(len(rows))]
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
        logits = self._run_rows(first, len(rows))
        hosted = [number for number, row in enumerate(rows) if row.slot in host]
        if any(row.want is not Want.NONE for row in rows):
            self._download(logits, first, len(rows), buffers, hosted)

    def _upload(self, name: str, array: NDArray[Any], *, at: int = 0) -> None:
        """Send an array to a lasting buffer, to the place of the `at`-th like it."""
        state = self._device_state
        target = state.memory.at(name) + at * array.nbytes
        state.driver.call("cuMemcpyHtoDAsync", target, array.ctypes.data, array.nbytes, state.stream)

    def _download(
        self, logits: int, first: int, count: int, buffers: StepBuffers, hosted: Sequence[int]
    ) -> None:
        """Send back the results of a launch's first `count` rows, and the logits that the host samples from.

        Args:
            logits: where those of the first row lie.
            first: where in the buffers they come to lie.
        """
        state = self._device_state
        if len(hosted) < count:
            size = SAMPLED.itemsize
            target, source = buffers.results.ctypes.data + first * size, state.memory.at("results")
            state.driver.call("cuMemcpyDtoHAsync", target, source, count * size, state.stream)
        for number in hosted:
            row = buffers.logits[first + number]
            source = logits + number * row.nbytes
            state.driver.call("cuMemcpyDtoHAsync", row.ctypes.data, source, row.nbytes, state.stream)

    def _needs_host(self, row: Row, step: Step) -> bool:
        return row.want is Want.LOGITS or step.mask is not None or not self._slots[row.slot].on_device

    def _waits_for_host(self, slot: int) -> bool:
        return any(
            flight.result is None and is_host and row.slot == slot
            for flight in self._open
            for row, is_host in zip(flight.wanted, flight.by_host, strict=True)
        )

    def _resolve(self, flight: OpenStep) -> None:
        """Wait for a step and make its result."""
        if flight.result is not None:
            return
        self._wait(flight)
        buffers, wanted = flight.buffers, flight.wanted
        results = buffers.results[flight.at]
        # Where the device has found nothing to choose, it says NO_TOKEN.
        token = results["token"].copy()
        sampled: Sampled | None = None
        hosted = [number for number, is_host in enumerate(flight.by_host) if is_host]
        bad = [
            row.slot
            for row, is_host, status in zip(wanted, flight.by_host, results["status"].tolist(), strict=True)
            if not is_host and status not in (CHOSEN, NOTHING_LEFT)
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
                # The step behind this one may feed it back before anyone has seen that there is none.
                self._slots[slot].token = 0 if chosen == NO_TOKEN else chosen
        for row, is_host, chosen in zip(wanted, flight.by_host, token.tolist(), strict=True):
            if not is_host and chosen != NO_TOKEN:
                self._sampler.record(row.slot, chosen)
        flight.result = self._result(flight, token, hosted, sampled)

    def _result(
        self, flight: OpenStep, token: NDArray[np.int32], hosted: list[int], sampled: Sampled | None
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

    def _wait(self, flight: OpenStep) -> None:
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

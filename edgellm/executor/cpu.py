"""The CPU executor: ONNX Runtime over static KV memory.

A step becomes one run for all rows that feed one token, which are brought into contiguous memory first, and
runs of up to CHUNK tokens for each row that feeds more. (ONNX Runtime 1.23.2 cannot mix them in one run, and
later ones would compute every row as long as the longest.) Past and present are the same memory, bound once.

All memory is allocated in `load`; a step allocates nothing that stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

from edgellm.errors import ExecutorFault
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
    check_step,
)
from edgellm.executor.file_pages import drop_mapped_pages
from edgellm.executor.huge_pages import use_huge_pages
from edgellm.executor.kv_rows import KvRows
from edgellm.executor.sampler import Sampler
from edgellm.model.kv_cache import KV_DTYPES, KvCache
from edgellm.model.spec import ModelSpec
from edgellm.sampling import SamplingParams

MODEL_FILE: Final = "model.onnx"
CHUNK: Final = 128
"""Most tokens of one run: bounds the activations' memory; longer runs are no faster per token."""
SMALLEST_CHUNK: Final = 2
"""ONNX Runtime's kernels for one token sum in another order than those for several, which all agree."""

Array = NDArray[Any]
T = TypeVar("T")


class CpuExecutor:
    """Runs an engine directory's `model.onnx`; see `executor.base.Executor` for the methods.

    Args:
        directory: the engine directory.
        spec: its model's numbers.
        max_batch_size: slots.
        max_seq_len: tokens per slot; at most what the engine was built for.
        max_num_tokens: tokens that a step may feed.
        threads: ONNX Runtime's, the calling one included.
        kv_cache: what the engine was built with.
    """

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        *,
        max_batch_size: int,
        max_seq_len: int,
        max_num_tokens: int,
        threads: int,
        kv_cache: KvCache = "fp32",
    ) -> None:
        self._directory = directory
        self._spec = spec
        self._threads = threads
        self._kv_dtype = KV_DTYPES[kv_cache]
        self._chunk = min(CHUNK, max_num_tokens, max_seq_len)
        self._info = ExecutorInfo(
            name="cpu",
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            vocab_size=spec.vocab_size,
            kv_bytes_per_token=spec.kv_elements_per_token() * np.dtype(self._kv_dtype).itemsize,
            smallest_chunk=SMALLEST_CHUNK,
        )
        self._open: tuple[Ticket, Result] | None = None
        self._next_ticket = 0
        self._session: ort.InferenceSession | None = None
        self._runs: dict[tuple[int, int], _Run] = {}

    @property
    def info(self) -> ExecutorInfo:
        """The fixed shape."""
        return self._info

    def load(self, progress: Progress) -> MemoryReport:
        """Read the weights, allocate the caches, run every kind of step once.

        Raises:
            ExecutorFault: ONNX Runtime cannot load the model, or memory ran out.
        """
        assert self._session is None, "loaded already"
        info = self._info
        meter = _Meter()
        progress("weights", 0.0)
        path = self._directory / MODEL_FILE
        # The kernel takes as long to hand out the caches' pages as the library to pack the weights.
        with ThreadPoolExecutor(1, "kv_cache") as pool:
            caches = pool.submit(self._allocate_caches)
            self._session = _guard("load the model", lambda: _open_session(path, self._threads))
            self._require_kv_dtype(self._session)
            use_huge_pages()
            drop_mapped_pages(path.with_name(MODEL_FILE + ".data"))
            progress("kv_cache", 0.0)
            self._kv = _guard("allocate the KV cache", caches.result)
        meter.read("weights")
        meter.move("weights", "kv_cache", self._kv.nbytes)

        # Zeroed by writing, so that the pages are there.
        self._logits = np.full((info.max_batch_size, info.vocab_size), 0, np.float32)
        self._scratch = np.full((1, info.vocab_size), 0, np.float32)
        self._sampler = Sampler(info.max_batch_size, info.vocab_size, max_seq_len=info.max_seq_len)
        meter.read("sampling")

        self._warm_up(progress)
        meter.read("activations")
        progress("ready", 1.0)
        return MemoryReport(meter.lines)

    def _allocate_caches(self) -> KvRows:
        return KvRows(
            layers=self._spec.num_hidden_layers,
            rows=self._info.max_batch_size,
            kv_heads=self._spec.num_key_value_heads,
            max_seq_len=self._info.max_seq_len,
            head_size=self._spec.head_size,
            dtype=self._kv_dtype,
        )

    def bind(self, slot: int, sampling: SamplingParams, history: NDArray[np.int32]) -> None:
        """Give the slot to a new request."""
        self._sampler.bind(slot, sampling, history)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the KV of the first `length` tokens from one slot to another."""
        self._kv.copy_prefix(source, target, length)

    def submit(self, step: Step) -> Ticket:
        """Run the step, now: there is no device that could work meanwhile."""
        assert self._open is None, "a step is open already"
        check_step(step, self._info, self._kv.held)
        computed = self._decode([row for row in step.rows if len(row.tokens) == 1])
        for row in step.rows:
            if not isinstance(row.tokens, Feedback) and len(row.tokens) > 1:
                computed += self._prefill(row, row.tokens, at=len(computed))
        self._next_ticket += 1
        self._open = (self._next_ticket, self._sample(step, computed))
        return self._next_ticket

    def collect(self, ticket: Ticket) -> Result:
        """The step's result."""
        assert self._open is not None and self._open[0] == ticket, f"step {ticket} is not open"
        result = self._open[1]
        self._open = None
        return result

    def close(self) -> None:
        """Give the memory back."""
        self._runs.clear()
        self._session = None
        self._open = None

    def _require_kv_dtype(self, session: ort.InferenceSession) -> None:
        built = {node.type for node in session.get_inputs() if node.name.startswith("past_key_values")}
        asked = {np.float32: "tensor(float)", np.float16: "tensor(float16)"}[self._kv_dtype]
        if built != {asked}:
            raise ExecutorFault(
                f"{self._directory} was built for KV caches of {', '.join(sorted(built))}, not of {asked}"
            )

    def _decode(self, rows: Sequence[Row]) -> list[int]:
        """Run all rows of one token together; gives the slots whose logits are now in `_logits`, in order."""
        if not rows:
            return []
        first = self._kv.gather([row.slot for row in rows])
        run = self._run(first, len(rows))
        wanted = [row.slot for row in rows if row.want is not Want.NONE]
        for row in rows:
            at = self._kv.row(row.slot) - first
            tokens = row.tokens
            run.ids[at] = self._sampler.last_token(row.slot) if isinstance(tokens, Feedback) else tokens[0]
            run.past[at] = row.past
            self._kv.set_held(row.slot, row.past + 1)
        positions = [self._kv.row(slot) - first for slot in wanted]
        # A run gives at least one row of logits, wanted or not.
        run(1, positions or [0], self._logits[: max(1, len(wanted))])
        return wanted

    def _prefill(self, row: Row, tokens: NDArray[np.int32], *, at: int) -> list[int]:
        """Run one row's tokens, chunk by chunk; its logits, if wanted, are row `at` of `_logits`."""
        run = self._run(self._kv.row(row.slot), 1)
        for start, end in _pieces(len(tokens), self._chunk):
            chunk = tokens[start:end]
            run.ids[: len(chunk)] = chunk
            run.past[0] = row.past + start
            run(
                len(chunk),
                [len(chunk) - 1],
                self._scratch if row.want is Want.NONE else self._logits[at : at + 1],
            )
        self._kv.set_held(row.slot, row.past + len(tokens))
        return [] if row.want is Want.NONE else [row.slot]

    def _sample(self, step: Step, computed: list[int]) -> Result:
        """Choose the tokens; `computed` are the slots whose logits lie in `_logits`, in that order."""
        wanted = [row for row in step.rows if row.want is not Want.NONE]
        slots = [row.slot for row in wanted]
        logits = self._logits[: len(slots)]
        if slots != computed:
            logits = logits[[computed.index(slot) for slot in slots]]
        sampled = self._sampler.sample(slots, logits, step.mask)
        shown = None
        if any(row.want is Want.LOGITS for row in wanted):
            shown = np.zeros_like(logits)
            for i, row in enumerate(wanted):
                if row.want is Want.LOGITS:
                    shown[i] = logits[i]
        return Result(sampled.token, sampled.logprob, sampled.top_ids, sampled.top_logprobs, shown)

    def _run(self, first: int, batch: int) -> _Run:
        """The run over rows first … first + batch − 1, made when first needed."""
        key = (first, batch)
        if key not in self._runs:
            assert self._session is not None, "not loaded"
            self._runs[key] = _Run(self._session, self._kv, first, batch, self._chunk)
        return self._runs[key]

    def _warm_up(self, progress: Progress) -> None:
        """Run the largest chunk and every decode batch at the ends of slots: nothing is larger later."""
        batches = range(1, self._info.max_batch_size + 1)
        prefill = self._run(0, 1)
        prefill.past[:] = self._info.max_seq_len - self._chunk
        prefill(self._chunk, [self._chunk - 1], self._scratch)
        for batch in batches:
            progress("warm_up", (batch - 1) / len(batches))
            decode = self._run(0, batch)
            decode.past[:] = self._info.max_seq_len - 1
            decode(1, list(range(batch)), self._logits[:batch])


def _pieces(count: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut `count` tokens into pieces, none longer than `longest` nor, of two or more, shorter than 2."""
    start = 0
    while start < count:
        end = min(start + longest, count)
        # Move one over rather than leave one alone: SMALLEST_CHUNK says why.
        if count - end == 1 and longest > SMALLEST_CHUNK:
            end -= 1
        yield start, end
        start = end


class _Run:
    """One session run over contiguous rows, with its inputs and caches bound once.

    Attributes:
        ids: int32 [tokens], row by row; what to feed.
        past: int32 [batch]: tokens in front of them.
    """

    def __init__(self, session: ort.InferenceSession, kv: KvRows, first: int, batch: int, chunk: int) -> None:
        self.ids = np.zeros(chunk if batch == 1 else batch, np.int32)
        self.past = np.zeros(batch, np.int32)
        self._batch = batch
        self._last = np.zeros(batch, np.int32)
        self._total = np.zeros((), np.int32)
        self._rows = np.zeros(batch, np.int64)
        self._session = session
        self._binding = session.io_binding()
        self._bound: tuple[int, int, int] | None = None
        self._bind_input("seqlens_k", self._last)
        self._bind_input("total_sequence_length", self._total)
        for i, tensor in enumerate(kv.tensors):
            rows = tensor[first : first + batch]
            name = f"{i // 2}.{'value' if i % 2 else 'key'}"
            self._bind_input(f"past_key_values.{name}", rows)
            self._bind_output(f"present.{name}", rows)

    def __call__(self, length: int, wanted: list[int], logits: NDArray[np.float32]) -> None:
        """Feed `length` tokens to each row.

        Args:
            length: S; `ids` holds batch · S tokens.
            wanted: which of the batch · S positions get logits.
            logits: float32 [len(wanted), vocab], filled.

        Raises:
            ExecutorFault: ONNX Runtime failed.
        """
        np.add(self.past, length - 1, out=self._last)
        self._total[...] = self._last.max() + 1
        self._rows[: len(wanted)] = wanted
        shape = (length, len(wanted), logits.ctypes.data)
        if shape != self._bound:
            self._bind_input("input_ids", self.ids[: self._batch * length].reshape(self._batch, length))
            self._bind_input("logits_rows", self._rows[: len(wanted)])
            self._bind_output("logits", logits)
            self._bound = shape
        _guard("run a step", lambda: self._session.run_with_iobinding(self._binding))

    def _bind_input(self, name: str, array: Array) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: Array) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class _Meter:
    """Resident memory, read off after each part of loading."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._process = psutil.Process()
        self._last = self._process.memory_info().rss

    def read(self, line: str) -> None:
        """Book what was added since the last reading."""
        now = self._process.memory_info().rss
        self.lines[line] = now - self._last
        self._last = now

    def move(self, line: str, target: str, size: int) -> None:
        """Book `size` bytes of a line under another one."""
        self.lines[line] -= size
        self.lines[target] = size


def _open_session(path: Path, threads: int) -> ort.InferenceSession:
    # Later versions' tiled attention saves memory that CHUNK bounds anyway, and is slower at these sizes: it
    # takes twice as long for a chunk of 128, and a third longer for eight rows of one token.
    os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    # Between the hundreds of kernels of a run threads wait spinning; between runs they sleep.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # On aarch64 Arm's kernels would quantize a whole row of activations with one scale, MLAS's own do so in
    # blocks: KL to float32 0.040 instead of 0.007 (docs/cpu.md). Versions that know no such entry ignore it.
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _guard(what: str, call: Callable[[], T]) -> T:
    """Call, turning whatever the library raises into an ExecutorFault."""
    try:
        return call()
    except Exception as error:
        raise ExecutorFault(f"ONNX Runtime could not {what}: {error}") from error

"""An executor that computes in float32 numpy: the reference where ONNX Runtime's network cannot be built.

It has no caches: a slot is the list of its tokens, and logits are those of the whole text. Texts that were
announced, and all that begin like them, are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.base import Checkpoint
from edgellm.executor.base import ExecutorInfo, Feedback, MemoryReport, Progress, Result, Step, Ticket, Want
from edgellm.model.decoder import build_decoder
from edgellm.model.numpy_graph import NumpyGraph
from edgellm.sampling import SamplingParams

Logits = NDArray[np.float32]


class NumpyExecutor:
    """See `executor.base.Executor`; for comparisons only, so LOGITS are all that a row may want."""

    def __init__(self, checkpoint: Checkpoint, info: ExecutorInfo) -> None:
        self.info = info
        self._checkpoint = checkpoint
        self._slots: list[list[int]] = [[] for _ in range(info.max_batch_size)]
        self._known: list[tuple[list[int], Logits]] = []
        self._result: Result | None = None

    def announce(self, texts: Sequence[NDArray[np.int32]]) -> None:
        """Compute these now, together where they are equally long."""
        lengths = {len(text) for text in texts}
        for length in lengths:
            batch = [text for text in texts if len(text) == length]
            logits = self._compute(np.stack(batch)).reshape(len(batch), length, -1)
            self._known += [(text.tolist(), logits[number]) for number, text in enumerate(batch)]

    def load(self, progress: Progress) -> MemoryReport:  # noqa: ARG002 - the contract's names
        """Nothing to load."""
        return MemoryReport({})

    def bind(self, slot: int, sampling: SamplingParams, history: NDArray[np.int32]) -> None:
        """Nothing is sampled."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy tokens."""
        self._slots[target] = self._slots[source][:length]

    def submit(self, step: Step) -> Ticket:
        """Compute the step, now."""
        rows = []
        for row in step.rows:
            assert not isinstance(row.tokens, Feedback), "nothing was sampled"
            text = [*self._slots[row.slot][: row.past], *row.tokens.tolist()]
            assert len(text) == row.past + len(row.tokens), f"slot {row.slot} does not hold {row.past} tokens"
            self._slots[row.slot] = text
            if row.want is not Want.NONE:
                rows.append(self._last(text))
        count = len(rows)
        nothing = np.full(count, np.nan, np.float32)
        empty = np.empty((count, 0), np.int32)
        logits = np.stack(rows) if rows else None
        token = np.zeros(count, np.int32) if logits is None else logits.argmax(axis=1).astype(np.int32)
        self._result = Result(token, nothing, empty, empty.astype(np.float32), logits)
        return 0

    def collect(self, ticket: Ticket) -> Result:  # noqa: ARG002
        """The step's result."""
        assert self._result is not None
        return self._result

    def close(self) -> None:
        """Nothing to give back."""

    def _last(self, text: list[int]) -> Logits:
        found = next((logits for known, logits in self._known if known[: len(text)] == text), None)
        if found is None:
            found = self._compute(np.array([text], np.int32))
            self._known.append((text, found))
        last: Logits = found[len(text) - 1]
        return last

    def _compute(self, tokens: NDArray[np.int32]) -> Logits:
        graph = NumpyGraph(self._checkpoint.spec, tokens)
        build_decoder(graph, self._checkpoint)
        assert graph.logits_of is not None
        return graph.logits_of.all()

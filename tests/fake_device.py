"""A device that computes: `FakeDriver` with memory that copies reach, and a model in the place of kernels.

Device memory is the host's. A graph is the list of its launches; when it runs, what its first and last
kernels were given says where rows, sampling state, logits and results lie, and a model of a few lines does
the rest: the logits of a slot depend on every token in its cache, so one that was lost or doubled shows.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
from fake_driver import FakeDriver
from numpy.typing import NDArray

from edgellm.executor.base import NO_TOKEN
from edgellm.executor.buckets import HISTORY
from edgellm.executor.sampler import Sampler
from edgellm.kernels.adjust import AdjustmentsShape
from edgellm.kernels.rows import CHUNK, ROW, WANTS_TOKEN
from edgellm.kernels.sample import ADJUSTED, CHOSEN, GREEDY, NOTHING_LEFT, SAMPLED, SAMPLING
from edgellm.sampling import SamplingParams

Logits = NDArray[np.float32]


def logits_of(text: list[int], vocab: int) -> Logits:
    """The model: float32 [vocab], noise of its own for each text."""
    seed = np.array([len(text), *text], np.uint32)
    return np.random.default_rng(seed).standard_normal(vocab).astype(np.float32) * 3


class FakeDevice(FakeDriver):
    """A device that runs the executor's graphs.

    Attributes:
        caches: slot → the tokens that its cache holds.
        strict: whether a slot must hold the tokens in front of those that are fed; not yet while loading.
    """

    def __init__(self, vocab: int, slots: int, **options: Any) -> None:
        super().__init__(**options)
        self.caches: list[list[int]] = [[] for _ in range(slots)]
        self.strict = False
        self._vocab = vocab
        self._slots = slots
        self._chosen: list[list[int]] = [[] for _ in range(slots)]
        self._adjustments_at = 0
        self._names: dict[int, str] = {}
        self._capturing: list[tuple[str, Any, tuple[Any, ...]]] | None = None
        self._graphs: dict[int, list[tuple[str, Any, tuple[Any, ...]]]] = {}

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        results = super()._results(name, arguments)
        match name:
            case "cuModuleGetFunction":
                self._names[results[0]] = arguments[1].decode()
            case "cuMemcpyHtoDAsync" | "cuMemcpyDtoHAsync" | "cuMemcpyHtoD":
                ctypes.memmove(*arguments[:3])
            case "cuMemsetD8Async":
                ctypes.memset(*arguments[:3])
            case "cuStreamBeginCapture":
                self._capturing = []
            case "cuLaunchKernelEx":
                assert self._capturing is not None, "nothing is launched but graphs"
                config, function, (values, _), _ = arguments
                self._capturing.append((self._names[function], config, values))
            case "cuStreamEndCapture":
                assert self._capturing is not None
                self._graphs[results[0]], self._capturing = self._capturing, None
            case "cuGraphInstantiate" | "cuGraphInstantiateWithFlags":
                self._graphs[results[0]] = self._graphs[arguments[0]]
            case "cuGraphLaunch":
                self._run(self._graphs[arguments[0]])
        return results

    def _run(self, launches: list[tuple[str, Any, tuple[Any, ...]]]) -> None:
        first, (_, _, chosen) = launches[0], launches[-1]
        _, sampling_at, self._adjustments_at, logits_at, _, _, last_at, results_at = chosen
        last = _array(last_at, self._slots, np.int32)
        if re.search("embed_rows", first[0]):
            rows = _array(first[2][0], first[1].gridDimX, ROW)
            for number, row in enumerate(rows):
                if row["slot"] >= 0:
                    token = int(row["token"])
                    tokens = [int(last[row["slot"]]) if token < 0 else token]
                    self._row(row, tokens, number, last, (sampling_at, logits_at, results_at))
        else:
            assert re.search("embed_chunk", first[0])
            header = _array(first[2][0], 1, CHUNK)[0]
            tokens = _array(first[2][1], int(header["count"]), np.int32).tolist()
            assert len(tokens) <= first[1].gridDimY
            self._row(header, tokens, 0, last, (sampling_at, logits_at, results_at))

    def _row(
        self, row: Any, tokens: list[int], number: int, last: NDArray[np.int32], places: tuple[int, int, int]
    ) -> None:
        slot, past = int(row["slot"]), int(row["past"])
        held = self.caches[slot]
        if not self.strict:
            held = [*held, *[0] * past]
        assert past <= len(held), "tokens in front of these are missing"
        text = self.caches[slot] = [*held[:past], *tokens]
        logits = logits_of(text, self._vocab)
        _array(places[1] + number * self._vocab * 4, self._vocab, np.float32)[:] = logits
        self._choose(row, logits, number, last, places)

    def _choose(
        self,
        row: Any,
        logits: Logits,
        number: int,
        last: NDArray[np.int32],
        places: tuple[int, int, int],
    ) -> None:
        """Sample a row's token, if it wants one; `places` are sampling state, logits and results."""
        slot = int(row["slot"])
        if not row["flags"] & WANTS_TOKEN:
            return
        state = _array(places[0], self._slots, SAMPLING)[slot]
        result = _array(places[2], number + 1, SAMPLED)[number]
        if not state["index"]:
            self._chosen[slot] = []
        changes = None
        if state["flags"] & ADJUSTED:
            shape = AdjustmentsShape(self._vocab, HISTORY)
            changes = _array(self._adjustments_at, self._slots, shape.dtype)[slot]
        token = _sampled(state, logits, changes, self._chosen[slot])
        if token == NO_TOKEN:
            result["token"], result["status"], result["logprob"] = token, NOTHING_LEFT, np.nan
            return
        self._chosen[slot].append(token)
        last[slot] = token
        result["token"], result["status"], result["logprob"] = token, CHOSEN, np.nan
        state["index"] += 1


def _sampled(state: Any, logits: Logits, changes: Any, chosen: list[int]) -> int:
    """What the host's sampler chooses with a device's state, behind the tokens `chosen` before."""
    greedy = bool(state["flags"] & GREEDY)
    adjusted: dict[str, Any] = {}
    history = np.zeros(0, np.int32)
    if changes is not None:
        biases, suppressed = int(changes["biases"]), int(changes["suppressed"])
        adjusted = {
            "repetition_penalty": float(changes["repetition"]),
            "presence_penalty": float(changes["presence"]),
            "frequency_penalty": float(changes["frequency"]),
            "logit_bias": dict(
                zip(changes["bias_ids"][:biases].tolist(), changes["bias"].tolist(), strict=False)
            ),
            "min_tokens": int(changes["min_tokens"]),
            "suppressed": tuple(changes["suppressed_ids"][:suppressed].tolist()),
        }
        history = changes["history"]["id"][: int(changes["seen"])].copy()
    params = SamplingParams(
        temperature=0.0 if greedy else float(1 / state["inverse_temperature"]),
        top_k=int(state["top_k"]),
        top_p=float(state["top_p"]),
        min_p=float(state["min_p"]),
        seed=int(state["seed_low"]) | int(state["seed_high"]) << 32,
        **adjusted,
    )
    sampler = Sampler(1, len(logits))
    sampler.bind(0, params, history)
    assert int(state["index"]) == len(chosen) or not adjusted
    for number in range(int(state["index"])):
        sampler.record(0, chosen[number] if adjusted else 0)
    return int(sampler.sample([0], logits[None]).token[0])


def _array(address: int, count: int, dtype: Any) -> NDArray[Any]:
    size = count * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype)

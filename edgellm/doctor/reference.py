"""What a model says at every place of some texts: computed by one executor, what another is compared with.

A board often has no room for a float32 reference beside the engine, so it can be recorded where there is, and
carried there as a file: `numpy.savez` of

    spec        the model's numbers as JSON, uint8 [bytes]
    lengths     of the texts, int32 [P]
    tokens      of all texts, end to end, int32 [N]
    logprobs    behind each token, float16 [N, vocab]: natural logs, whose rounding is 1e-3 where it counts
    seed        that the texts were drawn with, uint64
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgellm.errors import EngineError
from edgellm.executor.base import Executor, Row, Step, Want
from edgellm.model.spec import ModelSpec
from edgellm.sampling import SamplingParams

Tokens = NDArray[np.int32]
LogProbs = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Reference:
    """Texts, and what comes behind each of their tokens.

    Attributes:
        texts: int32 [n] each.
        logprobs: float16 [n, vocab] of each text.
        seed: that they were drawn with.
    """

    texts: tuple[Tokens, ...]
    logprobs: tuple[LogProbs, ...]
    seed: int = 0

    def at(self, text: int, place: int) -> LogProbs:
        """Behind token `place` of a text: float16 [vocab]."""
        row: LogProbs = self.logprobs[text][place]
        return row


def compute_reference(executor: Executor, texts: Sequence[Tokens], seed: int = 0) -> Reference:
    """Feed texts to a loaded executor, a token at a time.

    Args:
        texts: int32 [n] each, at most as long as its slots.
    """
    slots = executor.info.max_batch_size
    logprobs = [np.empty((len(text), executor.info.vocab_size), np.float16) for text in texts]
    for first in range(0, len(texts), slots):
        together = range(first, min(first + slots, len(texts)))
        for text in together:
            executor.bind(text - first, SamplingParams(temperature=0.0), np.empty(0, np.int32))
        for place in range(max(len(texts[text]) for text in together)):
            running = [text for text in together if place < len(texts[text])]
            rows = [Row(text - first, place, texts[text][place : place + 1], Want.LOGITS) for text in running]
            logits = executor.collect(executor.submit(Step(rows))).logits
            assert logits is not None
            for text, row in zip(running, logits, strict=True):
                logprobs[text][place] = log_softmax(row)
    return Reference(tuple(texts), tuple(logprobs), seed)


def write_reference(path: Path, reference: Reference, spec: ModelSpec) -> None:
    """Write the file.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        np.savez(
            file,
            spec=np.frombuffer(msgspec.json.encode(spec), np.uint8),
            lengths=np.array([len(text) for text in reference.texts], np.int32),
            tokens=np.concatenate(reference.texts),
            logprobs=np.concatenate(reference.logprobs),
            seed=np.uint64(reference.seed),
        )


def read_reference(path: Path) -> tuple[Reference, ModelSpec]:
    """Read a file, with the numbers of the model that it is of.

    Raises:
        EngineError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            spec = msgspec.json.decode(file["spec"].tobytes(), type=ModelSpec)
            borders = np.cumsum(file["lengths"].astype(np.int64))
            tokens, logprobs, seed = file["tokens"], file["logprobs"], int(file["seed"])
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, msgspec.DecodeError) as error:
        raise EngineError(f"{path} is no reference that `edgellm doctor --record` wrote") from error
    shape = (int(borders[-1]) if len(borders) else 0, spec.vocab_size)
    if not shape[0] or tokens.shape != shape[:1] or logprobs.shape != shape or logprobs.dtype != np.float16:
        raise EngineError(f"{path} is damaged: record it again")
    return Reference(
        tuple(np.split(tokens.astype(np.int32), borders[:-1])),
        tuple(np.split(logprobs, borders[:-1])),
        seed,
    ), spec


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural logs of the probabilities, along the last axis."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result

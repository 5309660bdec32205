"""KL between two checkpoints, against the definition on whole logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_directories import write_directory
from reference_decoder import reference_logits
from tiny_llama import TinyLlama

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.quantize.checkpoint import QuantizedCheckpoint
from edgellm.quantize.divergence import measure_divergence
from edgellm.quantize.recipe import Recipe

TOKENS = np.random.RandomState(7).randint(0, 265, (2, 9)).astype(np.int32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tiny = TinyLlama(64, 4, 2, 32, 96, tied=True, rotary_base=1e4)
    return open_checkpoint(write_directory(tmp_path / "tiny", tiny))


def _logs(checkpoint: Checkpoint) -> np.ndarray:
    logits = np.stack([reference_logits(checkpoint, sequence.tolist()) for sequence in TOKENS])
    logits -= logits.max(axis=-1, keepdims=True)
    logs: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logs


@pytest.mark.parametrize("block_bytes", [1 << 24, 64 * 4 * 40])
def test_it_is_what_the_definition_says(
    checkpoint: Checkpoint, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the vocabulary is one block or seven."""
    monkeypatch.setattr("edgellm.model.weights.BLOCK_BYTES", block_bytes)
    other = QuantizedCheckpoint(checkpoint, Recipe("int4", "int4", 32))
    found = measure_divergence(checkpoint, other, TOKENS)
    p, q = _logs(checkpoint), _logs(other)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert found.tokens == TOKENS.size
    assert found.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.largest_kl == pytest.approx(kl.max(), rel=1e-3)
    assert found.agreement == (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()
    for logs, perplexity in ((p, found.unquantized_perplexity), (q, found.perplexity)):
        following = np.take_along_axis(logs[:, :-1], TOKENS[:, 1:, None].astype(np.int64), axis=-1)
        assert perplexity == pytest.approx(np.exp(-following.mean()), rel=1e-4)


def test_a_model_does_not_differ_from_itself(checkpoint: Checkpoint) -> None:
    found = measure_divergence(checkpoint, checkpoint, TOKENS)
    assert found.largest_kl < 1e-9
    assert found.agreement == 1

"""The network in numpy gives transformers' logits, for one sequence and for several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_directories import write_directory
from numpy.typing import NDArray
from tiny_llama import TINY

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.model.decoder import build_decoder
from edgellm.model.numpy_graph import NumpyGraph
from edgellm.model.weights import Float

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "decoder.npz")


def _logits(checkpoint: Checkpoint, tokens: NDArray[np.integer]) -> Float:
    graph = NumpyGraph(checkpoint.spec, tokens.astype(np.int32))
    build_decoder(graph, checkpoint)
    assert graph.logits_of is not None
    return graph.logits_of.all()


@pytest.mark.parametrize("name", TINY)
def test_it_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", TINY[name]))
    expected = GOLDEN[f"{name}.logits"]
    got = _logits(checkpoint, GOLDEN[f"{name}.tokens"][None])
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    name = "9/3 heads of 16, untied"
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", TINY[name]))
    tokens = GOLDEN[f"{name}.tokens"]
    together = _logits(checkpoint, np.stack([tokens[::-1], tokens]))[len(tokens) :]
    expected = GOLDEN[f"{name}.logits"]
    assert np.abs(together - expected).max() < 1e-4 * np.abs(expected).max()

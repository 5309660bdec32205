"""The comparison's model file and arithmetic; llama.cpp itself is not run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from model_directories import write_directory
from tiny_llama import TinyLlama

from edgellm.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compare_quantizers as tool

TINY = TinyLlama(64, 4, 2, 32, 96, tied=False, rotary_base=1e4)


def test_the_gguf_file_is_the_same_model(tmp_path: Path) -> None:
    original = open_checkpoint(write_directory(tmp_path / "tiny", TINY))
    model = tool.Noisy(original, 0.0)
    tool.write_gguf(model, tmp_path / "f16.gguf")
    found = open_checkpoint(tmp_path / "f16.gguf")
    assert found.spec.rotary_base == original.spec.rotary_base
    for name, values in TINY.weights().items():
        stored = found.tensor(name).dequantize()
        assert (stored == model.tensor(name).dequantize()).all()
        assert np.abs(stored - values).max() <= 2**-11 * np.abs(values).max()
    sequences = np.random.RandomState(0).randint(0, 265, (3, 6)).astype(np.int32)
    assert (
        np.abs(tool._log_probabilities(found, sequences) - tool._log_probabilities(model, sequences)).max()
        < 1e-4
    )


def test_noise_is_of_the_size_asked_for(tmp_path: Path) -> None:
    original = open_checkpoint(write_directory(tmp_path / "tiny", TINY))
    noisy = tool.Noisy(original, 0.1)
    name = "layers.0.mlp.gate_proj"
    exact, found = original.tensor(name).dequantize(), noisy.tensor(name).dequantize()
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) == pytest.approx(0.1, rel=0.05)
    assert (noisy.tensor(name).dequantize() == found).all()


def test_a_ratio_is_of_means_over_resampled_sequences() -> None:
    kl = np.random.default_rng(0).uniform(1, 2, (16, 10))
    assert tool._ratio(kl, kl) == (1.0, 1.0, 1.0)
    middle, low, high = tool._ratio(kl, kl[::-1])
    assert middle == pytest.approx(1.0)
    assert low < 1 < high

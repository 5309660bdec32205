"""The comparison's arithmetic, and what happens where llama.cpp does not run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import TINY

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compare_llamacpp as tool


def test_kl_of_two_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    # 0.5 · ln 2 + 0.25 · ln ½, whatever constant the logits carry
    exact, other = (np.log(x).astype(np.float32) for x in (p, q))
    assert tool._kl(exact + 7, other - 3) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert tool._kl(exact, exact) == 0


def test_a_ratio_is_theirs_over_ours_and_is_held_against_its_target() -> None:
    args = tool._arguments(["model.gguf", "--prompt", "100"])
    row = tool._speed_row("prefill", args, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    assert (row["edgellm"], row["llamacpp"], row["ratio"], row["low"]) == (200.0, 100.0, 2.0, 2.0)
    assert not tool._misses(row)
    assert tool._misses({**row, "ratio": 1.99})
    assert tool._misses({**row, "low": 1.79})
    assert not tool._misses({**row, "workload": "decode 2", "ratio": 0.5})
    assert tool._speed_row("decode 8", args, [0.5], [1.0])["edgellm"] == 16.0


def test_without_llama_cpp_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = next(iter(TINY.values())).write_gguf(tmp_path / "tiny.gguf")
    # An interpreter that sees no packages at all.
    alone = tmp_path / "python"
    alone.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    alone.chmod(0o755)
    assert tool.main([str(model), "--llama-python", str(alone)]) == 70
    error = capsys.readouterr().err
    assert error.startswith("compare_llamacpp: llama.cpp ended with 1") and "llama_cpp" in error


def test_batches_are_positive_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool._arguments(["model.gguf", "--batch", "1,0"])
    assert "--batch 1,0" in capsys.readouterr().err

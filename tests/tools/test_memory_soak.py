"""The soak's slope against known lines, and a short soak of a tiny engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ggufs import Llama

from edgellm.cli import main

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from memory_soak import PER, slope
from soak_mix import SHARES, Mix

TOOL = Path(__file__).parents[2] / "tools" / "memory_soak.py"


def test_a_line_is_found_exactly() -> None:
    requests = np.arange(0.0, 5000, 50)
    found = slope(requests, 1e8 + 12.5 * requests)
    assert found.value == pytest.approx(12.5 * PER)
    assert found.high - found.low < 1


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """White noise around a slope: 95 % of the intervals hold it, give or take what 400 trials allow."""
    chance = np.random.default_rng(1)
    requests = np.arange(0.0, 5000, 50)
    held = 0
    for _ in range(400):
        found = slope(requests, 3.0 * requests + chance.normal(0, 1e4, len(requests)))
        held += found.low <= 3.0 * PER <= found.high
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_wandering_widens_the_interval() -> None:
    """Each sample keeps 0.7 of the one before: without a correction 59 % of the intervals hold the truth."""
    chance = np.random.default_rng(2)
    requests = np.arange(0.0, 5000, 50)
    held = 0
    for _ in range(300):
        noise = chance.normal(0, 1e4, len(requests))
        for i in range(1, len(noise)):
            noise[i] += 0.7 * noise[i - 1]
        found = slope(requests, noise)
        held += found.low <= 0 <= found.high
    assert held / 300 > 0.85


def test_a_constant_has_no_slope_and_no_doubt() -> None:
    found = slope(np.arange(0.0, 1000, 10), np.full(100, 4e8))
    assert (found.low, found.value, found.high) == (0, 0, 0)


def test_the_mix_has_every_kind_and_repeats_itself() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    one, other = (Mix(seed=3, slot=128, vocabulary=265) for _ in range(2))
    wishes = [one.wish() for _ in range(2000)]
    assert {wish.kind for wish in wishes} == set(SHARES)
    assert [other.wish() for _ in range(2000)] == wishes
    rows = {token for wish in one.every_row() for token in (wish.fields or {})["prompt"]}
    assert rows == set(range(0, 265, 64))


def test_a_short_soak(tmp_path: Path) -> None:
    Llama().write(tmp_path / "tiny.gguf")
    assert main(["build", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "engine")]) == 0
    # So few requests say nothing of a slope: the limit only asks for a figure below it.
    command = [sys.executable, str(TOOL), str(tmp_path / "engine"), "--requests", "300", "--limit", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("300 requests in ")
    outcomes = next(line for line in done.stdout.splitlines() if line.startswith("outcomes: "))
    assert {"length", "bad_request", "cancelled", "vanished", "too_long"} <= set(
        outcomes.replace(",", "").split()
    )
    assert "growth per 10000 requests, 95 % interval" in done.stdout
    assert (
        subprocess.run([*command[:-1], "-100000"], capture_output=True, timeout=120, check=False).returncode
        == 1
    )

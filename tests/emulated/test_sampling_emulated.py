"""Sampling kernels on the emulated device: what cannot be chosen from is told."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from emulator.compile import EmulatedCompiler
from emulator.driver import HOPPER, EmulatedDriver

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

from runner import Runner
from sample_checks import check_emptied, check_status

from edgellm.cuda.driver import Driver


@pytest.mark.parametrize("check", [check_emptied, check_status])
def test_a_row_without_a_choice_says_why(check: object) -> None:
    runner = Runner(Driver(api=EmulatedDriver(HOPPER)), EmulatedCompiler())
    lines = list(check(runner, np.random.default_rng(5)))  # type: ignore[operator]
    assert lines
    assert [line for line, good in lines if not good] == []

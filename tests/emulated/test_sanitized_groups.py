"""What sanitizers are run on, on the emulated device: groups of kernels run, are right, name themselves."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.compile import EmulatedCompiler
from emulator.driver import HOPPER, EmulatedDriver
from sanitized import GROUPS, RAN, Naming

from edgellm.cuda.driver import Driver

pytestmark = pytest.mark.emulated

KERNELS = {
    "gemm": {"gemm"},
    "attention_decode": {"attention_decode", "attention_decode_cluster"},
    "attention_prefill": {"rope_and_append", "attention_prefill"},
    "sample": {"sample"},
}


@pytest.mark.parametrize("group", KERNELS)
def test_a_group_runs_all_its_kernels(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    runner = Naming(Driver(api=EmulatedDriver(HOPPER)), EmulatedCompiler())
    assert list(GROUPS[group](runner, np.random.default_rng(11))) == []
    named = [line.removeprefix(RAN) for line in capsys.readouterr().out.splitlines()]
    assert {name.partition("<")[0] for name in named} == KERNELS[group]
    assert len(set(named)) == len(named)

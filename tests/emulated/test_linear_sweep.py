"""The search for cuts, on an emulated device: every candidate launches, and what it says can be read."""

from __future__ import annotations

import linear_sweep
import pytest
from emulator.device import emulated_runner
from emulator.driver import HOPPER, ORIN
from linear_bench import BenchLinear, BenchModel

from edgellm.cuda.launch import Device
from edgellm.kernels.linear_cut import Tuning
from edgellm.kernels.linear_measured import Measured
from edgellm.kernels.packing import PackedShape

pytestmark = pytest.mark.emulated

SMALL = BenchModel(
    "small",
    1,
    {
        "qkv": BenchLinear(PackedShape(64, 256, 4, 128, "zero_point"), "store", True),
        "o": BenchLinear(PackedShape(256, 256, 4, 128, "zero_point"), "residual", False),
        "gate-up": BenchLinear(PackedShape(64, 256, 4, 128, "zero_point", swiglu=True), "swiglu", True),
        "down": BenchLinear(PackedShape(256, 512, 4, 64, "zero_point"), "residual", False),
        "head": BenchLinear(PackedShape(96, 256, 4, 128, "zero_point"), "logits", True),
    },
)


@pytest.mark.parametrize("device", [HOPPER, ORIN], ids=["sm_90", "sm_87"])
def test_a_sweep_measures_every_linear_and_names_the_best(device: Device) -> None:
    lines = list(linear_sweep.sweep(emulated_runner(device), [SMALL], [2], 1e9))
    rows = [line.strip("| ").split(" | ") for line in lines[2:] if line.startswith("|")]
    assert all(len(row) == 5 and row[:2] == ["small", "2"] for row in rows)
    assert {row[2] for row in rows if row[3] == "best"} == set(SMALL.linears)
    tried = {row[2] for row in rows if row[3] != "best"}
    assert tried == {"all", *SMALL.linears}
    first, last = (float(row[3]) for row in (rows[0], rows[-1]))
    assert last <= first
    names = {"Measured": Measured, "Tuning": Tuning, "PackedShape": PackedShape}
    pasted = eval("{" + "".join(line for line in lines if line.startswith("    ")) + "}", names)
    assert {(each.shape, each.rows) for each in pasted} == {
        (linear.shape, 2) for linear in SMALL.linears.values()
    }
    assert all((each.sm, each.multiprocessors) == (device.sm, device.multiprocessors) for each in pasted)
    assert all(isinstance(cut, Tuning) for cut in pasted.values())


def test_without_time_only_what_is_there_is_measured() -> None:
    lines = list(linear_sweep.sweep(emulated_runner(HOPPER), [SMALL], [1], 0.0))
    assert sum(line.startswith("|") for line in lines) == 2 + 1 + len(SMALL.linears) + 1

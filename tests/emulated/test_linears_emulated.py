"""Linears on the emulated device: every kind of weight, every way to part and to join, beside float64."""

from __future__ import annotations

import linear_checks
import pytest
from emulator.device import emulated_runner
from emulator.driver import HOPPER, ORIN
from linear_checks import Case

from edgellm.cuda.launch import Device

pytestmark = pytest.mark.emulated

CASES = (
    Case("residual in, rounds", 336, 576, 4, 32, "offset", "store", True),
    Case("residual out", 72, 576, 4, 32, "offset", "residual", False),
    Case("gate-up, rounds", 200, 576, 4, 64, "zero_point", "swiglu", True, True),
    Case("head", 67, 576, 8, 32, "none", "logits", True),
    Case("long", 48, 2432, 4, 128, "zero_point", "residual", False, True),
    Case("wide groups", 64, 1024, 4, 128, "centred", "swiglu", True),
    Case("8 bits", 50, 768, 8, 128, "offset", "store", True),
    Case("Q6_K", 50, 1024, 8, 16, "none", "logits", True),
    Case("groups of 16", 48, 768, 4, 16, "offset", "store", False),
    Case("dense", 60, 640, 16, 64, "none", "residual", False),
)
DEVICES = pytest.mark.parametrize("device", [HOPPER, ORIN], ids=["sm_90", "sm_87"])


@pytest.mark.parametrize(
    ("device", "cases", "rows"),
    [(HOPPER, CASES, 8), (HOPPER, CASES[::3], 1), (ORIN, CASES, 16), (ORIN, CASES[1::3], 2)],
    ids=["sm_90, 8 rows", "sm_90, one row", "sm_87, 16 rows", "sm_87, 2 rows"],
)
def test_linears_compute_what_float64_does(device: Device, cases: tuple[Case, ...], rows: int) -> None:
    # Chunks of each kind of weight once for each device.
    chunks = ((32, 19), (64, 64)) if rows >= 8 else ()
    wrong = linear_checks.checks(emulated_runner(device), 1, cases, buckets=(rows,), chunks=chunks)
    assert not wrong, "\n".join(wrong)


@DEVICES
@pytest.mark.parametrize("copies", ["at once", "either"])
def test_results_do_not_depend_on_who_is_first(device: Device, copies: str) -> None:
    runner = emulated_runner(device, seed=7, copies=copies)
    # The same kernels, so that none is compiled for this alone.
    buckets = (8,) if device is HOPPER else (16,)
    wrong = linear_checks.checks(runner, 1, CASES[1:3], buckets=buckets, chunks=((32, 19),))
    assert not wrong, "\n".join(wrong)

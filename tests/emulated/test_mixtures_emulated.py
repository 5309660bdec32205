"""Mixtures of experts on the emulated device, beside float64: rows, chunks, teams of warps and tiles."""

from __future__ import annotations

import moe_checks
import pytest
from emulator.device import emulated_runner
from emulator.driver import HOPPER, ORIN
from moe_checks import Layer

from edgellm.cuda.launch import Device

pytestmark = pytest.mark.emulated

LAYERS = (
    Layer("offsets", 12, 4, True, 256, 128, 4, 64, "offset"),
    Layer("not normalized", 10, 4, False, 192, 64, 4, 32, "centred"),
    Layer("Q6_K", 8, 2, True, 128, 64, 8, 16, "none"),
    Layer("dense", 9, 3, False, 192, 128, 16, 64, "none"),
    Layer("wide groups", 7, 2, True, 256, 128, 4, 128, "zero_point"),
    Layer("260 experts", 260, 5, True, 64, 64, 8, 64, "zero_point"),
)


@pytest.mark.parametrize(
    ("device", "seed", "layers"),
    [(HOPPER, 0, LAYERS[:3]), (ORIN, 1, LAYERS[3:]), (HOPPER, 2, LAYERS[4:5]), (ORIN, 3, LAYERS[:1])],
    ids=["sm_90", "sm_87", "sm_90 in any order", "sm_87 in any order"],
)
def test_mixtures_compute_what_float64_does(device: Device, seed: int, layers: tuple[Layer, ...]) -> None:
    runner = emulated_runner(device, seed=seed, copies="either" if seed > 1 else "late")
    wrong = moe_checks.checks(runner, 1, layers, buckets=(1, 4, 16), chunks=(16, 64))
    assert not wrong, "\n".join(wrong)


def test_a_chunk_of_more_pairs_than_are_sorted_at_a_time() -> None:
    wrong = moe_checks.checks(emulated_runner(ORIN), 1, LAYERS[1:2], buckets=(), chunks=(512,))
    assert not wrong, "\n".join(wrong)

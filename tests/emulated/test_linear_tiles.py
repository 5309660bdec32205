"""The search for tiles, on an emulated device: every candidate launches, and what it says can be read."""

from __future__ import annotations

from itertools import groupby

import linear_tiles
import pytest
from emulator.device import emulated_runner
from emulator.driver import HOPPER
from linear_bench import BenchLinear, BenchModel

from edgellm.kernels.packing import PackedShape

pytestmark = pytest.mark.emulated


def test_every_linear_has_its_fastest_tiles_and_the_one_taken() -> None:
    model = BenchModel(
        "small",
        1,
        {
            "o": BenchLinear(PackedShape(100, 256, 4, 128, "zero_point"), "residual", False),
            "gate-up": BenchLinear(PackedShape(64, 256, 4, 128, "zero_point", swiglu=True), "swiglu", True),
            "head": BenchLinear(PackedShape(96, 256, 4, 128, "zero_point"), "logits", True),
        },
    )
    lines = list(linear_tiles.tables(emulated_runner(HOPPER), [32, 64], model))[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    found = {key: list(rows) for key, rows in groupby(cells, lambda row: (row[0], row[1]))}
    assert found.keys() == {(name, tokens) for name in ("o", "gate-up") for tokens in ("32", "64")}
    for *fastest, taken in found.values():
        times = [float(row[3]) for row in fastest]
        assert times == sorted(times) and 1 < len(times) <= linear_tiles.SHOWN
        assert "(taken)" in taken[2]

"""What the kernels' checks would run on real devices, listed and not run: their shapes and SMs, no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from compiled import DEVICES

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import attention_checks
import linear_checks
import moe_checks

from edgellm.cuda.launch import Device, Launch
from edgellm.kernels.gemm import Tile
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.moe import longest_piece, mixture_workspace
from edgellm.kernels.moe_cuts import Cuts, Held, Tuning, tuned

pytestmark = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


class Planner:
    """In a runner's place: keeps what it is to compile."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.launches: list[Launch] = []

    def prepare(self, launches: Iterable[Launch]) -> None:
        self.launches += launches


def assert_launchable(launches: Iterable[Launch], device: Device) -> None:
    for launch in launches:
        kernel = launch.kernel
        assert kernel.threads % 32 == 0 and 0 < kernel.threads <= 1024, kernel
        assert 0 <= kernel.shared <= device.shared_per_block, kernel
        x, y, z = launch.grid
        assert 0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16, launch


def test_mixtures(device: Device) -> None:
    seen: dict[tuple[str, bool, int], set[type]] = {}
    for step in moe_checks.steps(device):
        assert_launchable(step.launches(device), device)
        mixture = step.layer.mixture
        assert mixture_workspace(mixture, step.tokens, device, step.cuts) > 0
        rows = min(step.tokens, longest_piece(mixture))
        cuts: Cuts = step.cuts or tuned(mixture, rows=rows, device=device)
        kinds = seen.setdefault((step.layer.name, step.chunk, step.tokens), set())
        kinds |= {type(cuts.gate_up), type(cuts.down)}
    for layer in moe_checks.LAYERS:
        for tokens in BUCKETS:
            assert Tuning in seen[layer.name, False, tokens] and Tile not in seen[layer.name, False, tokens]
        # All that a long chunk can be cut in.
        assert {Tuning, Tile} <= seen[layer.name, True, 512]
    assert any(Held in kinds for kinds in seen.values())


def test_linears(device: Device) -> None:
    planned = 0
    for step in linear_checks.steps(device):
        assert_launchable(linear_checks.decode_launches(device, *step), device)
        planned += 1
    for case, tokens, count, tile in linear_checks.prompts_of(device):
        assert 0 < count <= tokens
        assert_launchable(linear_checks.prefill_launches(device, case, tokens, tile), device)
    assert planned > len(linear_checks.CASES) * len(BUCKETS), "no other cuts than the device's"


def test_attention(device: Device) -> None:
    planner = Planner(device)
    attention_checks.prepare(planner)  # type: ignore[arg-type]
    assert planner.launches
    assert_launchable(planner.launches, device)

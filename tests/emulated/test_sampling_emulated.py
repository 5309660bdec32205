"""Sampling and the inputs of a TensorRT plan on the emulated device, beside the host's sampler and numpy."""

from __future__ import annotations

from collections.abc import Iterable

import feed_checks
import numpy as np
import pytest
import sample_checks
from emulator.device import emulated_runner
from emulator.driver import HOPPER, ORIN

from edgellm.cuda.launch import Device

pytestmark = pytest.mark.emulated

DEVICES = pytest.mark.parametrize("device", [HOPPER, ORIN], ids=["sm_90", "sm_87"])


def assert_all(lines: Iterable[tuple[str, bool]]) -> None:
    """That every check is well."""
    found = list(lines)
    bad = [line for line, good in found if not good]
    assert found and not bad, "\n".join(bad)


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_the_host_samplers(seed: int) -> None:
    runner, rng = emulated_runner(ORIN, seed=seed), np.random.default_rng(seed)
    # 4,099 are more than can be listed, so that histograms are needed.
    assert_all(sample_checks.check_against_host(runner, rng, (50, 4099)))


def test_more_equal_tokens_than_can_be_listed() -> None:
    runner, rng = emulated_runner(HOPPER), np.random.default_rng(2)
    assert_all(sample_checks.check_against_host(runner, rng, (16_000,), ("equal",)))


@DEVICES
def test_adjusted_tokens_are_the_host_samplers(device: Device) -> None:
    runner, rng = emulated_runner(device, seed=1), np.random.default_rng(1)
    assert_all(sample_checks.check_adjusted(runner, rng, ((50, 0.0), (4099, 9.0))))


@DEVICES
def test_what_cannot_be_sampled_is_told(device: Device) -> None:
    runner, rng = emulated_runner(device, seed=1), np.random.default_rng(1)
    assert_all(sample_checks.check_status(runner, rng))
    assert_all(sample_checks.check_emptied(runner, rng))


@DEVICES
def test_inputs_of_a_plan(device: Device) -> None:
    runner, rng = emulated_runner(device, seed=1), np.random.default_rng(1)
    assert_all(feed_checks.check_rows(runner, rng))
    assert_all(feed_checks.check_chunk(runner, rng))

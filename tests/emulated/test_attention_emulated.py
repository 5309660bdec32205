"""Attention and the small kernels on the emulated device, beside float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import attention_checks
import numpy as np
import pytest
from attention_checks import shape
from emulator.device import emulated_runner
from emulator.driver import HOPPER, ORIN, EmulationError
from runner import poisoned

from edgellm.cuda.launch import At, Device
from edgellm.kernels.rows import ROW

pytestmark = pytest.mark.emulated

SHAPES = (
    shape(3, 1, 64, 96),
    shape(8, 2, 128, 80, norm=True),
    shape(4, 4, 80, 64),
    shape(6, 2, 96, 64),
    shape(16, 1, 64, 64),
    shape(4, 2, 64, 96, int8=True),
    shape(8, 2, 128, 80, int8=True, norm=True),
    shape(4, 1, 80, 64, int8=True),
    shape(14, 2, 96, 64, int8=True, norm=True),
)
CHUNKS = ((16, 1, 0), (64, 50, 13), (32, 32, -32))
LONG = (shape(3, 1, 64, 832), shape(8, 2, 128, 832, int8=True, norm=True), shape(4, 1, 80, 832, int8=True))
"""Long enough for several parts of a prefill's keys, and several pieces of a decode's row for each block."""
CUTS = {90: ((90, 4), (90, 132)), 87: ((87, 2), (87, 14))}
DEVICES = pytest.mark.parametrize("device", [HOPPER, ORIN], ids=["sm_90", "sm_87"])


def assert_all(lines: Iterable[tuple[str, bool]]) -> None:
    """That every check is well."""
    found = list(lines)
    bad = [line for line, good in found if not good]
    assert found and not bad, "\n".join(bad)


@DEVICES
def test_decode_attention(device: Device) -> None:
    rng = np.random.default_rng(1)
    runner = emulated_runner(device)
    buckets, cuts = (1, 3, 16), CUTS[device.sm]
    attention_checks.prepare(runner, SHAPES, buckets=buckets, cuts=cuts, chunks=())
    assert_all(attention_checks.check_decode(runner, rng, SHAPES, buckets=buckets, cuts=cuts))


@pytest.mark.parametrize("int8", [False, True], ids=["fp16", "int8"])
def test_a_steps_caches_are_read_early_because_earlier_steps_have_ended(*, int8: bool) -> None:
    """Were the step before in the same graph, and this one early, it would read what is being appended."""
    rng = np.random.default_rng(3)
    runner = emulated_runner(HOPPER)
    kind = shape(4, 2, 64, 96, int8=int8)
    layer = attention_checks.Layer(rng, kind, 1)
    tables = [np.zeros(1, ROW) for _ in range(2)]
    tables[0]["past"], tables[1]["past"] = 40, 41
    arrays = layer.arrays() | {
        "rows": np.concatenate(tables),
        "qkv": rng.standard_normal((1, kind.qkv_width), np.float32).astype("<f2"),
        "out": poisoned((1, kind.heads * kind.head_size), "<f2"),
        "workspace": np.zeros(1 << 20, np.uint8),
    }
    (first,) = attention_checks.decode_launches(kind, layer, 1, runner.device)
    place = first.arguments.index(At("rows"))
    later = (*first.arguments[:place], At("rows", ROW.itemsize), *first.arguments[place + 1 :])
    second = replace(first, arguments=later)
    runner.run([first, replace(second, early=False)], arrays)
    with pytest.raises(
        EmulationError, match="before wait_for_previous, what the launch 1 in front of it writes"
    ):
        runner.run([first, second], arrays)


@DEVICES
def test_prefill_attention(device: Device) -> None:
    rng = np.random.default_rng(1)
    runner = emulated_runner(device)
    attention_checks.prepare(runner, SHAPES, buckets=(), chunks=CHUNKS)
    assert_all(attention_checks.check_prefill(runner, rng, SHAPES, CHUNKS))


@DEVICES
def test_keys_are_parted_and_added_up(device: Device) -> None:
    """Also where some of a chunk's tokens see nothing of the last part."""
    rng = np.random.default_rng(2)
    runner = emulated_runner(device, seed=4, copies="either")
    lines = list(attention_checks.check_prefill(runner, rng, LONG, ((16, 13, -13), (64, 50, 740)), (132,)))
    assert all("parts 16" in line for line, _ in lines)
    assert_all(lines)


@DEVICES
def test_rows_of_many_pieces(device: Device) -> None:
    """Dealt to more blocks than there are rows and heads, and to fewer."""
    rng = np.random.default_rng(2)
    runner = emulated_runner(device, seed=5, copies="either")
    cuts = (*CUTS[device.sm], (87, 5))
    assert_all(attention_checks.check_decode(runner, rng, LONG, buckets=(1, 3), cuts=cuts))


@DEVICES
@pytest.mark.parametrize(("seed", "copies"), [(1, "at once"), (2, "either"), (3, "late")])
def test_attention_does_not_depend_on_who_is_first(device: Device, seed: int, copies: str) -> None:
    rng = np.random.default_rng(seed)
    runner = emulated_runner(device, seed=seed, copies=copies)
    shapes, cuts = (SHAPES[1], SHAPES[5]), CUTS[device.sm]
    assert_all(attention_checks.check_decode(runner, rng, shapes, buckets=(3,), cuts=cuts))
    assert_all(attention_checks.check_prefill(runner, rng, shapes, CHUNKS[1:2]))


@DEVICES
def test_embeddings_norms_and_permutations(device: Device) -> None:
    rng = np.random.default_rng(1)
    assert_all(
        attention_checks.check_elementwise(emulated_runner(device), rng, widths=((576, 576), (896, 960)))
    )

"""Sampling's state and launches: what the device is told is what the request says, and the kernels fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of
from hypothesis import given
from hypothesis import strategies as st

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels.adjust import (
    BIASES,
    SUPPRESSED,
    AdjustmentsShape,
    adjustments_state,
    can_adjust,
)
from edgellm.kernels.sample import (
    ADJUSTED,
    GREEDY,
    LOGPROB,
    ON_HOST,
    SAMPLED,
    SAMPLING,
    chooses_on_device,
    sample,
    sample_workspace,
    sampling_state,
)
from edgellm.sampling import SamplingParams

AT = At("x")


def launches(vocab: int, rows: int = 4, device: Device = DEVICES["h100"]) -> list[Launch]:
    return sample(
        AdjustmentsShape(vocab, 8192),
        rows=rows,
        device=device,
        rows_at=AT,
        sampling=AT,
        adjustments=AT,
        logits=AT,
        last_token=AT,
        results=AT,
        workspace=AT,
    )


def test_the_layouts_are_those_of_the_structs() -> None:
    # 64-bit members first: no padding, and a state at every multiple of 16.
    assert (SAMPLING.itemsize, SAMPLED.itemsize) == (48, 16)
    assert [SAMPLING.fields[name][1] for name in SAMPLING.names or ()] == [0, 8, 16, 20, 24, 28, 32, 36, 40]  # type: ignore[index]


@given(st.integers(0, 2**64 - 1), st.floats(1e-45, 1e3), st.integers(0, 10**6))
def test_a_state_says_what_the_request_does(seed: int, temperature: float, top_k: int) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=0.9, min_p=0.1, seed=seed)
    state = sampling_state(params)
    assert int(state["seed_low"]) | int(state["seed_high"]) << 32 == seed
    assert float(state["inverse_temperature"]) == np.float32(min(1 / temperature, 1e30))
    assert (float(state["top_p"]), float(state["min_p"]), int(state["top_k"])) == (0.9, 0.1, top_k)
    assert (int(state["flags"]), int(state["index"])) == (0, 0)


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"temperature": 0.0}, GREEDY),
        ({"logprobs": True}, LOGPROB),
        ({"logprobs": True, "top_logprobs": 3}, LOGPROB | ON_HOST),
        ({"top_logprobs": 3}, 0),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, GREEDY | ON_HOST),
        ({"frequency_penalty": 0.1}, ON_HOST),
        ({"presence_penalty": 0.1}, ON_HOST),
        ({"logit_bias": {3: 1.0}}, ON_HOST),
        ({"min_tokens": 2, "suppressed": (1,)}, ON_HOST),
        ({"min_tokens": 2}, 0),
    ],
)
def test_flags_say_who_chooses(values: dict[str, Any], flags: int) -> None:
    params = SamplingParams(**values)
    assert int(sampling_state(params)["flags"]) == flags
    assert chooses_on_device(params) == (not flags & ON_HOST)


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"temperature": 0.0, "repetition_penalty": 1.1}, GREEDY | ADJUSTED),
        ({"logit_bias": {3: 1.0}}, ADJUSTED),
        ({"logit_bias": {3: 1.0}, "logprobs": True}, LOGPROB | ON_HOST),
        ({"min_tokens": 2, "suppressed": (1,)}, ADJUSTED),
        ({"min_tokens": 2, "suppressed": tuple(range(SUPPRESSED + 1))}, ON_HOST),
        ({"logit_bias": dict.fromkeys(range(BIASES + 1), 0.5)}, ON_HOST),
        ({"suppressed": (1, 2)}, 0),
    ],
)
def test_flags_of_what_the_device_can_adjust(values: dict[str, Any], flags: int) -> None:
    params = SamplingParams(**values)
    assert int(sampling_state(params, adjusting=True)["flags"]) == flags
    assert can_adjust(params) or flags & ON_HOST


def test_a_slots_adjustments_hold_what_the_request_says() -> None:
    shape = AdjustmentsShape(1000, 16)
    params = SamplingParams(
        logit_bias={7: -1e300, 5: 2.5}, presence_penalty=0.5, min_tokens=4, suppressed=(9, 8)
    )
    state = adjustments_state(shape, params, np.array([3, 3, 1], np.int32))
    assert state["bias_ids"][:3].tolist() == [7, 5, 0]
    assert state["bias"][:2].tolist() == [np.float32(-1e30), 2.5]
    assert (int(state["biases"]), int(state["suppressed"]), int(state["min_tokens"])) == (2, 2, 4)
    assert state["history"][: int(state["seen"])].tolist() == [(1, 1), (3, 1)]
    # The header, then arrays in the struct's order, all of four bytes.
    assert shape.dtype.itemsize == 4 * (8 + 2 * BIASES + SUPPRESSED + 2 * 16)
    with pytest.raises(ValueError, match="more biases"):
        adjustments_state(
            shape, SamplingParams(logit_bias=dict.fromkeys(range(BIASES + 1), 0.5)), np.zeros(1, np.int32)
        )


@given(st.integers(1, 300_000), st.integers(1, 256), st.sampled_from([4, 8, 14, 16, 132]))
def test_every_logit_is_in_a_segment_and_every_block_has_one(
    vocab: int, rows: int, multiprocessors: int
) -> None:
    (launch,) = launches(vocab, rows, Device(87, multiprocessors, 164 << 10))
    segments = (sample_workspace(vocab, rows=rows) - sample_workspace(vocab, rows=0)) // rows // 16
    assert (segments - 1) * 128 < vocab <= segments * 128
    blocks, warps = launch.grid[0], launch.kernel.threads // 32
    assert launch.grid[1] == rows
    assert 1 <= blocks <= -(-segments // warps)
    # All blocks of few rows run side by side: the last to end waits for nobody.
    assert blocks == 1 or blocks * rows <= multiprocessors
    # As the kernel parts them.
    assert all(segments * (block + 1) // blocks > segments * block // blocks for block in range(blocks))


def test_more_rows_than_counters_are_refused() -> None:
    with pytest.raises(ValueError, match="1025 rows are more than 1024"):
        launches(50, 1025)


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_kernels_fit_without_spilling(name: str) -> None:
    device = DEVICES[name]
    vocabularies = (50, 49152, 50257, 151936, 262144)
    kernels = kernels_of(launch for vocab in vocabularies for launch in launches(vocab))
    assert_fits(compile_for(kernels, device.sm), device)

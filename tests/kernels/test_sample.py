"""Sampling's state and launches: what the device is told is what the request says, and the kernels fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of
from hypothesis import given
from hypothesis import strategies as st

from edgellm.cuda.launch import At, Launch
from edgellm.kernels.sample import (
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


def launches(vocab: int, rows: int = 4) -> list[Launch]:
    return sample(
        vocab, rows=rows, rows_at=AT, sampling=AT, logits=AT, last_token=AT, results=AT, workspace=AT
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


@given(st.integers(1, 300_000), st.integers(1, 16))
def test_every_logit_is_in_a_segment_and_every_segment_has_a_warp(vocab: int, rows: int) -> None:
    summarise, choose = launches(vocab, rows)
    segments = sample_workspace(vocab, rows=rows) // rows // 16
    assert (segments - 1) * 128 < vocab <= segments * 128
    warps = summarise.grid[0] * summarise.kernel.threads // 32
    assert segments <= warps < segments + summarise.kernel.threads // 32
    assert summarise.grid[1] == choose.grid[0] == rows


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_kernels_fit_without_spilling(name: str) -> None:
    device = DEVICES[name]
    kernels = [kernel for vocab in (50, 49152, 151936, 262144) for kernel in kernels_of(launches(vocab))]
    assert_fits(compile_for(kernels, device.sm), device)

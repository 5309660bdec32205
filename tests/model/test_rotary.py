"""Rotary frequencies against transformers', and tables against the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rotary_cases import CASES

from edgellm.model.rotary import (
    DivisorScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    YarnScaling,
    make_rotary,
)

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "decoder.npz")
LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_length_are_transformers(name: str) -> None:
    case = CASES[name]
    rotary = make_rotary(case.head_size, case.base, case.scaling)
    # transformers computes them in float32.
    np.testing.assert_allclose(rotary.frequencies, GOLDEN[f"rotary.{name}.frequencies"], rtol=1e-6)
    assert rotary.length == pytest.approx(float(GOLDEN[f"rotary.{name}.length"]), rel=1e-12)
    plain = make_rotary(case.head_size, case.base)
    assert plain.length == 1
    assert not np.allclose(rotary.frequencies, plain.frequencies, rtol=0.1)


def test_tables_are_angles_of_every_position() -> None:
    rotary = make_rotary(8, 100.0)
    cos, sin = rotary.tables(5)
    assert cos.shape == sin.shape == (5, 4)
    for position in range(5):
        for pair in range(4):
            turned = np.exp(1j * position / 100.0 ** (pair / 4))
            assert cos[position, pair] + 1j * sin[position, pair] == pytest.approx(turned)


def test_yarn_lengthens_what_is_turned() -> None:
    rotary = make_rotary(8, 100.0, YarnScaling(factor=np.e, original_max_position_embeddings=64))
    cos, sin = rotary.tables(3)
    np.testing.assert_allclose(cos**2 + sin**2, 1.1**2)


def test_divisors_divide_one_by_one() -> None:
    rotary = make_rotary(4, 100.0, DivisorScaling(divisors=(1.0, 4.0)))
    np.testing.assert_allclose(rotary.frequencies, [1, 0.1 / 4])


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        (LinearScaling(factor=0.5), "factor 0.5"),
        (LinearScaling(factor=float("nan")), "factor nan"),
        (LinearScaling(factor=float("inf")), "factor inf"),
        (Llama3Scaling(**{**LLAMA3, "factor": 0.0}), "factor 0.0"),
        (Llama3Scaling(**{**LLAMA3, "low_freq_factor": 4.0}), "low_freq_factor 4.0"),
        (Llama3Scaling(**{**LLAMA3, "low_freq_factor": 0.0}), "low_freq_factor 0.0"),
        (YarnScaling(factor=-1.0, original_max_position_embeddings=64), "factor -1"),
        (YarnScaling(factor=2.0, original_max_position_embeddings=64, beta_slow=32.0), "beta_slow 32"),
        (YarnScaling(factor=2.0, original_max_position_embeddings=64, attention_factor=0.0), "attention_fac"),
        (YarnScaling(factor=2.0, original_max_position_embeddings=0), "original_max_position_embeddings 0"),
        (DivisorScaling(divisors=(1.0,)), "4 positive divisors"),
        (DivisorScaling(divisors=(1.0, 1.0, 0.0, 1.0)), "4 positive divisors"),
    ],
)
def test_what_makes_no_sense_is_named(scaling: RotaryScaling, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_rotary(8, 10_000.0, scaling)


@pytest.mark.parametrize("scaling", [case.scaling for case in CASES.values()] + [None])
def test_config_json_keeps_a_scaling(scaling: RotaryScaling | None) -> None:
    encoded = msgspec.json.encode(scaling)
    kind: Any = RotaryScaling | None
    assert msgspec.json.decode(encoded, type=kind) == scaling

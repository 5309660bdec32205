"""Calibration: the float network stays what it was, and what it gives out when quantized comes closer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_directories import write_directory
from numpy.typing import NDArray
from reference_decoder import reference_logits
from tiny_llama import TinyLlama

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.model.weights import Dense, Weight
from edgellm.quantize.calibrate import WIDEST, calibrate
from edgellm.quantize.checkpoint import Adjustments, QuantizedCheckpoint
from edgellm.quantize.divergence import measure_divergence
from edgellm.quantize.recipe import Recipe, matrices_of
from edgellm.quantize.wrapped import WrappedCheckpoint

SHAPES = {
    "llama, 4/2 heads": TinyLlama(128, 4, 2, 32, 192, tied=True, rotary_base=1e4),
    "qwen2, 6/2 heads": TinyLlama(192, 6, 2, 32, 128, tied=False, rotary_base=1e6, family="Qwen2"),
    "qwen3, wide heads": TinyLlama(128, 4, 2, 64, 192, tied=False, rotary_base=1e6, family="Qwen3"),
    "qwen3moe, 2 of 6 experts": TinyLlama(
        128, 4, 2, 64, 64, tied=False, rotary_base=1e6, family="Qwen3Moe", experts=6, top_k=2
    ),
}
RECIPE = Recipe("int4", "int8", 64)
TOKENS = np.random.RandomState(5).randint(0, 265, (4, 64)).astype(np.int32)


class Adjusted(WrappedCheckpoint):
    """A checkpoint with adjustments, and nothing quantized."""

    def __init__(self, inner: Checkpoint, adjustments: Adjustments) -> None:
        super().__init__(inner)
        self._adjustments = adjustments

    def tensor(self, name: str) -> Weight:
        weight = super().tensor(name)
        assert isinstance(weight, Dense)
        return self._adjustments.apply(name, weight)


def _uneven(tiny: TinyLlama) -> dict[str, NDArray[np.float32]]:
    """The norms' gains with a few large channels, as real models have them."""
    chance = np.random.RandomState(3)
    return {
        f"model.{name}.weight": (values * np.exp(1.5 * chance.standard_normal(values.shape))).astype(
            np.float32
        )
        for name, values in tiny.weights().items()
        if name.endswith("layernorm")
    }


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tiny, path = SHAPES[request.param], tmp_path_factory.mktemp("calibrate")
    return open_checkpoint(write_directory(path / "tiny", tiny, tensors=_uneven(tiny)))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint) -> Adjustments:
    return calibrate(checkpoint, RECIPE, TOKENS)


def test_the_float_network_does_not_change(checkpoint: Checkpoint, found: Adjustments) -> None:
    # Something was scaled, or this would say nothing.
    assert any(name.endswith("q_proj") for name in found.columns)
    assert any(name.endswith(("down_proj", "o_proj")) for name in found.columns)
    tokens = TOKENS[0, :12].tolist()
    exact = reference_logits(checkpoint, tokens)
    adjusted = reference_logits(Adjusted(checkpoint, found), tokens)
    assert np.abs(adjusted - exact).max() < 1e-5 * np.abs(exact).max()


def test_what_divides_rows_multiplies_the_next_columns(checkpoint: Checkpoint, found: Adjustments) -> None:
    spec = checkpoint.spec
    mlps = ["mlp"] if spec.moe is None else [f"mlp.experts.{e}" for e in range(spec.moe.num_experts)]
    for factors in (*found.columns.values(), *found.rows.values()):
        assert (factors >= 1 / WIDEST).all()
        assert (factors <= WIDEST).all()
    for layer in range(spec.num_hidden_layers):
        here = f"layers.{layer}"
        for source, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (
                "post_attention_layernorm",
                tuple(f"{mlp}.{part}_proj" for mlp in mlps for part in ("gate", "up")),
            ),
            *((f"{mlp}.up_proj", (f"{mlp}.down_proj",)) for mlp in mlps),
        ):
            rows = found.rows.get(f"{here}.{source}")
            for reader in readers:
                columns = found.columns.get(f"{here}.{reader}")
                assert (rows is None) == (columns is None)
                if rows is not None and columns is not None:
                    assert (rows == columns).all()


def test_calibrated_int4_is_closer_on_other_text(checkpoint: Checkpoint, found: Adjustments) -> None:
    others = np.random.RandomState(6).randint(0, 265, (4, 64)).astype(np.int32)
    plain, calibrated = QuantizedCheckpoint(checkpoint, RECIPE), QuantizedCheckpoint(checkpoint, RECIPE)
    calibrated.adjust(found)
    before, after = (measure_divergence(checkpoint, one, others).kl for one in (plain, calibrated))
    assert after < 0.9 * before
    assert calibrated.quantization.quant_algo == "W4A16_AWQ"


def test_every_quantized_linear_knows_what_matters(checkpoint: Checkpoint, found: Adjustments) -> None:
    expected = {name for name in matrices_of(checkpoint, RECIPE) if RECIPE.bits(name) is not None}
    expected.remove("embed_tokens")
    assert set(found.importance) == expected
    assert all((importance >= 0).all() for importance in found.importance.values())


def test_an_expert_that_few_tokens_chose_keeps_its_scales(tmp_path: Path) -> None:
    tiny = SHAPES["qwen3moe, 2 of 6 experts"]
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", tiny))
    found = calibrate(checkpoint, RECIPE, TOKENS[:1, :20])
    assert not any(name.endswith("down_proj") for name in (*found.columns, *found.importance))
    assert any(name.endswith("experts.0.up_proj") for name in found.importance)

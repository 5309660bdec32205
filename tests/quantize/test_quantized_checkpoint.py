"""A checkpoint that quantizes: what becomes of which tensor, what is counted, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import all_logits, tiny_executor
from model_directories import write_directory
from tiny_llama import TinyLlama

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.errors import CheckpointError, UsageError
from edgellm.model.inventory import take_inventory
from edgellm.model.weights import Dense, Grouped
from edgellm.quantize.checkpoint import QuantizedCheckpoint, WeightError
from edgellm.quantize.recipe import Recipe

LLAMA = TinyLlama(128, 4, 2, 32, 192, tied=True, rotary_base=1e4)
QWEN2 = TinyLlama(128, 4, 2, 32, 192, tied=False, rotary_base=1e6, family="Qwen2")
QWEN3 = TinyLlama(128, 4, 2, 64, 192, tied=False, rotary_base=1e6, family="Qwen3")
MOE = TinyLlama(64, 4, 2, 32, 64, tied=True, rotary_base=1e6, family="Qwen3Moe", experts=5, top_k=2)


def _open(path: Path, tiny: TinyLlama = LLAMA) -> Checkpoint:
    return open_checkpoint(write_directory(path / "tiny", tiny))


def test_what_becomes_of_each_tensor(tmp_path: Path) -> None:
    inner = _open(tmp_path, QWEN2)
    made = QuantizedCheckpoint(inner, Recipe("int4", "int8", 32))
    kinds = {}
    for name in ("embed_tokens", "lm_head", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        weight = made.tensor(name)
        assert isinstance(weight, Grouped)
        kinds[name.rsplit(".", 1)[-1]] = weight.bits, weight.group, weight.asymmetric
    assert kinds == {
        "embed_tokens": (8, 32, False),
        "lm_head": (8, 32, False),
        "q_proj": (4, 32, True),
        "down_proj": (4, 32, True),
    }
    for name in ("norm", "layers.0.input_layernorm", "layers.0.self_attn.q_proj.bias"):
        assert isinstance(made.tensor(name), Dense)
        assert (made.tensor(name).dequantize() == inner.tensor(name).dequantize()).all()
    found = made.quantization
    assert (found.quant_algo, found.group_size, found.has_zero_point) == ("W4A16", 32, True)
    assert found.exclude_modules == ("embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("recipe", "algorithm", "excluded"),
    [
        (Recipe("int4", "int4", 64), "W4A16", ()),
        (Recipe("int4", "none", 64), "W4A16", ("embed_tokens",)),
        (Recipe("int8", "int8", 64), "W8A16", ()),
    ],
)
def test_what_config_json_says(
    tmp_path: Path, recipe: Recipe, algorithm: str, excluded: tuple[str, ...]
) -> None:
    made = QuantizedCheckpoint(_open(tmp_path), recipe)
    assert made.quantization.quant_algo == algorithm
    assert made.quantization.exclude_modules == excluded


def test_a_router_stays_as_it_is_and_experts_do_not() -> None:
    recipe = Recipe("int4")
    assert recipe.bits("layers.3.mlp.gate") is None
    assert recipe.bits("layers.3.mlp.gate_proj") == 4
    assert recipe.bits("layers.3.mlp.experts.17.gate_proj") == 4


@pytest.mark.parametrize("tiny", [LLAMA, QWEN2, QWEN3, MOE], ids=lambda tiny: tiny.family)
@pytest.mark.parametrize("recipe", [Recipe("int4", "int8", 32), Recipe("int8", "int4", 64)])
def test_the_engine_computes_the_quantized_weights(tmp_path: Path, tiny: TinyLlama, recipe: Recipe) -> None:
    """The executor's packed form against the dequantized weights as a model of their own."""
    made = QuantizedCheckpoint(_open(tmp_path, tiny), recipe)
    weights = {
        (name if name == "lm_head" else f"model.{name}")
        + ("" if name.endswith(".bias") else ".weight"): made.tensor(name).dequantize()
        for name in tiny.weights()
    }
    twin = open_checkpoint(write_directory(tmp_path / "twin", tiny, tensors=weights))
    tokens = [5, 17, 200, 3, 99, 4, 250, 31]
    exact = all_logits(tiny_executor(twin, tmp_path / "twin.engine", compute="fp32"), tokens)
    fp32 = all_logits(tiny_executor(made, tmp_path / "fp32.engine", compute="fp32"), tokens)
    int8 = all_logits(tiny_executor(made, tmp_path / "int8.engine", compute="int8"), tokens)
    assert np.abs(fp32 - exact).max() < 1e-4 * np.abs(exact).max()
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (exact, int8))
    # Activations are rounded to 8 bits here, which these networks are made to be sensitive to.
    assert (np.exp(p) * (p - q)).sum(axis=-1).max() < 0.03


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    made = QuantizedCheckpoint(_open(tmp_path), Recipe("int4"))
    assert not made.has("lm_head")
    roles = {one.role: one.bits for one in take_inventory(made)}
    assert roles["embedding"] == roles["head"] == 8


def test_errors_are_those_of_the_weights(tmp_path: Path) -> None:
    inner = _open(tmp_path)
    made = QuantizedCheckpoint(inner, Recipe("int4", "int8", 32))
    assert list(made.errors()) == []
    names = ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    for name in names:
        exact, found = inner.tensor(name).dequantize(), made.tensor(name).dequantize()
        expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        [one] = [one for one in made.errors() if one.name == name]
        assert one.relative == pytest.approx(float(expected), rel=1e-4)
    made.tensor(names[0]).dequantize()  # reading again counts nothing twice
    assert [one.name for one in made.errors()] == names
    assert all(one.seen == one.rows for one in made.errors())


def test_rows_are_the_same_however_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = QuantizedCheckpoint(_open(tmp_path), Recipe("int4", "int8", 32)).tensor("layers.0.mlp.gate_proj")
    whole = weight.dequantize()
    monkeypatch.setattr("edgellm.quantize.checkpoint._BLOCK", 128 * 7)
    parts = [weight.dequantize(begin, begin + 24) for begin in range(0, 192, 24)]
    assert (np.concatenate(parts) == whole).all()


def test_an_error_that_was_half_counted_is_counted_anew() -> None:
    error = WeightError("w", 4, 32, rows=10, columns=32)
    error.note(0, 5, 1.0, 4.0)
    for begin in (0, 5, 0, 5):
        error.note(begin, begin + 5, 1.0, 4.0)
    assert (error.error, error.energy, error.seen) == (2.0, 8.0, 10)
    assert error.relative == 0.5


def test_what_is_quantized_already_is_refused_by_name(tmp_path: Path) -> None:
    path = replace(LLAMA, tied=False).write_gguf(tmp_path / "q.gguf", linear="Q4_0", embedding="F16")
    with pytest.raises(CheckpointError) as caught:
        QuantizedCheckpoint(open_checkpoint(path), Recipe("int4", group=32))
    message = str(caught.value)
    assert "is quantized already (layers.0.self_attn.q_proj, layers.0.self_attn.k_proj, " in message
    assert " and 10 more)" in message
    assert "embed_tokens" not in message


def test_a_group_that_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    inner = _open(tmp_path)  # 128 divides the hidden size, but not the MLP's 192
    with pytest.raises(UsageError) as caught:
        QuantizedCheckpoint(inner, Recipe("int4", group=128))
    assert str(caught.value) == (
        "--group-size 128 does not divide the 192 columns of layers.0.mlp.down_proj, "
        "layers.1.mlp.down_proj; --group-size 32 or --group-size 64 divides every row"
    )


def test_rows_that_no_group_divides(tmp_path: Path) -> None:
    inner = _open(tmp_path, TinyLlama(72, 9, 3, 16, 80, tied=False, rotary_base=1e5))
    with pytest.raises(UsageError, match="no group size divides every row: use --quant none"):
        QuantizedCheckpoint(inner, Recipe("int4", group=64))


def test_numbers_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    values = LLAMA.weights()["layers.1.mlp.up_proj"]
    values[3, 5] = -1e5
    path = write_directory(tmp_path / "tiny", LLAMA, tensors={"model.layers.1.mlp.up_proj.weight": values})
    made = QuantizedCheckpoint(open_checkpoint(path), Recipe("int4", group=64))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj.* beyond ±65504"):
        made.tensor("layers.1.mlp.up_proj").dequantize()

"""Random checkpoints: of the shape they claim, the same on every machine, and alive as networks."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgellm.checkpoint.random import QUANTS, Quant, RandomCheckpoint, random_checkpoint
from edgellm.checkpoint.random_models import MODELS, SMALL, TINY
from edgellm.errors import CheckpointError, UsageError
from edgellm.model.inventory import take_inventory
from edgellm.model.weights import Dense, Grouped
from edgellm.text.tokenizer import Tokenizer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant", QUANTS)
def test_every_shape_makes_a_network(name: str, quant: str) -> None:
    inventory = take_inventory(random_checkpoint(name, quant))
    # Parameters as the models' cards have them; a tied head is listed twice.
    spec = MODELS[name]
    head = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
    billions = (sum(each.elements for each in inventory) - head) / 1e9
    known = {
        "smollm2-135m": 0.1345,
        "qwen2.5-0.5b": 0.494,
        "qwen2.5-7b": 7.616,
        "qwen-7b-chat": 7.721,
        "qwen3-8b": 8.191,
        "qwen3-30b-a3b": 30.53,
    }
    assert billions == pytest.approx(known[name], rel=1e-3)


@pytest.mark.parametrize("name", [*TINY, *SMALL])
@pytest.mark.parametrize("quant", QUANTS)
def test_little_models_have_a_part_of_each_kind(name: str, quant: Quant) -> None:
    spec = (TINY | SMALL)[name]
    checkpoint = random_checkpoint(name, quant) if name in TINY else RandomCheckpoint(spec, name, quant)
    assert checkpoint.spec == spec
    inventory = take_inventory(checkpoint)
    assert sum(each.elements for each in inventory) < 20_000_000
    assert ("expert" in {each.role for each in inventory}) == (spec.moe is not None)
    assert spec.num_attention_heads > spec.num_key_value_heads


@pytest.mark.parametrize("quant", QUANTS)
def test_rows_do_not_depend_on_how_they_are_read(quant: str) -> None:
    weight = random_checkpoint("smollm2-135m", quant).tensor("layers.3.mlp.down_proj")
    whole = weight.dequantize()
    parts = [weight.dequantize(begin, begin + 96) for begin in range(0, 576, 96)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert whole.std() == pytest.approx(1536**-0.5, rel=0.1)
    assert abs(whole.mean()) < 0.1 * whole.std()


def test_numbers_are_the_same_everywhere_and_differ_between_tensors_and_seeds() -> None:
    first, other = random_checkpoint("qwen3-8b", "int4"), random_checkpoint("qwen3-8b", "int4", seed=1)
    name = "layers.35.self_attn.v_proj"
    weight = first.tensor(name)
    assert isinstance(weight, Grouped)
    groups = weight.read(1000, 1002)
    again = random_checkpoint("qwen3-8b", "int4").tensor(name)
    assert isinstance(again, Grouped)
    assert np.array_equal(again.read(1000, 1002).q, groups.q)
    assert groups.zero is not None
    assert set(groups.zero.ravel()) <= {7, 8}
    assert (groups.q.min(), groups.q.max()) == (0, 15)
    for different in (other.tensor(name), first.tensor("layers.34.self_attn.v_proj")):
        assert isinstance(different, Grouped)
        assert (different.read(1000, 1002).q != groups.q).mean() > 0.9


def test_a_tensor_larger_than_the_pool() -> None:
    weight = random_checkpoint("qwen3-8b", "int8").tensor("embed_tokens")
    assert isinstance(weight, Grouped)
    assert weight.shape == (151_936, 4096)
    begin = (32 << 20) // 4096 - 3  # somewhere in here the pool begins again
    rows = np.concatenate([weight.read(at, at + 1).q for at in range(begin, begin + 8)])
    assert np.array_equal(weight.read(begin, begin + 8).q, rows)


def test_columns_that_no_group_divides_stay_dense() -> None:
    spec = msgspec.structs.replace(MODELS["smollm2-135m"], intermediate_size=1000)
    checkpoint = RandomCheckpoint(spec, "odd", "int4")
    assert isinstance(checkpoint.tensor("layers.0.mlp.down_proj"), Dense)
    assert isinstance(checkpoint.tensor("layers.0.mlp.up_proj"), Grouped)


def test_its_tokenizer_has_a_token_for_each_byte_and_every_id(tmp_path: Path) -> None:
    checkpoint = random_checkpoint("smollm2-135m", "int4")
    (tmp_path / "tokenizer.json").write_bytes(checkpoint.tokenizer_json())
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == checkpoint.spec.vocab_size
    text = "Grüße, 世界 <|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == 256 == checkpoint.eos_ids[0]
    assert bytes(ids[:-1].tolist()) == "Grüße, 世界 ".encode()
    assert tokenizer.token_bytes(49_151) == b"<49151>"


def test_unknown_names_are_answered_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"--random gpt-5: there are smollm2-135m, "):
        random_checkpoint("gpt-5", "int4")
    with pytest.raises(UsageError, match=r"--quant int3: there are int4, int8, fp16"):
        random_checkpoint("qwen3-8b", "int3")
    with pytest.raises(CheckpointError, match=r"has no layers\.99\.mlp"):
        random_checkpoint("qwen3-8b", "int4").tensor("layers.99.mlp.up_proj")

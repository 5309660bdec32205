"""The emitted TensorRT network, interpreted layer by layer, against transformers and a float64 decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import packers
import pytest
from closeness import largest_kl, relative
from engines import row, run, tiny_executor
from model_directories import Tensors, write_directory
from numpy.typing import NDArray
from packers import quantize
from reference_decoder import reference_logits
from tiny_llama import TINY, TinyLlama
from trt_models import MAX_SEQ_LEN, InterpretedModel, emitted, trt_api

from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.checkpoint.random import Quant, RandomCheckpoint
from edgellm.checkpoint.random_models import model_of
from edgellm.errors import BuildError
from edgellm.model import weights
from edgellm.tensorrt.api import Api

pytestmark = pytest.mark.tensorrt

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "decoder.npz")
TIED = TINY["3/1 heads of 64, tied"]
WIDE = TinyLlama(128, 2, 1, 64, 256, tied=False, rotary_base=1e4)
TOKENS = np.random.default_rng(7).integers(0, TIED.vocab, 12).tolist()


def _all_logits(model: InterpretedModel, tokens: list[int]) -> NDArray[np.float32]:
    """Logits of every position, one token at a time."""
    return np.concatenate([model.step([(0, n, [token])]) for n, token in enumerate(tokens)])


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "mask"])
@pytest.mark.parametrize("name", TINY)
def test_an_unquantized_network_gives_transformers_logits(name: str, lengths: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_directory(tmp_path / "tiny", TINY[name]))
    tokens, expected = GOLDEN[f"{name}.tokens"].tolist(), GOLDEN[f"{name}.logits"]
    _assert_gives(checkpoint, trt_api(lengths=lengths), tokens, expected)


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "mask"])
def test_a_prompt_gives_the_same_logits_however_it_is_cut_and_batched(lengths: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TIED.write_gguf(tmp_path / "tiny.gguf", "Q4_1", "Q8_0"))
    net = emitted(checkpoint, trt_api(lengths=lengths))
    expected = _all_logits(InterpretedModel(net), TOKENS)
    model = InterpretedModel(net)
    cuts = [(0, 5), (5, 9), (9, 12)]
    for begin, end in cuts:
        logits = model.step([(1, begin, TOKENS[begin:end])])
        np.testing.assert_allclose(logits[0], expected[end - 1], atol=1e-4)
    # Ragged decode: rows of different lengths advance together, in any order of slots.
    model.step([(0, 0, TOKENS[:3])])
    model.step([(2, 0, TOKENS[:7])])
    logits = model.step([(2, 7, [TOKENS[7]]), (0, 3, [TOKENS[3]]), (1, 11, [TOKENS[11]])])
    np.testing.assert_allclose(logits, expected[[7, 3, 11]], atol=1e-4)


QUANTIZED = [
    ("Q4_1", "Q8_0", TIED),
    ("Q4_0", "Q4_0", TIED),
    ("Q8_0", "Q4_1", TIED),
    ("Q8_0", "Q5_1", replace(TIED, tied=False)),
    ("BF16", "F16", TIED),
    ("Q5_0", "Q8_0", replace(TIED, tied=False, heads=4, kv_heads=2)),
]


@pytest.mark.parametrize(("linear", "embedding", "tiny"), QUANTIZED)
def test_a_quantized_network_computes_its_dequantized_weights(
    linear: str, embedding: str, tiny: TinyLlama, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "tiny.gguf", linear, embedding))
    _assert_computes(checkpoint)


def test_parts_of_mixed_types_are_products_side_by_side(tmp_path: Path) -> None:
    tiny = replace(TINY["qwen2, untied"], hidden=256, inner=512, heads=16, kv_heads=8)
    others = {"v_proj": "Q8_0", "down_proj": "Q5_0", "q_proj": "Q5_1", "up_proj": "Q6_K"}
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "tiny.gguf", "Q4_K", "Q6_K", others))
    _assert_computes(checkpoint)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_an_awq_network_computes_the_formula(group: int, tmp_path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    path = write_directory(
        tmp_path / "tiny",
        WIDE,
        config={"quantization_config": config},
        linear=lambda layer, values: packers.awq(layer, quantize(values, group)),
    )
    _assert_computes(open_checkpoint(path))


@pytest.mark.parametrize("quant", ["int4", "int8", "fp16"])
def test_an_odd_vocabulary(quant: Quant) -> None:
    spec = model_of(
        "qwen3", vocabulary=97, hidden=128, layers=1, heads=(2, 1), head=64, inner=192, context=64
    )
    _assert_computes(RandomCheckpoint(spec, name="odd", quant=quant))


def test_an_act_order_network_gathers_the_columns(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}

    def linear(layer: str, values: NDArray[np.float32]) -> Tensors:
        order = np.random.default_rng(len(layer)).permutation(values.shape[1]) // 32
        return packers.gptq(layer, quantize(values, 32, group_of=order))

    _assert_computes(
        open_checkpoint(
            write_directory(tmp_path / "tiny", WIDE, config={"quantization_config": config}, linear=linear)
        )
    )


def _assert_computes(checkpoint: Checkpoint) -> None:
    tokens = [token % checkpoint.spec.vocab_size for token in TOKENS]
    _assert_gives(checkpoint, trt_api(), tokens, reference_logits(checkpoint, tokens))


def _assert_gives(
    checkpoint: Checkpoint, api: Api, tokens: list[int], expected: NDArray[np.floating]
) -> None:
    """The float32 network computes the logits, the float16 one, rounded at every layer, nearly."""
    exact = InterpretedModel(emitted(checkpoint, api, compute="fp32"))
    assert relative(_all_logits(exact, tokens), expected) < 1e-4
    half = InterpretedModel(emitted(checkpoint, api), rounded=True)
    assert largest_kl(_all_logits(half, tokens), expected) < 0.005


def test_four_bit_weights_stay_four_bits(tmp_path: Path) -> None:
    tiny = replace(WIDE, hidden=256, inner=512, heads=4, kv_heads=2)
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "tiny.gguf", "Q4_1", "Q8_0"))
    net = emitted(checkpoint, trt_api())
    matrices = [checkpoint.tensor(f"layers.{i}.mlp.{part}_proj") for i in range(2) for part in ("up", "down")]
    elements = sum(weight.shape[0] * weight.shape[1] for weight in matrices)
    emitted_bytes = sum(
        array.nbytes for name, array in net.arrays.items() if name.startswith(("gate_up", "linear"))
    )
    # Gate is as large as up, o is 256 × 256: 4 bits, and 4 bytes of scale and rest for 32 of them.
    elements += elements // 2 + 2 * 256 * 256
    assert emitted_bytes == elements * (4 + 32 / 32) / 8


@pytest.mark.parametrize(("linear", "embedding"), [("Q4_1", "Q8_0"), ("Q8_0", "Q4_0"), ("F16", "F32")])
@pytest.mark.parametrize("size", [1, 3 * 192, 8 * 192], ids=["a row", "odd", "even"])
def test_weights_are_read_in_pieces_and_give_the_same_constants(
    linear: str, embedding: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(TIED.write_gguf(tmp_path / "tiny.gguf", linear, embedding))
    whole = emitted(checkpoint, trt_api())
    monkeypatch.setattr(weights, "BLOCK_BYTES", size)
    monkeypatch.setattr(weights, "BLOCK_ROWS", 2**30)
    widest = max(len(checkpoint.tensor(name).blocks()) for name in ("embed_tokens", "norm"))
    assert widest > 10
    pieces = emitted(checkpoint, trt_api())
    assert pieces.arrays.keys() == whole.arrays.keys()
    for name, array in whole.arrays.items():
        assert np.array_equal(pieces.arrays[name], array), name


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mask_lets_every_token_see_itself_and_what_came_before(count: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TIED.write_gguf(tmp_path / "tiny.gguf"))
    net = emitted(checkpoint, trt_api(lengths=False))
    model = InterpretedModel(net)
    interpreter = model._interpreter
    for past in range(MAX_SEQ_LEN - count + 1):
        positions = past + np.arange(count)[None]
        feeds = {name: np.nan_to_num(cache[:1]) for name, cache in model._caches.items()}
        feeds |= {"tokens": np.zeros((1, count), int), "positions": positions, "past": np.array([past])}
        mask = interpreter.run({**feeds, "last": np.array([0])})["mask"]
        assert mask.shape == (1, 1, count, MAX_SEQ_LEN)
        for i in range(count):
            assert mask[0, 0, i].tolist() == [s <= past + i for s in range(MAX_SEQ_LEN)]


def test_groups_that_tensorrt_does_not_know_are_refused_by_name(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
    path = write_directory(
        tmp_path / "tiny",
        WIDE,
        config={"quantization_config": config},
        linear=lambda layer, values: packers.awq(layer, quantize(values, 8)),
    )
    with pytest.raises(BuildError, match=r"q_proj has groups of 8.*--executor cuda"):
        emitted(open_checkpoint(path), trt_api())


def test_odd_heads_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(replace(TIED, head_size=12).write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(BuildError, match="head_size 12"):
        emitted(checkpoint, trt_api())


@pytest.mark.model
def test_the_real_network_gives_the_cpu_executors_logits(smollm2_gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    tokens = np.random.default_rng(3).integers(0, checkpoint.spec.vocab_size, 8).tolist()
    executor = tiny_executor(checkpoint, tmp_path / "engine", compute="fp32")
    expected = np.concatenate([run(executor, row(0, 0, tokens[:n])) for n in (5, 7, 8)])
    net = emitted(checkpoint, trt_api())
    for rounded in (False, True):
        model = InterpretedModel(net, rounded=rounded)
        # A prompt, a second chunk of it behind what is there, a decode step.
        chunks = [model.step([(0, a, tokens[a:b])]) for a, b in ((0, 5), (5, 7), (7, 8))]
        assert largest_kl(np.concatenate(chunks), expected) < 0.005
        if not rounded:
            assert relative(np.concatenate(chunks), expected) < 5e-3

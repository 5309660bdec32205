"""One layer of the models that matter, for 8.6: that their weights stay 4 bits is what a plan is for.

Fewer rows of vocabulary than the models have: the head and the embedding are one matrix each, however long.
"""

from __future__ import annotations

import math

import pytest
from msgspec import structs
from trt_models import trt_api

from edgellm.checkpoint.random import RandomCheckpoint
from edgellm.checkpoint.random_models import MODELS
from edgellm.enginedir import BuildConfig
from edgellm.model.spec import ModelSpec
from edgellm.tensorrt.plan import build_plan

pytestmark = pytest.mark.tensorrt

VOCABULARY = 32_000
BUILD = BuildConfig(
    max_input_len=2047,
    max_seq_len=2048,
    max_batch_size=4,
    max_num_tokens=256,
    opt_batch_size=4,
    opt_num_tokens=256,
)
CODE_BYTES = 32 << 20
"""Kernels and the graph of a plan, beside its weights."""


def _matrix_elements(spec: ModelSpec) -> int:
    """Of all matrices, from the model's published shape alone."""
    hidden, head = spec.hidden_size, spec.head_size
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    if spec.moe is None:
        mlp = 3 * hidden * spec.intermediate_size
    else:
        assert spec.moe_intermediate_size is not None
        mlp = spec.moe.num_experts * (3 * hidden * spec.moe_intermediate_size + hidden)
    return 2 * spec.vocab_size * hidden + spec.num_hidden_layers * (attention + mlp)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen-7b-chat", "qwen3-30b-a3b"])
def test_a_layer_keeps_its_four_bits(name: str) -> None:
    spec = structs.replace(MODELS[name], num_hidden_layers=1, vocab_size=VOCABULARY)
    checkpoint = RandomCheckpoint(spec, name=name, quant="int4")
    plan = build_plan(checkpoint, trt_api(), BUILD, targets=[86], progress=lambda _part, _done: None)
    elements = _matrix_elements(spec)

    # Each profile names the constants anew: `…_myl0` and `…_myl1`.
    for profile in ("myl0", "myl1"):
        constants = {tensor for layer in plan.layers for tensor in layer.constants if profile in tensor.name}
        packed = sum(math.prod(tensor.shape) for tensor in constants if tensor.dtype == "Int4")
        wide = sum(math.prod(tensor.shape) for tensor in constants if tensor.dtype in ("Half", "Float"))
        assert packed == elements
        assert wide < elements / 32  # a scale and an offset for a group of 128, rotary tables, norms

    assert plan.warnings == []
    assert elements / 2 < plan.weight_bytes <= 1.05 * plan.emitted_bytes
    assert plan.emitted_bytes < elements * (4 + 2 * 16 / 64) / 8 * 1.02
    assert plan.data.nbytes < plan.weight_bytes + CODE_BYTES
    assert max(plan.activation_bytes) < 64e6

"""Shapes that random weights are made of: those of published models, and little ones of each family.

What makes a family, such as its biases, is written once; everything else is numbers.
"""

from __future__ import annotations

from typing import Any, Final

from edgellm.model.spec import Mixture, ModelSpec

_FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": {"architecture": "LlamaForCausalLM", "norm_epsilon": 1e-5},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "norm_epsilon": 1e-6, "attn_bias": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "norm_epsilon": 1e-6, "qk_layernorm": True},
    "qwen3-moe": {"architecture": "Qwen3MoeForCausalLM", "norm_epsilon": 1e-6, "qk_layernorm": True},
}


def model_of(
    family: str,
    *,
    vocabulary: int,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    head: int,
    inner: int,
    context: int,
    base: float = 10_000.0,
    tied: bool = False,
    experts: tuple[int, int, int] | None = None,
) -> ModelSpec:
    """A model's numbers.

    Args:
        family: llama, qwen2, qwen3 or qwen3-moe.
        heads: of queries, and of keys and values.
        inner: width of an MLP.
        base: of the rotary frequencies.
        tied: the head is the embedding.
        experts: how many, how many of them for a token, and their width; None: each layer has one MLP.
    """
    return ModelSpec(
        **_FAMILIES[family],
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_size=head,
        intermediate_size=inner,
        max_position_embeddings=context,
        rotary_base=base,
        tie_word_embeddings=tied,
        moe=None if experts is None else Mixture(num_experts=experts[0], top_k=experts[1]),
        moe_intermediate_size=0 if experts is None else experts[2],
    )


MODELS: Final[dict[str, ModelSpec]] = {
    "smollm2-135m": model_of(
        "llama",
        vocabulary=49_152,
        hidden=576,
        layers=30,
        heads=(9, 3),
        head=64,
        inner=1536,
        context=8192,
        base=100_000.0,
        tied=True,
    ),
    "qwen2.5-0.5b": model_of(
        "qwen2",
        vocabulary=151_936,
        hidden=896,
        layers=24,
        heads=(14, 2),
        head=64,
        inner=4864,
        context=32_768,
        base=1_000_000.0,
        tied=True,
    ),
    "qwen2.5-7b": model_of(
        "qwen2",
        vocabulary=152_064,
        hidden=3584,
        layers=28,
        heads=(28, 4),
        head=128,
        inner=18_944,
        context=32_768,
        base=1_000_000.0,
    ),
    # QWenLMHeadModel's numbers in Qwen2's form, which computes the same.
    "qwen-7b-chat": model_of(
        "qwen2",
        vocabulary=151_936,
        hidden=4096,
        layers=32,
        heads=(32, 32),
        head=128,
        inner=11_008,
        context=8192,
    ),
    "qwen3-8b": model_of(
        "qwen3",
        vocabulary=151_936,
        hidden=4096,
        layers=36,
        heads=(32, 8),
        head=128,
        inner=12_288,
        context=40_960,
        base=1_000_000.0,
    ),
    "qwen3-30b-a3b": model_of(
        "qwen3-moe",
        vocabulary=151_936,
        hidden=2048,
        layers=48,
        heads=(32, 4),
        head=128,
        inner=6144,
        context=40_960,
        base=1_000_000.0,
        experts=(128, 8, 768),
    ),
}
"""Name → numbers, of the models' own config.json."""


def _tiny(family: str, **numbers: Any) -> ModelSpec:
    return model_of(family, layers=2, context=512, **numbers)


TINY: Final[dict[str, ModelSpec]] = {
    "tiny-llama": _tiny("llama", vocabulary=300, hidden=128, heads=(3, 1), head=64, inner=192, tied=True),
    "tiny-qwen2": _tiny("qwen2", vocabulary=301, hidden=256, heads=(4, 2), head=64, inner=320),
    "tiny-qwen3": _tiny("qwen3", vocabulary=320, hidden=128, heads=(2, 1), head=128, inner=256),
    "tiny-qwen3-moe": _tiny(
        "qwen3-moe", vocabulary=320, hidden=128, heads=(2, 1), head=64, inner=256, experts=(6, 2, 64)
    ),
}
"""One of each family that every executor builds and runs in moments: for tests, and to try things."""


def _small(family: str, **numbers: Any) -> ModelSpec:
    return model_of(family, context=2048, **numbers)


def _small_mixture(experts: int, top_k: int) -> ModelSpec:
    numbers = {"vocabulary": 1024, "hidden": 256, "layers": 3, "heads": (4, 2), "head": 64, "inner": 512}
    return _small("qwen3-moe", **numbers, base=1e6, experts=(experts, top_k, 192))


SMALL: Final[dict[str, ModelSpec]] = {
    "llama, 6/2 heads of 64, tied": _small(
        "llama", vocabulary=1000, hidden=384, layers=3, heads=(6, 2), head=64, inner=1024, tied=True
    ),
    "qwen2, 7/1 heads of 64, biases": _small(
        "qwen2", vocabulary=777, hidden=448, layers=2, heads=(7, 1), head=64, inner=640, base=1e6
    ),
    "qwen3, 8/2 heads of 128, head norms": _small(
        "qwen3", vocabulary=2048, hidden=512, layers=3, heads=(8, 2), head=128, inner=1536, base=1e6
    ),
    "qwen3 moe, 4 of 24 experts": _small_mixture(24, 4),
    "qwen3 moe, all of 6 experts": _small_mixture(6, 6),
}
"""Large enough that a device's kernels part their work, small enough for float32 numpy to check it."""

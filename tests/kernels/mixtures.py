"""Mixtures of experts as models have them, and some at the edges of what kernels do."""

from __future__ import annotations

from edgellm.kernels.moe_shape import MixtureShape
from edgellm.kernels.packing import PackedShape, Zero


def mixture(
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    bits: int,
    group: int,
    zero: Zero,
    normalize: bool = True,
) -> MixtureShape:
    return MixtureShape(
        top_k,
        normalize,
        PackedShape(experts, hidden, 16, 64, "none"),
        PackedShape(2 * inner, hidden, bits, group, zero, swiglu=True),
        PackedShape(hidden, inner, bits, group, zero),
    )


MIXTURES = {
    "Qwen3-30B-A3B": mixture(128, 8, 2048, 768, 4, 128, "zero_point"),
    "Qwen3-30B-A3B, Q4_1": mixture(128, 8, 2048, 768, 4, 32, "offset"),
    "Qwen3-30B-A3B, 8 bits": mixture(128, 8, 2048, 768, 8, 128, "none"),
    "Qwen3-235B-A22B": mixture(128, 8, 4096, 1536, 4, 128, "centred"),
    "Qwen1.5-MoE-A2.7B": mixture(60, 4, 2048, 1408, 4, 64, "zero_point", normalize=False),
    "dense": mixture(8, 2, 512, 192, 16, 64, "none"),
    "512 experts": mixture(512, 32, 256, 128, 8, 16, "zero_point"),
}

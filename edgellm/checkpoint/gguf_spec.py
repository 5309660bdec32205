"""A GGUF file's keys → `ModelSpec`: llama, qwen, qwen2, qwen3 and qwen3moe; Mistral's models say llama.

Keys are those of llama.cpp's gguf-py (constants.py), and mean what llama.cpp makes of them. Which of them are
read, and which are refused, is `gguf_keys.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_keys import check_keys
from edgellm.checkpoint.gguf_layouts import weight
from edgellm.errors import CheckpointError
from edgellm.model.rotary import (
    DivisorScaling,
    LinearScaling,
    RotaryScaling,
    YarnScaling,
    make_rotary,
)
from edgellm.model.spec import Mixture, ModelSpec, Normalization


@dataclass(frozen=True, slots=True)
class Architecture:
    """What `general.architecture` stands for.

    Attributes:
        name: Hugging Face's class name.
        permuted: whether rows of q and k are in llama.cpp's order, rotary pairs adjacent.
        biases: whether q, k and v always have biases; others may.
        head_norms: whether query and key heads are normalised.
        fused_qkv: whether q, k and v are one tensor.
        mlps: how many MLPs wide `feed_forward_length` is.
        longest: tokens from which on the model may compute otherwise, which its keys do not tell.
    """

    name: str
    permuted: bool = False
    biases: bool = False
    head_norms: bool = False
    fused_qkv: bool = False
    mlps: int = 1
    longest: int | None = None


ARCHITECTURES: Final = {
    "llama": Architecture("LlamaForCausalLM", permuted=True),
    # Beyond its config's seq_length it scales queries and frequencies; there are models of 2048.
    "qwen": Architecture("QWenLMHeadModel", biases=True, fused_qkv=True, mlps=2, longest=2048),
    "qwen2": Architecture("Qwen2ForCausalLM", biases=True),
    "qwen3": Architecture("Qwen3ForCausalLM", head_norms=True),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", head_norms=True),
}
"""By `general.architecture`."""

ROPE_FREQS: Final = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how convert_hf_to_gguf.py writes Llama 3.1's scaling."""


def read_spec(file: GgufFile) -> ModelSpec:
    """The numbers of a model, from its keys and from which tensors it has.

    Raises:
        CheckpointError: a key is missing, makes no sense, or asks for what edgellm does not do.
    """
    architecture = file.string("general.architecture")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{file.path} has general.architecture {architecture}; edgellm reads {supported}"
        )
    check_keys(file, architecture)

    def integer(suffix: str, default: int | None = None) -> int:
        return file.integer(f"{architecture}.{suffix}", default, minimum=1)

    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    kv_heads = integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{file.path} has {heads} heads (attention.head_count), no multiple of {kv_heads} key/value heads"
        )
    if f"{architecture}.attention.key_length" not in file.values and hidden % heads:
        raise CheckpointError(f"{file.path} has {heads} heads, which do not divide embedding_length {hidden}")
    head = integer("attention.key_length", hidden // heads)
    if (value_head := integer("attention.value_length", head)) != head:
        raise CheckpointError(
            f"{file.path} has {architecture}.attention.value_length {value_head}, key_length {head}; "
            "edgellm wants them equal"
        )
    rotary = integer("rope.dimension_count", head)
    if head % 2 or rotary != head:
        raise CheckpointError(
            f"{file.path} has {architecture}.rope.dimension_count {rotary} for heads of {head}; "
            "edgellm rotates whole heads of even width"
        )
    layers = integer("block_count")
    if layers > len(file.tensors):
        raise CheckpointError(
            f"{file.path}: {architecture}.block_count is {layers}, for {len(file.tensors)} tensors in all"
        )
    epsilon = file.real(f"{architecture}.attention.layer_norm_rms_epsilon")
    base = file.real(f"{architecture}.rope.freq_base", 10000.0)
    for key, number in (("attention.layer_norm_rms_epsilon", epsilon), ("rope.freq_base", base)):
        if number <= 0:
            raise CheckpointError(f"{file.path}: {architecture}.{key} is {number}, which should be positive")
    known, experts = ARCHITECTURES[architecture], architecture == "qwen3moe"
    if not experts and file.integer(f"{architecture}.expert_count", 0):
        raise CheckpointError(f"{file.path} has {architecture}.expert_count, which edgellm does not support")
    context, inner = integer("context_length"), integer("feed_forward_length")
    if inner % known.mlps:
        raise CheckpointError(f"{file.path}: {architecture}.feed_forward_length is {inner}, an odd number")
    return ModelSpec(
        architecture=known.name,
        vocab_size=len(file.strings("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=head,
        intermediate_size=inner // known.mlps,
        norm_epsilon=epsilon,
        max_position_embeddings=context if known.longest is None else min(context, known.longest),
        rotary_base=base,
        rotary_scaling=_rotary_scaling(file, architecture, head, base),
        sliding_window=file.integer(f"{architecture}.attention.sliding_window", 0) or None,
        qk_layernorm=known.head_norms,
        attn_bias=known.biases or "blk.0.attn_q.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        moe=_mixture(file, architecture) if experts else None,
        moe_intermediate_size=integer("expert_feed_forward_length") if experts else 0,
    )


def _mixture(file: GgufFile, architecture: str) -> Mixture:
    """Every layer is one, and weights are normalised, whatever the model had: so llama.cpp computes them."""
    experts = file.integer(f"{architecture}.expert_count", minimum=1)
    top_k = file.integer(f"{architecture}.expert_used_count", minimum=1)
    if top_k > experts:
        raise CheckpointError(
            f"{file.path}: {architecture}.expert_used_count {top_k} is more than expert_count {experts}"
        )
    return Mixture(num_experts=experts, top_k=top_k, normalization_mode=Normalization.RENORMALIZE)


def _rotary_scaling(file: GgufFile, architecture: str, head: int, base: float) -> RotaryScaling | None:
    stored = _divisors(file, head) if ROPE_FREQS in file.tensors else None
    keyed = _keyed_scaling(file, architecture)
    if stored is not None and keyed is not None:
        raise CheckpointError(
            f"{file.path} scales its rotary frequencies twice, by {architecture}.rope.scaling.type "
            f"and by tensor {ROPE_FREQS}; edgellm does either"
        )
    scaling = stored or keyed
    try:
        make_rotary(head, base, scaling)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: its rotary scaling makes no sense: {error}") from error
    return scaling


def _keyed_scaling(file: GgufFile, architecture: str) -> RotaryScaling | None:
    """What rope.scaling.* say. As in llama.cpp, a factor without a type is linear."""
    here = f"{architecture}.rope.scaling"
    kind = file.string(f"{here}.type", "linear")
    factor = file.real(f"{here}.factor", file.real(f"{architecture}.rope.scale_linear", 0.0))
    match kind:
        case "none":
            return None
        case "linear":
            return LinearScaling(factor=factor) if factor not in (0.0, 1.0) else None
        case "yarn":
            context = file.integer(f"{architecture}.context_length", minimum=1)
            return YarnScaling(
                factor=factor,
                original_max_position_embeddings=file.integer(
                    f"{here}.original_context_length", context, minimum=1
                ),
                beta_fast=file.real(f"{here}.yarn_beta_fast", 32.0),
                beta_slow=file.real(f"{here}.yarn_beta_slow", 1.0),
            )
    raise CheckpointError(f"{file.path} has {here}.type {kind}; edgellm does none, linear and yarn")


def _divisors(file: GgufFile, head: int) -> DivisorScaling:
    info = file.tensors[ROPE_FREQS]
    if info.shape != (head // 2,) or info.type.elements != 1:
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FREQS} is {info.type.name} of shape {info.shape}; "
            f"heads of {head} need {head // 2} floats"
        )
    return DivisorScaling(divisors=tuple(weight(file, info).dequantize().tolist()))

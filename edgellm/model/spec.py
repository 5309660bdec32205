"""What a model is, apart from its weights: the numbers that config.json carries."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from edgellm.model.rotary import RotaryScaling


class Normalization(IntEnum):
    """TensorRT-LLM's `MoeConfig.ExpertScaleNormalizationMode`, as far as edgellm has it."""

    NONE = 0
    """The chosen experts' probabilities are their weights; they sum to less than 1."""
    RENORMALIZE = 1
    """They are divided by their sum."""


class Mixture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a mixture of experts is routed. Names are TensorRT-LLM's `pretrained_config.moe`.

    Attributes:
        num_experts: MLPs in a layer.
        top_k: of them that a token goes through.
        normalization_mode: how the weights of these come from the router's probabilities.
        dense_layers: layers that have one MLP of `intermediate_size` instead, ascending.
    """

    num_experts: int
    top_k: int
    normalization_mode: Normalization = Normalization.RENORMALIZE
    dense_layers: tuple[int, ...] = ()


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer. Names are TensorRT-LLM's `pretrained_config`.

    Attributes:
        architecture: Hugging Face's class name, e.g. `LlamaForCausalLM`.
        vocab_size: rows of the embedding and width of the logits.
        hidden_size: width of the residual stream.
        num_hidden_layers: decoder blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; divides num_attention_heads.
        head_size: width of a head; need not be hidden_size / heads.
        intermediate_size: width inside the gated MLP.
        moe: how tokens are routed where layers are mixtures of experts, or None.
        moe_intermediate_size: width inside an expert; 0 where there are none.
        norm_epsilon: added to the mean square in every RMSNorm.
        max_position_embeddings: context the model was trained for.
        rotary_base: theta of the rotary embedding.
        rotary_scaling: how the rotary embedding was stretched to a longer context, or None.
        sliding_window: positions that a token attends to, itself included, or None for all of them. edgellm
            runs such a model within one window only, where it makes no difference.
        qk_layernorm: RMSNorm on each query and key head before the rotary embedding (Qwen3).
        attn_bias: q, k and v projections have biases (Qwen2).
        tie_word_embeddings: the head is the embedding matrix.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    norm_epsilon: float
    max_position_embeddings: int
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    sliding_window: int | None = None
    hidden_act: str = "silu"
    position_embedding_type: str = "rope_gpt_neox"
    qk_layernorm: bool = False
    attn_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    moe: Mixture | None = None
    moe_intermediate_size: int = 0

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def max_context(self) -> int:
        """The longest context that the model can be run with here."""
        longest = self.max_position_embeddings
        return longest if self.sliding_window is None else min(longest, self.sliding_window)

    @property
    def queries_per_key(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def kv_elements_per_token(self) -> int:
        """Numbers that one token leaves in the caches of all layers: layers · 2 · kv_heads · head_size."""
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_size

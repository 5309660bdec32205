"""Hugging Face's config.json → ModelSpec: which keys make which architecture.

Keys and defaults are those of transformers' configuration classes. A key that is not known here is refused
unless it is off (null, false, empty): one that was silently ignored could be a model that answers a little
worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgellm.checkpoint.config_file import ConfigFile
from edgellm.errors import CheckpointError
from edgellm.model.rotary import LinearScaling, Llama3Scaling, RotaryScaling, YarnScaling, make_rotary
from edgellm.model.spec import Mixture, ModelSpec, Normalization

CONFIG: Final = "config.json"


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's code does, beyond what its config.json says.

    Attributes:
        qkv_bias: q, k and v always have biases.
        attention_bias: the config can ask for biases on q, k, v and o.
        mlp_bias: the config can ask for biases in the MLP.
        qk_layernorm: query and key heads are normalised.
        head_dim: the config must give head_dim, which is no quotient of others.
        kv_heads: the config must give num_key_value_heads.
        mixture: layers are mixtures of experts, unless the config says that they are not.
        window: the key that switches sliding windows on; `sliding_window` itself where there is none.
    """

    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_layernorm: bool = False
    head_dim: bool = False
    kv_heads: bool = True
    mixture: bool = False
    window: str = "use_sliding_window"


FAMILIES: Final = {
    "LlamaForCausalLM": Family(attention_bias=True, mlp_bias=True, kv_heads=False),
    "MistralForCausalLM": Family(window="sliding_window"),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(attention_bias=True, qk_layernorm=True, head_dim=True),
    "Qwen3MoeForCausalLM": Family(attention_bias=True, qk_layernorm=True, head_dim=True, mixture=True),
}
"""`architectures` → what is particular to it."""

_READ: Final = frozenset(
    {
        "architectures",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    }
)
_MIXTURE_READ: Final = frozenset(
    {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        # Of the loss in training.
        "output_router_logits",
        "router_aux_loss_coef",
    }
)
NO_ARITHMETIC: Final = frozenset(
    {
        "attention_dropout",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "name_or_path",
        "num_labels",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        # Defaults of sampling, which older files keep here.
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "length_penalty",
        "max_length",
        "min_length",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
_ROPE_READ: Final = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_SCALINGS: Final[dict[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "truncate",
        }
    ),
}
"""`rope_type` → the keys that belong to it."""


def family_of(config: ConfigFile) -> Family:
    """What is particular to the config's architecture.

    Raises:
        CheckpointError: there is none, or edgellm does not read it.
    """
    return FAMILIES[_architecture(config)]


def read_spec(config: ConfigFile) -> ModelSpec:
    """The model's numbers.

    Raises:
        CheckpointError: a value is missing or makes no sense, or asks for what edgellm does not do.
    """
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    config.require_known(_READ | NO_ARITHMETIC | (_MIXTURE_READ if family.mixture else frozenset()))
    for key, possible in (("attention_bias", family.attention_bias), ("mlp_bias", family.mlp_bias)):
        # Qwen2's code has its biases without asking.
        redundant = key == "attention_bias" and family.qkv_bias
        if config.boolean(key, False) and not possible and not redundant:
            raise config.unsupported(key)

    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", None if family.kv_heads else heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if config.values.get("head_dim") is None and hidden % heads and not family.head_dim:
        raise CheckpointError(
            f"{config.where}: num_attention_heads {heads} does not divide hidden_size {hidden}, "
            "and there is no head_dim"
        )
    head = config.integer("head_dim", None if family.head_dim else hidden // heads)
    if head % 2:
        raise CheckpointError(f"{config.where}: heads of {head} cannot be rotated; head_dim must be even")
    layers, context = config.integer("num_hidden_layers"), config.integer("max_position_embeddings")
    base, scaling = _rotary(config, head, context)
    if config.string("hidden_act") != "silu":
        raise config.unsupported("hidden_act")
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=head,
        intermediate_size=config.integer("intermediate_size"),
        norm_epsilon=config.positive("rms_norm_eps"),
        max_position_embeddings=context,
        rotary_base=base,
        rotary_scaling=scaling,
        sliding_window=_window(config, family, layers, context),
        qk_layernorm=family.qk_layernorm,
        attn_bias=family.qkv_bias or config.boolean("attention_bias", False),
        mlp_bias=config.boolean("mlp_bias", False),
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        moe=_mixture(config, layers) if family.mixture else None,
        moe_intermediate_size=config.integer("moe_intermediate_size") if family.mixture else 0,
    )


def _architecture(config: ConfigFile) -> str:
    match config.values.get("architectures"):
        case [str(architecture)] if architecture in FAMILIES:
            return architecture
        case found:
            raise CheckpointError(
                f"{config.where} has architectures {found!r:.80}; "
                f"edgellm reads {', '.join([*FAMILIES, 'QWenLMHeadModel'])}"
            )


def _mixture(config: ConfigFile, layers: int) -> Mixture:
    """How experts are chosen, and in which layers there are any."""
    keys = [key for key in ("num_experts", "num_local_experts") if config.values.get(key) is not None]
    experts, top_k = config.integer(keys[0] if keys else "num_experts"), config.integer("num_experts_per_tok")
    if any(config.integer(key) != experts for key in keys):
        raise config.wrong(keys[1], config.values[keys[1]], f"num_experts, {experts}")
    if top_k > experts:
        raise CheckpointError(
            f"{config.where}: num_experts_per_tok {top_k} is more than num_experts {experts}"
        )
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(layer not in range(layers) for layer in dense):
        raise config.wrong("mlp_only_layers", dense, f"a list of layers below {layers}")
    # As in transformers' Qwen3MoeDecoderLayer.
    step = config.integer("decoder_sparse_step", 1)
    normalized = config.boolean("norm_topk_prob", False)
    return Mixture(
        num_experts=experts,
        top_k=top_k,
        normalization_mode=Normalization.RENORMALIZE if normalized else Normalization.NONE,
        dense_layers=tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step),
    )


def _rotary(config: ConfigFile, head: int, context: int) -> tuple[float, RotaryScaling | None]:
    """theta and scaling; transformers 5 has both in `rope_parameters`, older ones theta apart."""
    base, scaling = config.positive("rope_theta", 10000.0), None
    if config.positive("partial_rotary_factor", 1.0) != 1:
        raise config.unsupported("partial_rotary_factor")
    for where in (config.section("rope_parameters"), config.section("rope_scaling")):
        if where is None:
            continue
        if where.positive("partial_rotary_factor", 1.0) != 1:
            raise where.unsupported("partial_rotary_factor")
        key = "rope_type" if where.values.get("rope_type") is not None else "type"
        kind = where.string(key, "default")
        if kind not in _SCALINGS:
            raise where.unsupported(key)
        where.require_known(_ROPE_READ | _SCALINGS[kind])
        scaling = _scaling(where, kind, context) or scaling
        base = where.positive("rope_theta", base)
        try:
            make_rotary(head, base, scaling)
        except ValueError as error:
            raise CheckpointError(f"{where.where}: {error}") from error
    return base, scaling


def _scaling(where: ConfigFile, kind: str, context: int) -> RotaryScaling | None:
    if kind == "linear":
        return LinearScaling(factor=where.positive("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=where.positive("factor"),
            low_freq_factor=where.positive("low_freq_factor"),
            high_freq_factor=where.positive("high_freq_factor"),
            original_max_position_embeddings=where.integer("original_max_position_embeddings"),
        )
    if kind == "yarn":
        length = where.values.get("attention_factor")
        return YarnScaling(
            factor=where.positive("factor"),
            original_max_position_embeddings=where.integer("original_max_position_embeddings", context),
            beta_fast=where.positive("beta_fast", 32.0),
            beta_slow=where.positive("beta_slow", 1.0),
            attention_factor=None if length is None else where.positive("attention_factor"),
            truncate=where.boolean("truncate", True),
        )
    return None


def _window(config: ConfigFile, family: Family, layers: int, context: int) -> int | None:
    """Positions that a token sees in the layers that see the fewest; None for all of them."""
    kinds = config.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise config.wrong("layer_types", kinds, f"a list of {layers}")
    if kinds is not None and any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise config.unsupported("layer_types")
    switched_on = family.window == "sliding_window" or config.boolean(family.window, False)
    if not switched_on or config.values.get("sliding_window") is None:
        if kinds is not None and "sliding_attention" in kinds:
            raise config.unsupported("layer_types")
        return None
    # A window as wide as the context, or one that begins at a layer that is not there, changes nothing.
    window = config.integer("sliding_window")
    first = config.integer("max_window_layers", 0, minimum=0) if family.window != "sliding_window" else 0
    narrow = "sliding_attention" in kinds if kinds is not None else first < layers
    return window if narrow and window < context else None

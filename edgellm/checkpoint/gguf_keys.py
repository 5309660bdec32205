"""Which of a GGUF file's keys say something that edgellm does not do; those are refused, by name.

Keys are those of llama.cpp's gguf-py (constants.py, `Keys`), and mean what llama.cpp makes of them
(llama-model.cpp, `load_hparams`). A key of the architecture's own, `llama.*`, can change what the model
computes, and one that was silently ignored would be a model that answers a little worse. So each of them is
read, or is known to change nothing, or has a value that changes nothing; any other is refused.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_header import Value
from edgellm.errors import CheckpointError

READ: Final = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
"""What `gguf_spec` reads, after `{architecture}.`."""

HARMLESS: Final = frozenset(
    {
        # Which layers the window is for. No context is longer than the window, where all of them are alike.
        "attention.sliding_window_pattern",
        # Notes: how the rotary scaling was come by, how rows lie (there is one way), how many tokens.
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vocab_size",
    }
)
"""What changes nothing, whatever it says."""

NEUTRAL: Final[dict[str, tuple[float | bool, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    # Softmax.
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    # An embedding model's: its last layer was not trained to tell the next token.
    "pooling_type": (0,),
    "rescale_every_n_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
    "use_parallel_residual": (False,),
}
"""What changes the arithmetic in ways edgellm does not do, with the values that change nothing. An array has
a value for each layer, and changes nothing if none of them does."""


def check_keys(file: GgufFile, architecture: str) -> None:
    """Look at every key that could change what the model computes.

    Raises:
        CheckpointError: one asks for what edgellm does not do, or is not known; with what would be fine.
    """
    if (kind := file.string("general.type", "model")) != "model":
        raise CheckpointError(
            f"{file.path} has general.type {kind}; edgellm reads model, a whole language model"
        )
    if (parts := file.integer("split.count", 1)) > 1:
        raise CheckpointError(
            f"{file.path} is one of {parts} parts (split.count); edgellm reads one file: "
            "join them with `llama-gguf-split --merge`"
        )
    prefix = f"{architecture}."
    for key, value in file.values.items():
        suffix = key.removeprefix(prefix)
        if suffix == key or suffix in READ or suffix in HARMLESS:
            continue
        if suffix not in NEUTRAL:
            raise CheckpointError(
                f"{file.path} has key {key}, which edgellm does not know: what the model computes may depend "
                f"on it. If it does not, take it out: gguf-new-metadata --remove-metadata {key} INPUT OUTPUT"
            )
        if not _is_among(value, NEUTRAL[suffix]):
            fine = " or ".join(str(one).lower() for one in NEUTRAL[suffix])
            raise CheckpointError(
                f"{file.path} has {key} = {_shown(value)}, which edgellm does not support; {fine} would be "
                "fine, and so is a file without it"
            )


def _is_among(value: Value, neutral: tuple[float | bool, ...]) -> bool:
    if isinstance(value, np.ndarray):
        return all(_is_among(one, neutral) for one in value.tolist())
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _shown(value: Value) -> str:
    return str(value.tolist() if isinstance(value, np.ndarray) else value)

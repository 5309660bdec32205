"""Write tests/golden/decoder.npz: what transformers computes in float32 for the tests' models.

    python tools/make_golden.py

Needs torch and transformers, which edgellm does not; last run with 2.13.0 and 5.23.0. For each model there
are `{name}.tokens` int64 [T] and `{name}.logits` float32 [T, vocab]. The weights are not stored: they come
from numpy's RandomState, whose stream is fixed. For each rotary scaling of `rotary_cases` there are
`rotary.{name}.frequencies` float32 [d / 2] and `rotary.{name}.length`, transformers' attention factor.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "decoder.npz"
TOKENS = 12


def main() -> int:
    """Compute and write."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    sys.path.insert(0, str(ROOT / "tests"))
    from model_directories import qwen_config, stored_weights
    from rotary_cases import CASES
    from tiny_llama import TINY
    from transformers.modeling_rope_utils import (  # type: ignore[import-not-found]
        ROPE_INIT_FUNCTIONS,
    )

    golden = {}
    for name, tiny in TINY.items():
        tokens = np.random.RandomState(3).randint(0, tiny.vocab, TOKENS)
        golden[f"{name}.tokens"] = tokens
        if tiny.family == "Qwen":
            golden[f"{name}.logits"] = _qwen_logits(qwen_config(tiny), stored_weights(tiny), tokens)
            continue
        config_class = getattr(transformers, f"{tiny.family}Config")
        config = config_class(**tiny.transformers_config(), attn_implementation="eager")
        model = getattr(transformers, f"{tiny.family}ForCausalLM")(config).eval()
        # Under Hugging Face's names: `model.` before all but the head, `.weight` after.
        state = {
            ("" if key == "lm_head" else "model.")
            + (
                key
                if key.endswith((".bias", "experts.gate_up_proj", "experts.down_proj"))
                else f"{key}.weight"
            ): torch.from_numpy(values)
            for key, values in _fused_experts(tiny.weights()).items()
        }
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0]
        golden[f"{name}.logits"] = logits.float().numpy()
    for name, case in CASES.items():
        config = transformers.LlamaConfig(
            head_dim=case.head_size,
            max_position_embeddings=case.context,
            rope_parameters={"rope_theta": case.base, **case.parameters},
        )
        frequencies, length = ROPE_INIT_FUNCTIONS[case.parameters["rope_type"]](config, device="cpu")
        golden[f"rotary.{name}.frequencies"] = frequencies.numpy()
        golden[f"rotary.{name}.length"] = np.float64(length)
    np.savez_compressed(GOLDEN, **golden)  # type: ignore[arg-type]
    print(f"{GOLDEN}: torch {torch.__version__}, transformers {transformers.__version__}")
    return 0


def _fused_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of a layer in two tensors, as transformers 5 holds them: [E, 2F, D] and [E, D, F]."""
    experts: dict[str, list[dict[str, np.ndarray]]] = {}
    others = {}
    for key, values in weights.items():
        layer, found, rest = key.partition(".experts.")
        if not found:
            others[key] = values
            continue
        number, part = rest.split(".")
        experts.setdefault(layer, [])
        if len(experts[layer]) == int(number):
            experts[layer].append({})
        experts[layer][int(number)][part] = values
    for layer, parts in experts.items():
        others[f"{layer}.experts.gate_up_proj"] = np.stack(
            [np.concatenate([one["gate_proj"], one["up_proj"]]) for one in parts]
        )
        others[f"{layer}.experts.down_proj"] = np.stack([one["down_proj"] for one in parts])
    return others


def _qwen_logits(config: dict[str, Any], weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """What modeling_qwen.py, which came with Qwen-7B-Chat and is in no library, computes up to seq_length.

    Args:
        weights: tensors by its names, without `.weight`.

    Returns:
        float32 [T, vocab].
    """
    import torch

    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    w = {name: torch.from_numpy(values) for name, values in weights.items()}
    count, heads, size = len(tokens), config["num_attention_heads"], config["kv_channels"]
    frequencies = 1.0 / config["rotary_emb_base"] ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(count).float(), frequencies)
    cos, sin = (torch.cat((table, table), dim=-1)[:, None] for table in (angles.cos(), angles.sin()))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]) * w[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    with torch.no_grad():
        x = w["transformer.wte"][torch.from_numpy(tokens)]
        for layer in range(config["num_hidden_layers"]):
            here = f"transformer.h.{layer}"
            mixed = linear(norm(x, f"{here}.ln_1"), w[f"{here}.attn.c_attn"], w[f"{here}.attn.c_attn.bias"])
            query, key, value = (part.view(count, heads, size) for part in mixed.split(heads * size, dim=-1))
            query, key, value = (t.transpose(0, 1) for t in (rotated(query), rotated(key), value))
            scores = query @ key.transpose(1, 2) / size**0.5
            scores = scores.masked_fill(torch.ones(count, count).tril() == 0, float("-inf"))
            attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(count, heads * size)
            x = x + linear(attended, w[f"{here}.attn.c_proj"])
            h = norm(x, f"{here}.ln_2")
            a1, a2 = linear(h, w[f"{here}.mlp.w1"]), linear(h, w[f"{here}.mlp.w2"])
            x = x + linear(a1 * silu(a2), w[f"{here}.mlp.c_proj"])
        logits = linear(norm(x, "transformer.ln_f"), w["lm_head"])
    found: np.ndarray = logits.numpy()
    return found


if __name__ == "__main__":
    sys.exit(main())

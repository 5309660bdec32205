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

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "decoder.npz"
TOKENS = 12


def main() -> int:
    """Compute and write."""
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    sys.path.insert(0, str(ROOT / "tests"))
    from rotary_cases import CASES
    from tiny_llama import TINY
    from transformers.modeling_rope_utils import (  # type: ignore[import-not-found]
        ROPE_INIT_FUNCTIONS,
    )

    golden = {}
    for name, tiny in TINY.items():
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
        tokens = np.random.RandomState(3).randint(0, tiny.vocab, TOKENS)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0]
        golden[f"{name}.tokens"] = tokens
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


if __name__ == "__main__":
    sys.exit(main())

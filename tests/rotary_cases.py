"""Rotary scalings as published models have them, for transformers and for edgellm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgellm.model.rotary import LinearScaling, Llama3Scaling, RotaryScaling, YarnScaling


@dataclass(frozen=True)
class Case:
    """`parameters` are transformers' rope_parameters without theta, `scaling` is the same for edgellm."""

    head_size: int
    base: float
    context: int
    parameters: dict[str, Any]
    scaling: RotaryScaling


def _llama3(factor: float) -> tuple[dict[str, Any], Llama3Scaling]:
    numbers: dict[str, Any] = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {"rope_type": "llama3", **numbers}, Llama3Scaling(**numbers)


def _yarn(**numbers: Any) -> tuple[dict[str, Any], YarnScaling]:
    return {"rope_type": "yarn", **numbers}, YarnScaling(**numbers)


CASES = {
    "Llama-3.1-8B": Case(128, 500_000.0, 131_072, *_llama3(8.0)),
    "Llama-3.2-1B": Case(64, 500_000.0, 131_072, *_llama3(32.0)),
    "Qwen2.5-7B, 128k": Case(128, 1e6, 131_072, *_yarn(factor=4.0, original_max_position_embeddings=32_768)),
    "Yarn-Llama-2-7b-64k": Case(128, 1e4, 65_536, *_yarn(factor=16.0, original_max_position_embeddings=4096)),
    "yarn with every number": Case(
        64,
        1e5,
        16_384,
        *_yarn(
            factor=8.0,
            original_max_position_embeddings=2048,
            beta_fast=16.0,
            beta_slow=2.0,
            attention_factor=1.1,
            truncate=False,
        ),
    ),
    "yarn whose ramp is cut": Case(32, 1e4, 2048, *_yarn(factor=4.0, original_max_position_embeddings=64)),
    "linear": Case(128, 1e4, 8192, {"rope_type": "linear", "factor": 2.0}, LinearScaling(factor=2.0)),
}

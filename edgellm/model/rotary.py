"""The rotary embedding: how far each pair of a head turns at each position, scaled contexts included.

Pair j of a head of d elements turns by position · f_j, f_j = theta^(−2j / d) (Su et al. 2021, RoFormer). A
model that was stretched to a longer context changes f, and YaRN the length of what is turned, too. Nothing
else may compute angles: every executor's emitter takes them from here. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Angles = NDArray[np.float64]


class LinearScaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="linear"
):
    """Position interpolation (Chen et al. 2023): every frequency divided by `factor`."""

    factor: float


class Llama3Scaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="llama3"
):
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, those between blended.

    Attributes:
        factor: of wavelengths above original_max_position_embeddings / low_freq_factor.
        low_freq_factor, high_freq_factor: wavelengths below original_max_position_embeddings /
            high_freq_factor keep their frequency.
        original_max_position_embeddings: context before it was stretched.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class YarnScaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="yarn"
):
    """YaRN (Peng et al. 2023): pairs that turn often keep their frequency, slow ones are divided.

    Attributes:
        factor: of the slow pairs' frequencies.
        original_max_position_embeddings: context before it was stretched.
        beta_fast, beta_slow: pairs that turn more than beta_fast times within the original context keep their
            frequency, those that turn less than beta_slow times are divided; between them a linear ramp.
        attention_factor: on cos and sin, so that logits are multiplied by its square; None is the paper's
            0.1 · ln(factor) + 1.
        truncate: whether the ramp begins and ends at whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


class DivisorScaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="divisors"
):
    """Each pair's frequency divided by a number of its own: what GGUF's rope_freqs.weight holds.

    Attributes:
        divisors: of pair 0, 1, …; head_size / 2 of them.
    """

    divisors: tuple[float, ...]


RotaryScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | DivisorScaling
"""As config.json has it, `type` says which."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """How a network rotates its query and key heads.

    Attributes:
        frequencies: float64 [head_size / 2], radians per position.
        length: factor on cos and sin; 1 but for YaRN.
    """

    frequencies: Angles
    length: float = 1.0

    def tables(self, positions: int) -> tuple[Angles, Angles]:
        """cos and sin of positions 0 … positions − 1, times `length`: float64 [positions, head_size / 2]."""
        angles = np.arange(positions)[:, None] * self.frequencies
        return np.cos(angles) * self.length, np.sin(angles) * self.length


def make_rotary(head_size: int, base: float, scaling: RotaryScaling | None = None) -> Rotary:
    """The rotation of heads of this size.

    Args:
        base: theta.

    Raises:
        ValueError: the scaling has no meaning: a factor below 1, bounds in the wrong order, divisors of
            another number than pairs.
    """
    plain = base ** (-np.arange(0, head_size, 2) / head_size)
    match scaling:
        case None:
            return Rotary(plain)
        case LinearScaling():
            return Rotary(plain / _at_least_one(scaling.factor))
        case Llama3Scaling():
            return Rotary(_llama3(plain, scaling))
        case YarnScaling():
            _at_least_one(scaling.factor)
            return Rotary(_yarn(plain, base, scaling), _yarn_length(scaling))
        case DivisorScaling():
            divisors = np.array(scaling.divisors)
            if divisors.shape != plain.shape or not (divisors > 0).all():
                raise ValueError(f"{len(plain)} positive divisors are needed, one for each pair of a head")
            return Rotary(plain / divisors)


def _llama3(plain: Angles, scaling: Llama3Scaling) -> Angles:
    """transformers' `_compute_llama3_parameters`, which is Meta's `apply_scaling`."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if not 0 < low < high:
        raise ValueError(f"low_freq_factor {low} should lie between 0 and high_freq_factor {high}")
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    # 1 keeps the frequency: high_freq_factor turns or more within the original context; 0 divides it.
    kept = np.clip((turns - low) / (high - low), 0, 1)
    blend: Angles = kept * plain + (1 - kept) * plain / _at_least_one(scaling.factor)
    return blend


def _yarn(plain: Angles, base: float, scaling: YarnScaling) -> Angles:
    """Section 3.2 of the paper ("NTK-by-parts"), its bounds as pair indices as transformers has them."""
    if base <= 1:
        raise ValueError(f"theta is {base}; YaRN needs one above 1")
    if not 0 < scaling.beta_slow < scaling.beta_fast:
        raise ValueError(
            f"beta_slow {scaling.beta_slow} should lie between 0 and beta_fast {scaling.beta_fast}"
        )

    def pair(turns: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return len(plain) * math.log(wavelength) / math.log(base)

    if scaling.original_max_position_embeddings < 1:
        raise ValueError(
            f"original_max_position_embeddings {scaling.original_max_position_embeddings} should be positive"
        )
    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(plain) - 1)
    if first == last:
        last += 0.001
    divided = np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)
    blend: Angles = divided * plain / scaling.factor + (1 - divided) * plain
    return blend


def _yarn_length(scaling: YarnScaling) -> float:
    if scaling.attention_factor is None:
        return 0.1 * math.log(scaling.factor) + 1
    if not scaling.attention_factor > 0:
        raise ValueError(f"attention_factor {scaling.attention_factor} should be positive")
    return scaling.attention_factor


def _at_least_one(factor: float) -> float:
    if not (factor >= 1 and math.isfinite(factor)):
        raise ValueError(f"factor {factor} should be 1 or more")
    return factor

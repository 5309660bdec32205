"""What a mixture of experts is to kernels: its shape, where its weights lie, which rows go through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgellm.cuda.launch import At
from edgellm.errors import BuildError
from edgellm.kernels.packing import PackedShape

MOST_EXPERTS: Final = 512
MOST_TOP_K: Final = 32


def require_mixture(experts: int, top_k: int, name: str) -> None:
    """Refuse what no kernel does.

    Raises:
        BuildError: too many experts, or too many of them for a token; `name` is their router's.
    """
    if experts > MOST_EXPERTS or top_k > MOST_TOP_K:
        raise BuildError(
            f"{name} has {experts} experts, {top_k} for a token; the CUDA executor does at most "
            f"{MOST_EXPERTS} and {MOST_TOP_K}: build with --executor cpu"
        )


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """A layer's mixture of experts.

    Attributes:
        top_k: experts that a row goes through.
        normalize: their shares are divided by their sum.
        router: of the linear that scores, one row for each expert.
        gate_up, down: of every expert alike; experts lie one behind the other, each `nbytes`.
    """

    top_k: int
    normalize: bool
    router: PackedShape
    gate_up: PackedShape
    down: PackedShape

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.router.n

    @property
    def hidden(self) -> int:
        """Width of the residual."""
        return self.router.k


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """Where a mixture's packed weights lie."""

    router: At
    gate_up: At
    down: At


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which rows there are: of a decode step, those of `rows_at` whose slot is not below 0; of a chunk, from
    its token `first` on, those before its end.

    Attributes:
        rows: the bucket.
        rows_at: an array of ROW, or
        chunk: a CHUNK.
    """

    rows: int
    rows_at: At | None = None
    chunk: At | None = None
    first: int = 0

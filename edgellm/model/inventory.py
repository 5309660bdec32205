"""Which matrices a network has and how they are stored: all that a memory plan needs of the weights.

No tensor is read: a checkpoint's header says it all. An engine carries its inventory in config.json, so it
can be planned for without the checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from edgellm.checkpoint.base import Checkpoint
from edgellm.model.decoder import Attention, Expert, build_decoder
from edgellm.model.weights import Dense, Weight

Role = Literal["embedding", "linear", "head", "vector", "expert"]


class Matrices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Matrices of one shape and storage, [rows, columns] each.

    Attributes:
        role: what they are for; an `expert` is a matrix of one, of which a token uses some; a `vector` is a
            norm's gain or a bias, [rows, 1]. A tied head is listed as a head, too: executors keep a form of
            it that the embedding does not share.
        count: how many.
        bits: 4 or 8 in groups, 16 or 32 dense.
        group: elements of a row that share a scale; 0: dense.
        offsets: whether groups have offsets that are more than the middle of the range (`Grouped.centred`).
    """

    role: Role
    count: int = 1
    rows: int
    columns: int
    bits: Literal[4, 8, 16, 32]
    group: int = 0
    offsets: bool = False

    @property
    def elements(self) -> int:
        """Numbers in all of them."""
        return self.count * self.rows * self.columns

    @property
    def groups(self) -> int:
        """Groups in all of them."""
        return self.elements // self.group if self.group else 0


def take_inventory(checkpoint: Checkpoint) -> tuple[Matrices, ...]:
    """Every matrix that the network uses, equal ones counted together, in the order of their first use.

    Raises:
        BuildError: the architecture is none that edgellm builds.
        CheckpointError: a tensor is missing.
    """
    graph = _Inventory()
    build_decoder(graph, checkpoint)
    return tuple(msgspec.structs.replace(one, count=count) for one, count in graph.found.items())


class _Inventory:
    """The decoder's `Graph`, which computes nothing and notes what it is given."""

    def __init__(self) -> None:
        self.found: Counter[Matrices] = Counter()

    def embed(self, weight: Weight) -> None:
        self._note("embedding", weight)

    def norm(self, x: None, gain: Weight, epsilon: float) -> None:  # noqa: ARG002 - the Graph's names
        self._note("vector", gain)

    def qkv(self, x: None, weights: Sequence[Weight], biases: Sequence[Weight | None]) -> None:  # noqa: ARG002
        self._note("linear", *weights)
        self._note("vector", *biases)

    def attention(self, qkv: None, attention: Attention) -> None:  # noqa: ARG002
        self._note("vector", attention.q_norm, attention.k_norm)

    def linear(self, x: None, weight: Weight, bias: Weight | None, residual: None) -> None:  # noqa: ARG002
        self._note("linear", weight)
        self._note("vector", bias)

    def swiglu(self, x: None, gate: Weight, up: Weight, biases: Sequence[Weight | None]) -> None:  # noqa: ARG002
        self._note("linear", gate, up)
        self._note("vector", *biases)

    def moe(
        self,
        x: None,  # noqa: ARG002
        router: Weight,
        experts: Sequence[Expert],
        top_k: int,  # noqa: ARG002
        *,
        normalize: bool,  # noqa: ARG002
        residual: None,  # noqa: ARG002
    ) -> None:
        self._note("linear", router)
        for expert in experts:
            self._note("expert", expert.gate, expert.up, expert.down)

    def rows(self, x: None) -> None:
        pass

    def logits(self, x: None, weight: Weight) -> None:  # noqa: ARG002
        self._note("head", weight)

    def _note(self, role: Role, *weights: Weight | None) -> None:
        for weight in weights:
            if weight is not None:
                self.found[_one(role, weight)] += 1


def _one(role: Role, weight: Weight) -> Matrices:
    rows, columns = weight.shape if len(weight.shape) == 2 else (weight.shape[0], 1)
    if isinstance(weight, Dense):
        return Matrices(role=role, rows=rows, columns=columns, bits=32 if weight.dtype == "f32" else 16)
    return Matrices(
        role=role,
        rows=rows,
        columns=columns,
        bits=weight.bits,
        group=weight.group,
        offsets=weight.asymmetric and not weight.centred,
    )

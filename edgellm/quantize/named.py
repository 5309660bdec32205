"""A checkpoint whose weights know their canonical names."""

from __future__ import annotations

from dataclasses import replace

from edgellm.checkpoint.base import Checkpoint
from edgellm.model.weights import Weight
from edgellm.quantize.wrapped import WrappedCheckpoint


class Named(WrappedCheckpoint):
    """Another checkpoint, whose weights' `name` is canonical: a graph is given weights, and can tell by it
    which they are.

    Attributes:
        found: canonical name → tensor, of all that were asked for, in that order.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.found: dict[str, Weight] = {}

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name, named so."""
        weight = self.found[name] = replace(super().tensor(name), name=name)
        return weight

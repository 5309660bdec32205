"""Where a canonical tensor lies in a file that names and joins tensors in its own way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor, or some rows of it.

    Attributes:
        stored: its name in the file; of a linear layer in a model directory the layer's, without `.weight`.
        shape: of the whole stored tensor.
        first, count: rows of that; of matrices one below the other, [E, N, K], those of [E · N, K]. A count
            of None is all of it.
    """

    stored: str
    shape: tuple[int, ...]
    first: int = 0
    count: int | None = None


def fused(stored: str, name: str, shapes: dict[str, tuple[int, ...]]) -> Place:
    """The part of a tensor that has several canonical ones, `shapes`, one below the other."""
    names = list(shapes)
    rows = [shape[0] for shape in shapes.values()]
    first = sum(rows[: names.index(name)])
    return Place(stored, (sum(rows), *shapes[name][1:]), first, shapes[name][0])

"""Mixtures of experts for ONNX Runtime's CPU provider: only the experts that a token chose are read.

Each token is repeated for every expert that it goes through, and these rows are sorted by expert. Each expert
then multiplies its run of rows, which is empty for most experts while answers are decoded: a product with no
rows returns before it touches its weights. One operator for the whole mixture, com.microsoft's QMoE, has no
offsets, so that most checkpoints could not be exact with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm.model.decoder import Expert
from edgellm.model.onnx_file import CONTRIB, OnnxFile
from edgellm.model.onnx_linear import Linears, Value
from edgellm.model.weights import Weight


class Mixtures:
    """Writes mixtures of experts into a model file."""

    def __init__(self, file: OnnxFile, linears: Linears) -> None:
        self._file = file
        self._linears = linears

    def mix(
        self,
        x: Value,
        router: Weight,
        experts: Sequence[Expert],
        top_k: int,
        name: str,
        *,
        normalize: bool,
    ) -> Value:
        """The mixture of x, without a residual; see `Graph.moe`. [T] tokens, [A] = T · top_k assignments."""
        file, y = self._file, name
        flat = file.constant(f"flat.{x.width}", np.array([-1, x.width], np.int64))
        file.node("Reshape", [x.name, flat], [f"{y}.tokens"])
        tokens = Value(f"{y}.tokens", 2, x.width)
        self._route(tokens, router, top_k, y, normalize=normalize)
        self._sort(len(experts), top_k, y)

        file.node("Gather", [tokens.name, f"{y}.token"], [f"{y}.sorted"], axis=0)
        gate_up = self._linears.project_runs(
            Value(f"{y}.sorted", 2, x.width),
            f"{y}.sizes",
            [(expert.gate, expert.up) for expert in experts],
            f"{y}.gate_up",
        )
        width = gate_up.width // 2
        halves = file.constant(f"halves.{width}", np.array([width, width], np.int64))
        file.node("Split", [gate_up.name, halves], [f"{y}.gate", f"{y}.up"], axis=-1)
        # x · sigmoid(1 · x) is SiLU.
        file.node("QuickGelu", [f"{y}.gate"], [f"{y}.silu"], domain=CONTRIB, alpha=1.0)
        file.node("Mul", [f"{y}.silu", f"{y}.up"], [f"{y}.swiglu"])
        down = self._linears.project_runs(
            Value(f"{y}.swiglu", 2, width),
            f"{y}.sizes",
            [(expert.down,) for expert in experts],
            f"{y}.down",
        )
        self._combine(down, x, top_k, y)
        return Value(y, x.rank, x.width)

    def _route(self, tokens: Value, router: Weight, top_k: int, y: str, *, normalize: bool) -> None:
        """`.weights` f32 [A] and `.experts` i64 [A], the top_k of a token side by side."""
        file = self._file
        last = file.constant("axis.last", np.array([-1], np.int64))
        count = file.constant(f"top.{top_k}", np.array([top_k], np.int64))
        logits = self._linears.project(tokens, [router], [None], f"{y}.router")
        file.node("Softmax", [logits.name], [f"{y}.probabilities"], axis=-1)
        chosen = f"{y}.top"
        file.node("TopK", [f"{y}.probabilities", count], [chosen, f"{y}.chosen"], axis=-1)
        if normalize:
            file.node("ReduceSum", [chosen, last], [f"{y}.total"], keepdims=1)
            file.node("Div", [chosen, f"{y}.total"], [f"{y}.normalized"])
            chosen = f"{y}.normalized"
        file.node("Reshape", [chosen, last], [f"{y}.weights"])
        file.node("Reshape", [f"{y}.chosen", last], [f"{y}.experts"])

    def _sort(self, experts: int, top_k: int, y: str) -> None:
        """`.order` i64 [A]: assignments by expert, then by token; `.token`, their tokens; `.sizes` i64 [E].

        Also `.place` i64 [A], where an assignment is in that order.
        """
        file = self._file
        zero, one = (file.constant(f"scalar.{n}", np.array(n, np.int64)) for n in (0, 1))
        file.node("Shape", [f"{y}.experts"], [f"{y}.shape"])
        file.node("Squeeze", [f"{y}.shape"], [f"{y}.count"])
        file.node("Range", [zero, f"{y}.count", one], [f"{y}.positions"])
        # Numbers that order as (expert, position) does: sorting need not be stable then.
        file.node("Mul", [f"{y}.experts", f"{y}.count"], [f"{y}.major"])
        file.node("Add", [f"{y}.major", f"{y}.positions"], [f"{y}.keys"])
        file.node("TopK", [f"{y}.keys", f"{y}.shape"], [f"{y}.by_expert", f"{y}.order"], axis=0, largest=0)
        each = file.constant(f"scalar.{top_k}", np.array(top_k, np.int64))
        file.node("Div", [f"{y}.order", each], [f"{y}.token"])
        file.node(
            "ScatterElements", [f"{y}.positions", f"{y}.order", f"{y}.positions"], [f"{y}.place"], axis=0
        )
        none = file.constant(f"none.{experts}", np.zeros(experts, np.int64))
        file.node("Expand", [one, f"{y}.shape"], [f"{y}.ones"])
        file.node(
            "ScatterElements",
            [none, f"{y}.experts", f"{y}.ones"],
            [f"{y}.sizes"],
            axis=0,
            reduction="add",
        )

    def _combine(self, down: Value, x: Value, top_k: int, y: str) -> None:
        """y, of x's shape: each token's rows of `down`, weighted and added."""
        file = self._file
        last = file.constant("axis.last", np.array([-1], np.int64))
        first = file.constant("axis.1", np.array([1], np.int64))
        split = file.constant(f"chosen.{top_k}.{x.width}", np.array([-1, top_k, x.width], np.int64))
        file.node("Gather", [down.name, f"{y}.place"], [f"{y}.unsorted"], axis=0)
        file.node("Unsqueeze", [f"{y}.weights", last], [f"{y}.weights.column"])
        file.node("Mul", [f"{y}.unsorted", f"{y}.weights.column"], [f"{y}.weighted"])
        file.node("Reshape", [f"{y}.weighted", split], [f"{y}.addends"])
        flat = y if x.rank == 2 else f"{y}.flat"
        file.node("ReduceSum", [f"{y}.addends", first], [flat], keepdims=0)
        if x.rank != 2:
            file.node("Shape", [x.name], [f"{y}.x.shape"])
            file.node("Reshape", [flat, f"{y}.x.shape"], [y])

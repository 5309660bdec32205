"""A mixture of experts for TensorRT, composed of two linears: every expert computes every token.

With a_e = silu(x · gate_eᵀ) · (x · up_eᵀ), the mixture Σ_e p_e · a_e · down_eᵀ is the experts' p_e · a_e side
by side times their down matrices on top of each other. It is exact, and reads all experts' weights in every
step: 16 times what Qwen3-30B-A3B needs. `--executor cuda` reads the chosen ones alone.

TensorRT has a layer for this (`add_moe`). TensorRT-RTX 1.7 adds it and then cannot build it for any of its
devices ("Cannot decompose operation … moe_fc1"), with float16 weights as with INT4 ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgellm.errors import BuildError
from edgellm.model.decoder import Expert
from edgellm.model.trt_linear import TrtLinears, Value
from edgellm.model.trt_network import Tensor, TrtNetwork
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight


def add_mixture(
    net: TrtNetwork,
    linears: TrtLinears,
    x: Value,
    *,
    router: Weight,
    experts: Sequence[Expert],
    top_k: int,
    normalize: bool,
    name: str,
) -> Tensor:
    """The mixture of x [..., D], without the residual; see `decoder.Graph.moe`.

    Raises:
        BuildError: the experts' weights are stored in different ways.
    """
    count, inner = len(experts), experts[0].gate.shape[0]
    lead = [0] * (len(x.tensor.shape) - 1)
    shares = _shares(
        net,
        linears,
        x,
        router=router,
        experts=count,
        top_k=top_k,
        normalize=normalize,
        name=f"{name}.router",
    )
    gates, ups = ([getattr(expert, part) for expert in experts] for part in ("gate", "up"))
    gate = linears.project(x, gates, [None] * count, f"{name}.gate").tensor
    up = linears.project(x, ups, [None] * count, f"{name}.up").tensor
    silu = net.multiply(f"{name}.silu", gate, net.sigmoid(f"{name}.sigmoid", gate))
    active = net.reshape(f"{name}.experts", net.multiply(f"{name}.active", silu, up), (*lead, count, inner))
    weighted = net.multiply(f"{name}.weighted", active, net.cast(f"{name}.shares", shares, net.half))
    joined = net.reshape(f"{name}.joined", weighted, (*lead, count * inner))
    down = _side_by_side([expert.down for expert in experts])
    return linears.project(Value(joined, count * inner), [down], [None], name).tensor


def _shares(
    net: TrtNetwork,
    linears: TrtLinears,
    x: Value,
    *,
    router: Weight,
    experts: int,
    top_k: int,
    normalize: bool,
    name: str,
) -> Tensor:
    """p [..., experts, 1] in float32: 0 for experts that are not among a token's top_k."""
    rank = len(x.tensor.shape)
    lead = [0] * (rank - 1)
    scores = linears.project(x, [router], [None], name).tensor
    likely = net.softmax(f"{name}.softmax", net.cast(f"{name}.float", scores, net.trt.float32), rank - 1)
    values, indices = net.top(f"{name}.top", likely, top_k, rank - 1)
    if normalize:
        total = net.total(f"{name}.total", values, rank - 1)
        values = net.elementwise(f"{name}.normal", "DIV", values, total)
    # One row for each of the top_k, 1 where its expert is: their sum weighted by the values.
    numbers = np.arange(experts, dtype=np.int32).reshape(*[1] * rank, -1)
    chosen = net.elementwise(
        f"{name}.chosen",
        "EQUAL",
        net.reshape(f"{name}.indices", indices, (*lead, top_k, 1)),
        net.constant(f"experts.{rank}.{experts}", numbers),
    )
    each = net.multiply(
        f"{name}.each",
        net.cast(f"{name}.chosen.float", chosen, net.trt.float32),
        net.reshape(f"{name}.values", values, (*lead, top_k, 1)),
    )
    return net.reshape(f"{name}.shares", net.total(f"{name}.all", each, rank - 1), (*lead, experts, 1))


def _side_by_side(weights: Sequence[Weight]) -> Weight:
    """[N, K₁], [N, K₂], … as [N, K₁ + K₂ + …]."""
    first = weights[0]
    rows, width = first.shape[0], sum(weight.shape[1] for weight in weights)
    name = f"{first.name} and its neighbours"
    if all(isinstance(weight, Dense) for weight in weights):

        def values(begin: int, end: int) -> Float:
            return np.concatenate([weight.dequantize(begin, end) for weight in weights], axis=1)

        return Dense(name, (rows, width), "f32", values)

    grouped = [weight for weight in weights if isinstance(weight, Grouped)]
    layouts = {(weight.bits, weight.group) for weight in grouped}
    if len(grouped) < len(weights) or len(layouts) > 1 or any(weight.perm is not None for weight in grouped):
        raise BuildError(
            f"{name} are stored in different ways or in act-order; TensorRT's form of a mixture makes one "
            "product of them. Use `--executor cuda`"
        )

    def groups(begin: int, end: int) -> Groups:
        parts = [weight.read(begin, end) for weight in grouped]
        return Groups(
            np.concatenate([part.q for part in parts], axis=1),
            np.concatenate([part.scale for part in parts], axis=1),
            np.concatenate([part.offsets() for part in parts], axis=1),
        )

    return replace(
        grouped[0], name=name, shape=(rows, width), read_rows=groups, asymmetric=True, centred=False
    )

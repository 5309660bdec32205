"""Launches of a mixture of experts without a GPU: buffers are large enough, pieces meet, all compiles."""

from __future__ import annotations

from itertools import pairwise

import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of
from mixtures import MIXTURES

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.moe import chunk_mixture, longest_piece, mixture_workspace, places_of, row_mixture
from edgellm.kernels.moe_cuts import Cuts, groups_most, tiled, tuned
from edgellm.kernels.moe_shape import MixtureShape, MixtureWeights, Tokens
from edgellm.kernels.norm import NormAhead

WEIGHTS = MixtureWeights(At("router"), At("gate_up"), At("down"))


def rows_launches(shape: MixtureShape, rows: int, device: Device) -> list[Launch]:
    return row_mixture(
        shape,
        Tokens(rows, rows_at=At("rows")),
        device=device,
        x=At("x"),
        weights=WEIGHTS,
        residual=At("residual"),
        ahead=NormAhead(At("gain"), At("scales"), At("scaled"), At("squares")),
        workspace=At("workspace"),
        linear_workspace=At("linear_workspace"),
    )


def chunk_launches(
    shape: MixtureShape, tokens: int, device: Device, cuts: Cuts | None = None
) -> list[Launch]:
    return chunk_mixture(
        shape,
        tokens,
        device=device,
        chunk=At("chunk"),
        x=At("x"),
        weights=WEIGHTS,
        residual=At("residual"),
        workspace=At("workspace"),
        linear_workspace=At("linear_workspace"),
        cuts=cuts,
    )


@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES)
def test_parts_of_the_workspace_do_not_touch(shape: MixtureShape) -> None:
    device = DEVICES["agx orin"]
    for rows in (*BUCKETS, 512, longest_piece(shape)):
        places = places_of(shape, rows, device)
        pairs = rows * shape.top_k
        cuts = tuned(shape, rows=rows, device=device)
        groups = groups_most(shape, rows, cuts.most)
        needed = (
            rows * shape.experts * 4,
            pairs * 2,
            (groups + 1) * 16,
            *[pairs * 4] * 3,
            pairs * shape.down.k * 2,
            pairs * shape.hidden * (2 if cuts.narrow else 4),
        )
        for (begin, end), size in zip(pairwise(places), needed, strict=True):
            assert begin % 256 == 0 and end - begin >= size
        assert mixture_workspace(shape, rows, device) == places.size


def test_long_chunks_go_in_pieces() -> None:
    shape, device = MIXTURES["Qwen3-30B-A3B"], DEVICES["agx orin"]
    longest = longest_piece(shape)
    tokens = 2 * longest + 300
    pieces = [(0, longest), (longest, longest), (2 * longest, 300)]
    launches = chunk_launches(shape, tokens, device)
    choices = [launch for launch in launches if launch.kernel.expression.startswith("choose")]
    assert [launch.arguments[1:3] for launch in choices] == pieces
    scored = [launch for launch in launches if launch.kernel.expression.startswith("gemm")]
    assert [launch.arguments[2] for launch in scored] == [At("x", first * 2048 * 2) for first, _ in pieces]
    added = [launch for launch in launches if launch.kernel.expression.startswith("combine")]
    assert [launch.arguments[6] for launch in added] == [
        At("residual", first * 2048 * 4) for first, _ in pieces
    ]
    assert mixture_workspace(shape, tokens, device) == places_of(shape, longest, device).size


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_every_kind_compiles_and_fits(name: str) -> None:
    device = DEVICES[name]
    launches: list[Launch] = []
    for shape in MIXTURES.values():
        launches += rows_launches(shape, 1, device) + rows_launches(shape, 16, device)
        launches += chunk_launches(shape, 512, device)
        launches += chunk_launches(shape, 512, device, tiled(shape, rows=512, device=device))
    kernels = [kernel for kernel in kernels_of(launches) if kernel.source != "linear.cu"]
    assert_fits(compile_for(kernels, device.sm), device)

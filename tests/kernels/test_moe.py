"""Mixtures of experts without a GPU: all work is done once, buffers are large enough, all compiles."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of
from hypothesis import given
from hypothesis import strategies as st

from edgellm.cuda.launch import At, Device, Launch
from edgellm.errors import BuildError
from edgellm.kernels.gemm import Tile
from edgellm.kernels.gemm import shared_bytes as tile_bytes
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.moe import (
    PIECE,
    Cuts,
    MixtureShape,
    MixtureWeights,
    Tokens,
    Tuning,
    chunk_mixture,
    groups_most,
    items_of,
    mixture_workspace,
    panels_of,
    places_of,
    require_mixture,
    row_mixture,
    shared_bytes,
    tiled,
    tuned,
)
from edgellm.kernels.packing import PackedShape, Zero


def mixture(
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    bits: int,
    group: int,
    zero: Zero,
    normalize: bool = True,
) -> MixtureShape:
    return MixtureShape(
        top_k,
        normalize,
        PackedShape(experts, hidden, 16, 64, "none"),
        PackedShape(2 * inner, hidden, bits, group, zero, swiglu=True),
        PackedShape(hidden, inner, bits, group, zero),
    )


MIXTURES = {
    "Qwen3-30B-A3B": mixture(128, 8, 2048, 768, 4, 128, "zero_point"),
    "Qwen3-30B-A3B, Q4_1": mixture(128, 8, 2048, 768, 4, 32, "offset"),
    "Qwen3-30B-A3B, 8 bits": mixture(128, 8, 2048, 768, 8, 128, "none"),
    "Qwen3-235B-A22B": mixture(128, 8, 4096, 1536, 4, 128, "centred"),
    "Qwen1.5-MoE-A2.7B": mixture(60, 4, 2048, 1408, 4, 64, "zero_point", normalize=False),
    "dense": mixture(8, 2, 512, 192, 16, 64, "none"),
    "512 experts": mixture(512, 32, 256, 128, 8, 16, "zero_point"),
}
WEIGHTS = MixtureWeights(At("router"), At("gate_up"), At("down"))


def rows_launches(shape: MixtureShape, rows: int, device: Device) -> list[Launch]:
    return row_mixture(
        shape,
        Tokens(rows, rows_at=At("rows")),
        device=device,
        x=At("x"),
        weights=WEIGHTS,
        residual=At("residual"),
        squares=At("squares"),
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


@given(
    st.integers(1, 300),
    st.integers(0, 200),
    st.sampled_from([4, 8, 14, 16, 132]),
    st.sampled_from([(4, 1), (8, 1), (8, 2), (8, 4), (16, 1)]),
)
def test_every_item_is_one_teams(row_blocks: int, groups: int, blocks: int, team: tuple[int, int]) -> None:
    warps, warps_k = team
    cut = Tuning(blocks, warps, warps_k, 4, 16)
    taken = Counter(
        item
        for block in range(blocks)
        for warp in range(0, warps, warps_k)
        for item in items_of(row_blocks, groups, cut, block, warp)
    )
    assert taken == Counter((group, row_block) for group in range(groups) for row_block in range(row_blocks))


@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES)
def test_a_team_multiplies_every_panel_once(shape: MixtureShape) -> None:
    for linear in (shape.gate_up, shape.down):
        for warps_k in (1, 2, 4):
            cut = Tuning(16, 8, warps_k, 4, 16)
            for team in range(0, 8, warps_k):
                taken = [panel for warp in range(warps_k) for panel in panels_of(linear, cut, team + warp)]
                assert taken == list(range(linear.panels))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=64), st.sampled_from(BUCKETS))
def test_groups_are_never_more_than_there_is_room_for(counts: list[int], most: int) -> None:
    """Any rows per expert: groups of at most `most` of them."""
    groups, pairs = sum(-(-count // most) for count in counts), sum(counts)
    top_k = 4
    rows = -(-pairs // top_k)
    shape = mixture(len(counts), top_k, 64, 64, 4, 32, "none")
    assert groups <= groups_most(shape, rows, most)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES)
def test_cuts_fit_the_device_and_share_their_groups(shape: MixtureShape, device: Device) -> None:
    for rows in (*BUCKETS, 64, PIECE):
        cuts = tuned(shape, rows=rows, device=device)
        assert cuts.most <= rows
        for linear, cut in ((shape.gate_up, cuts.gate_up), (shape.down, cuts.down)):
            if isinstance(cut, Tile):
                assert tile_bytes(linear, cut) <= device.shared_per_block and rows > BUCKETS[-1]
            else:
                assert shared_bytes(linear, cut) <= device.shared_per_block
                assert cut.stages >= 4


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_long_chunks_of_large_models_could_take_tiles(device: Device) -> None:
    for name in ("Qwen3-30B-A3B", "Qwen3-30B-A3B, Q4_1", "Qwen3-235B-A22B"):
        cuts = tiled(MIXTURES[name], rows=PIECE, device=device)
        assert cuts is not None and cuts.narrow and cuts.most == 32
        for linear, cut in ((MIXTURES[name].gate_up, cuts.gate_up), (MIXTURES[name].down, cuts.down)):
            assert isinstance(cut, Tile) and tile_bytes(linear, cut) <= device.shared_per_block


def test_one_experts_rows_are_read_together_on_an_orin() -> None:
    cuts = tuned(MIXTURES["Qwen3-30B-A3B"], rows=16, device=DEVICES["agx orin"])
    assert cuts.most == 16


@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES)
def test_parts_of_the_workspace_do_not_touch(shape: MixtureShape) -> None:
    device = DEVICES["agx orin"]
    for rows in (*BUCKETS, PIECE):
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
    launches = chunk_launches(shape, 2048, device)
    choices = [launch for launch in launches if launch.kernel.expression.startswith("choose")]
    assert [launch.arguments[1:3] for launch in choices] == [
        (first, PIECE) for first in range(0, 2048, PIECE)
    ]
    scored = [launch for launch in launches if launch.kernel.expression.startswith("gemm")]
    assert [launch.arguments[2] for launch in scored] == [
        At("x", first * 2048 * 2) for first in range(0, 2048, PIECE)
    ]
    added = [launch for launch in launches if launch.kernel.expression.startswith("combine")]
    assert [launch.arguments[6] for launch in added] == [
        At("residual", first * 2048 * 4) for first in range(0, 2048, PIECE)
    ]
    assert mixture_workspace(shape, 2048, device) == mixture_workspace(shape, PIECE, device)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BuildError, match="experts of 2048 columns need more than the 16384 bytes"):
        tuned(MIXTURES["Qwen3-30B-A3B"], rows=1, device=Device(87, 16, 16 << 10))
    with pytest.raises(BuildError, match=r"gate has 2000 experts, 8 for a token"):
        require_mixture(2000, 8, "gate")
    require_mixture(512, 32, "gate")
    cut = Tuning(16, 8, 1, 4, 8)
    with pytest.raises(ValueError, match="groups of 8 and of 4"):
        Cuts(cut, Tuning(16, 8, 1, 4, 4))


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_every_kind_compiles_and_fits(name: str) -> None:
    device = DEVICES[name]
    launches: list[Launch] = []
    for shape in MIXTURES.values():
        launches += rows_launches(shape, 1, device) + rows_launches(shape, 16, device)
        launches += chunk_launches(shape, PIECE, device)
        launches += chunk_launches(shape, PIECE, device, tiled(shape, rows=PIECE, device=device))
    kernels = [kernel for kernel in kernels_of(launches) if kernel.source != "linear.cu"]
    assert_fits(compile_for(kernels, device.sm), device)

"""Cuts of the experts' linears: all work is done once, and every cut fits its device."""

from __future__ import annotations

from collections import Counter

import pytest
from compiled import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from mixtures import MIXTURES, mixture

from edgellm.cuda.launch import Device
from edgellm.errors import BuildError
from edgellm.kernels.gemm import Tile
from edgellm.kernels.gemm import shared_bytes as tile_bytes
from edgellm.kernels.linear import BUCKETS
from edgellm.kernels.moe import longest_piece
from edgellm.kernels.moe_cuts import (
    Cuts,
    Held,
    Tuning,
    groups_most,
    held_bytes,
    held_items_of,
    items_of,
    panels_of,
    shared_bytes,
    tuned,
)
from edgellm.kernels.moe_shape import MixtureShape, require_mixture


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


@given(
    st.integers(1, 300),
    st.integers(0, 200),
    st.sampled_from([4, 8, 14, 16, 132]),
    st.sampled_from([(16, 16), (12, 6), (16, 4), (15, 5)]),
    st.integers(1, 3),
)
def test_every_item_is_one_sides(
    row_blocks: int, groups: int, blocks: int, warps: tuple[int, int], abreast: int
) -> None:
    cut = Held(blocks, *warps, 3, abreast, 2, 16)
    taken = Counter(
        item
        for block in range(blocks)
        for side in range(warps[0] // warps[1])
        for item in held_items_of(row_blocks, groups, cut, block, side)
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
    for rows in (*BUCKETS, 64, longest_piece(shape)):
        cuts = tuned(shape, rows=rows, device=device)
        assert cuts.most <= rows
        for linear, cut in ((shape.gate_up, cuts.gate_up), (shape.down, cuts.down)):
            if isinstance(cut, Tile):
                assert tile_bytes(linear, cut) <= device.shared_per_block and rows > BUCKETS[-1]
            elif isinstance(cut, Held):
                assert held_bytes(linear, cut) <= device.shared_per_block and rows <= BUCKETS[-1]
                assert cut.stages >= 2 and linear.panels % cut.warps_k == cut.warps % cut.warps_k == 0
            else:
                assert shared_bytes(linear, cut) <= device.shared_per_block
                assert cut.stages >= 4


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_long_chunks_of_large_models_take_tiles(device: Device) -> None:
    for name in ("Qwen3-30B-A3B", "Qwen3-30B-A3B, Q4_1", "Qwen3-235B-A22B"):
        cuts = tuned(MIXTURES[name], rows=512, device=device)
        assert cuts.narrow and cuts.most == 32
        for linear, cut in ((MIXTURES[name].gate_up, cuts.gate_up), (MIXTURES[name].down, cuts.down)):
            assert isinstance(cut, Tile) and tile_bytes(linear, cut) <= device.shared_per_block


def test_one_experts_rows_are_read_together_on_an_orin() -> None:
    cuts = tuned(MIXTURES["Qwen3-30B-A3B"], rows=16, device=DEVICES["agx orin"])
    assert cuts.most == 16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BuildError, match="experts of 2048 columns need more than the 16384 bytes"):
        tuned(MIXTURES["Qwen3-30B-A3B"], rows=1, device=Device(87, 16, 16 << 10))
    with pytest.raises(BuildError, match=r"gate has 2000 experts, 8 for a token"):
        require_mixture(2000, 8, "gate")
    require_mixture(512, 32, "gate")
    cut = Tuning(16, 8, 1, 4, 8)
    with pytest.raises(ValueError, match="groups of 8 and of 4"):
        Cuts(cut, Tuning(16, 8, 1, 4, 4))

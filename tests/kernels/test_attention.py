"""Attention's launches: what each block does covers every token once, and every kernel fits its device."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from compiled import DEVICES, REGISTERS_PER_SM, assert_fits, compile_for, kernels_of
from hypothesis import given
from hypothesis import strategies as st

from edgellm.cuda.launch import At, Device, Launch
from edgellm.errors import BuildError
from edgellm.kernels.attention_decode import (
    SECOND_ROW,
    TILE,
    Plan,
    clusters_at_once,
    decode_attention,
    decode_workspace,
    plan,
    segments,
)
from edgellm.kernels.attention_prefill import (
    LEAST_PARTED,
    LEAST_TILES,
    part_tiles,
    parts,
    prefill_attention,
    prefill_attention_workspace,
    rope_and_append,
)
from edgellm.kernels.attention_shape import (
    COUNTERS,
    COUNTERS_BYTES,
    AttentionShape,
    Cache,
    CacheKind,
    HeadNorms,
    rope_table,
)
from edgellm.model.rotary import make_rotary

AT = At("x")
ROWS = (1, 2, 4, 8, 16)
SHARED_PER_SM = {80: 164 << 10, 86: 100 << 10, 87: 164 << 10, 90: 228 << 10}
SHAPES = {
    "smollm2": AttentionShape(9, 3, 64, 1024, "fp16", 0.125),
    "qwen2.5-7b": AttentionShape(28, 4, 128, 32768, "int8", 0.088),
    "qwen3-8b": AttentionShape(32, 8, 128, 1024, "fp16", 0.088, qk_norm=True),
    "mha 80": AttentionShape(32, 32, 80, 2048, "int8", 0.11),
    "mqa 96": AttentionShape(16, 1, 96, 2048, "fp16", 0.1),
    "mqa 128": AttentionShape(16, 1, 128, 2048, "int8", 0.1, qk_norm=True),
}


def decode(shape: AttentionShape, rows: int, device: Device) -> list[Launch]:
    return decode_attention(
        shape,
        rows=rows,
        device=device,
        qkv=AT,
        rows_at=AT,
        rope=AT,
        norms=HeadNorms(AT, AT) if shape.qk_norm else HeadNorms(),
        cache=Cache(AT, AT),
        out=AT,
        workspace=At("workspace"),
    )


def prefill(shape: AttentionShape, tokens: int, device: Device) -> list[Launch]:
    norms, cache = HeadNorms(AT, AT) if shape.qk_norm else HeadNorms(), Cache(AT, AT)
    return [
        *rope_and_append(shape, tokens=tokens, chunk=AT, qkv=AT, rope=AT, norms=norms, cache=cache),
        *prefill_attention(
            shape, tokens=tokens, device=device, chunk=AT, qkv=AT, cache=cache, out=AT, workspace=AT
        ),
    ]


pasts = st.lists(st.none() | st.integers(0, 3000), min_size=1, max_size=16)


@given(pasts, st.integers(1, 140), st.integers(1, 9), st.sampled_from([2, 4, 8]), st.booleans())
def test_every_tile_of_every_row_and_head_has_one_block(
    pasts: list[int | None], blocks: int, heads: int, warps: int, clusters: bool
) -> None:
    cut = Plan(warps, 2, blocks, clusters)
    seen: Counter[tuple[int, int, int]] = Counter()
    for _, each in segments(cut, heads, pasts):
        seen.update((each.head, each.row, tile) for tile in range(each.first, each.last + 1))
    wanted = {
        (head, row, tile)
        for head in range(heads)
        for row, past in enumerate(pasts)
        if past is not None
        for tile in range(past // TILE + 1)
    }
    assert seen == Counter(wanted)


@given(pasts, st.integers(1, 140), st.integers(1, 9))
def test_partial_sums_have_places_of_their_own_and_one_counter_counts_them(
    pasts: list[int | None], blocks: int, heads: int
) -> None:
    cut = Plan(4, 2, blocks)
    parts = list(segments(cut, heads, pasts))
    places = [(block, each.place) for block, each in parts if not each.whole]
    assert len(places) == len(set(places))
    for mine in {(each.head, each.row) for _, each in parts}:
        of_row = [(block, each) for block, each in parts if (each.head, each.row) == mine]
        assert all(each.whole for _, each in of_row) == (len(of_row) == 1)
        # The last to come adds up neighbouring blocks: no other row's sums may lie between.
        assert [block for block, _ in of_row] == list(range(of_row[0][0], of_row[-1][0] + 1))
        # What was begun in an earlier block is the first place of a later one.
        assert all(each.place == 0 for _, each in of_row[1:])


@given(pasts, st.integers(1, 140), st.integers(1, 9))
def test_blocks_have_equal_work_up_to_what_a_second_row_takes(
    pasts: list[int | None], blocks: int, heads: int
) -> None:
    work: Counter[int] = Counter()
    for block, each in segments(Plan(4, 2, blocks), heads, pasts):
        work[block] += each.last - each.first + 1
    assert max(work.values(), default=0) <= -(-sum(work.values()) // blocks) + SECOND_ROW * 4


def test_few_rows_have_blocks_of_their_own() -> None:
    """640 tokens and eight KV heads, as on Orin: no block begins a second row, few sums are added up."""
    for blocks, longest in ((16, 20), (14, 40), (8, 40)):
        parts = list(segments(Plan(8, 2, blocks), 8, [639]))
        assert len({block for block, _ in parts}) == len(parts)
        assert max(each.last - each.first + 1 for _, each in parts) == longest
    # Long ones keep all blocks busy.
    assert len({block for block, _ in segments(Plan(8, 2, 14), 8, [4095])}) == 14


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_the_grid_fills_the_device(shape: AttentionShape, device: Device) -> None:
    for rows in (1, 2, 4, 8, 16):
        cut = plan(shape, rows=rows, device=device)
        assert cut.stages >= 1
        if cut.clusters:
            assert cut.blocks in (2, 4, 8)
            assert shape.kv_heads * rows <= clusters_at_once(cut.blocks, device)
            continue
        assert cut.blocks <= cut.together * device.multiprocessors
        workspace = decode_workspace(shape, rows=rows, device=device)
        partial = shape.queries * (shape.head_size + 2) * 4
        assert workspace >= COUNTERS_BYTES + 2 * cut.blocks * partial
        assert rows * shape.kv_heads <= COUNTERS


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_kernels_fit_without_spilling(name: str) -> None:
    device = DEVICES[name]
    launches = [
        launch
        for shape in SHAPES.values()
        for rows in ROWS
        for launch in (*decode(shape, rows, device), *prefill(shape, 16 * rows, device))
    ]
    compiled = compile_for(kernels_of(launches), device.sm)
    assert_fits(compiled, device)
    together = {
        decode(shape, rows, device)[0].kernel: plan(shape, rows=rows, device=device).together
        for shape in SHAPES.values()
        for rows in ROWS
    }
    for each in compiled:
        count, took = together.get(each.kernel, 1), each.resources
        warps = count * each.kernel.threads // 32
        assert warps * -(-took.registers * 32 // 256) * 256 <= REGISTERS_PER_SM, each
        # Beside what a block has itself the device takes 1 KiB of it.
        assert count * (each.kernel.shared + took.shared + 1024) <= SHARED_PER_SM[device.sm], each


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((32, 8, 72, 1024, "fp16", 1.0), "head_size 72"),
        ((9, 2, 64, 1024, "fp16", 1.0), "9 query heads"),
        ((64, 2, 64, 1024, "fp16", 1.0), "32 query heads share"),
        ((32, 8, 64, 1000, "fp16", 1.0), "max_seq 1000"),
    ],
)
def test_shapes_without_a_kernel_are_refused_by_name(
    numbers: tuple[int, int, int, int, CacheKind, float], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        AttentionShape(*numbers)


def test_a_clusters_first_block_has_work_whenever_another_has() -> None:
    for past in range(0, 3000, 7):
        blocks = [block for block, _ in segments(Plan(4, 2, 8, clusters=True), 1, [past])]
        assert blocks == list(range(len(blocks)))


def test_more_rows_than_lanes_are_refused() -> None:
    with pytest.raises(BuildError, match="32 rows at most"):
        plan(SHAPES["smollm2"], rows=33, device=DEVICES["h100"])


def test_the_rope_table_turns_as_the_rotary_says() -> None:
    rotary = make_rotary(64, 10000.0)
    table = rope_table(rotary, 48)
    assert table.shape == (48, 2, 32)
    angles = np.arange(48)[:, None] * rotary.frequencies
    np.testing.assert_allclose(table[:, 0], np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(table[:, 1], np.sin(angles), atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_launches_share_a_workspace_without_writing_on_each_others_counters(shape: AttentionShape) -> None:
    device = DEVICES["orin nx"]
    launches = [launch for rows in (1, 2, 4, 8, 16) for launch in decode(shape, rows, device)]
    launches += [prefill(shape, tokens, device)[1] for tokens in (16, 32, 64)]
    parted = [launch for launch in launches if launch.arguments[-1] is not None]
    assert parted
    for launch in parted:
        partials, counters = launch.arguments[-2:]
        assert isinstance(partials, At) and isinstance(counters, At)
        assert partials.offset == counters.offset + COUNTERS_BYTES


def test_more_counters_than_there_are_are_refused() -> None:
    many = AttentionShape(128, 128, 64, 1024, "fp16", 0.125)
    with pytest.raises(BuildError, match="8 rows of 128 KV heads"):
        plan(many, rows=16, device=DEVICES["h100"])


@given(st.integers(1, 2048), st.sampled_from(list(SHAPES.values())), st.sampled_from(list(DEVICES.values())))
def test_prefill_blocks_reach_every_row(tokens: int, shape: AttentionShape, device: Device) -> None:
    append, attend = prefill(shape, tokens, device)
    warps = attend.kernel.threads // 32
    assert attend.grid[0] == shape.kv_heads
    assert (attend.grid[1] - 1) * 16 * warps < tokens * shape.queries <= attend.grid[1] * 16 * warps
    assert append.grid[0] * (append.kernel.threads // 32) >= shape.heads + 2 * shape.kv_heads
    assert append.grid[1] == tokens


@given(st.integers(1, 16), st.integers(1, 40_000))
def test_parts_have_every_tile_of_keys_once(count: int, keys: int) -> None:
    shares = part_tiles(count, keys)
    assert [tile for share in shares for tile in share] == list(range(-(-keys // 64)))
    assert len(shares) <= count
    assert all(len(share) >= LEAST_TILES for share in shares[:-1])
    assert len(shares) == 1 or keys > (LEAST_PARTED - 1) * 64


@given(st.integers(1, 2048), st.sampled_from(list(SHAPES.values())), st.sampled_from(list(DEVICES.values())))
def test_parted_blocks_have_room_beside_each_other(
    tokens: int, shape: AttentionShape, device: Device
) -> None:
    count = parts(shape, tokens=tokens, device=device)
    size = prefill_attention_workspace(shape, tokens=tokens, device=device)
    if count == 1:
        assert size == 0
        return
    _, attend = prefill(shape, tokens, device)
    heads, rows, _ = attend.grid
    assert attend.grid == (heads, rows, count)
    assert heads * rows * count <= 2 * device.multiprocessors
    assert heads * rows <= COUNTERS
    # Of each of a block's 64 rows its sums, the largest logit and the sum of weights.
    assert size == COUNTERS_BYTES + heads * rows * count * 64 * (shape.head_size + 2) * 4


def test_a_turn_behind_a_cached_prefix_fills_the_device() -> None:
    assert parts(SHAPES["qwen3-8b"], tokens=16, device=DEVICES["h100"]) == 16
    assert parts(SHAPES["qwen3-8b"], tokens=16, device=DEVICES["orin nx"]) == 2
    assert parts(SHAPES["qwen3-8b"], tokens=2048, device=DEVICES["h100"]) == 1

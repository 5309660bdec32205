"""Prefill linears without a GPU: every output is somebody's, everything compiles and fits everywhere."""

from __future__ import annotations

from collections import Counter

import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of
from hypothesis import given
from hypothesis import strategies as st

from edgellm.cuda.launch import At, Device, Launch
from edgellm.errors import BuildError
from edgellm.kernels.gemm import (
    TILES,
    Epilogue,
    Tile,
    grid_of,
    outputs_of,
    prefill_linear,
    prefill_workspace,
    shared_bytes,
    steps_of,
    tile_for,
)
from edgellm.kernels.linear import COUNTERS_BYTES, decode_workspace
from edgellm.kernels.packing import PackedShape

SHAPES = {
    "SmolLM2 qkv": PackedShape(960, 576, 4, 32, "offset"),
    "SmolLM2 gate-up": PackedShape(3072, 576, 4, 32, "offset", swiglu=True),
    "Qwen2.5-7B down": PackedShape(3584, 18944, 4, 64, "zero_point"),
    "Qwen3-8B qkv": PackedShape(6144, 4096, 4, 128, "centred"),
    "Qwen3-8B down": PackedShape(4096, 12288, 4, 128, "offset"),
    "Qwen-7B down": PackedShape(4096, 11008, 8, 128, "none"),
    "Q6_K": PackedShape(4099, 4096, 8, 16, "none"),
    "dense": PackedShape(1000, 2048, 16, 64, "none"),
}
EPILOGUES: tuple[Epilogue, ...] = ("store", "residual")


def linear(
    shape: PackedShape,
    tokens: int,
    device: Device,
    *,
    epilogue: Epilogue = "store",
    tile: Tile | None = None,
) -> list[Launch]:
    return prefill_linear(
        shape,
        tokens=tokens,
        device=device,
        chunk=At("chunk"),
        x=At("x"),
        weights=At("weights"),
        bias=None,
        epilogue="swiglu" if shape.swiglu else epilogue,
        out=At("out"),
        workspace=At("workspace"),
        tile=tile,
    )


@given(st.integers(1, 700), st.integers(17, 600), st.sampled_from(TILES))
def test_every_output_is_computed_once(n: int, tokens: int, tile: Tile) -> None:
    shape = PackedShape(n, 64, 4, 32, "offset")
    across, down, _ = grid_of(shape, tokens, tile)
    taken = Counter(
        output
        for x in range(across)
        for y in range(down)
        for output in outputs_of(shape, tokens, tile, (x, y))
    )
    assert taken == Counter(
        (row_block, token) for row_block in range(shape.row_blocks) for token in range(0, tokens, 8)
    )


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tile_fits_every_device(shape: PackedShape, device: Device) -> None:
    for tokens in (32, 64, 128, 512, 2048):
        tile = tile_for(shape, tokens=tokens, device=device)
        assert shared_bytes(shape, tile) <= device.shared_per_block
        assert tile.row_blocks % tile.warps_r == 0 and tile.tokens % (8 * tile.warps_t) == 0


def test_few_tokens_do_not_take_a_large_tile() -> None:
    for device in DEVICES.values():
        for tokens in (32, 64):
            assert tile_for(SHAPES["Qwen3-8B qkv"], tokens=tokens, device=device).tokens <= tokens


def test_sixteen_tokens_are_a_decode_linears_rows() -> None:
    shape, orin = SHAPES["Qwen2.5-7B down"], DEVICES["agx orin"]
    (launch,) = linear(shape, 16, orin)
    assert launch.kernel.source == "linear.cu"
    assert prefill_workspace(shape, 16, orin) == decode_workspace(shape, 16, orin) > 0


def test_splits_part_the_columns_and_their_sums_have_room() -> None:
    for device in DEVICES.values():
        for shape in SHAPES.values():
            for tokens in (32, 64, 128, 512, 2048):
                tile = tile_for(shape, tokens=tokens, device=device)
                parts = range(tile.splits * tile.warps_k)
                steps = [step for part in parts for step in steps_of(shape, tile, part)]
                assert steps == list(range(shape.k // 64))
                across, down, splits = grid_of(shape, tokens, tile)
                size = prefill_workspace(shape, tokens, device)
                if splits == 1:
                    assert size == 0
                else:
                    assert across * down * 4 <= COUNTERS_BYTES
                    padded = across * tile.tokens * down * tile.row_blocks * 16
                    assert size == COUNTERS_BYTES + splits * padded * 4


def test_few_tokens_are_split_where_sms_would_idle() -> None:
    assert tile_for(SHAPES["Qwen3-8B down"], tokens=64, device=DEVICES["h100"]).splits > 1
    assert tile_for(SHAPES["Qwen3-8B down"], tokens=2048, device=DEVICES["h100"]).splits == 1


def test_splits_without_counters_are_refused() -> None:
    # 2,048 tiles, whose last counters would lie among the first one's sums.
    tile = Tile(4, 32, 4, 1, 3, splits=2)
    with pytest.raises(ValueError, match="more tiles than a workspace has counters, 1024"):
        linear(SHAPES["Qwen3-8B down"], 1024, DEVICES["h100"], tile=tile)
    assert linear(SHAPES["Qwen3-8B down"], 512, DEVICES["h100"], tile=tile)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BuildError, match="more than the 4096 bytes"):
        tile_for(SHAPES["Qwen3-8B qkv"], tokens=64, device=Device(87, 16, 4096))


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_every_kind_compiles_and_fits(name: str) -> None:
    device = DEVICES[name]
    launches: list[Launch] = []
    for number, shape in enumerate(SHAPES.values()):
        for tokens in (32, 128, 512):
            launches += linear(shape, tokens, device, epilogue=EPILOGUES[number % 2])
    shape = SHAPES["Qwen3-8B qkv"]
    for tile in TILES:
        if shared_bytes(shape, tile) <= device.shared_per_block:
            launches += linear(shape, 512, device, tile=tile)
    assert_fits(compile_for(kernels_of(launches), device.sm), device)

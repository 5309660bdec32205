"""Decode linears without a GPU: every output is somebody's, everything compiles and fits everywhere."""

from __future__ import annotations

from collections import Counter

import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of
from hypothesis import given
from hypothesis import strategies as st

from edgellm.cuda.launch import At, Device, Launch
from edgellm.errors import BuildError
from edgellm.kernels.linear import BUCKETS, COUNTERS_BYTES, Epilogue, decode_linear, decode_workspace
from edgellm.kernels.linear_cut import Tuning, panels_of, row_blocks_of, shared_bytes
from edgellm.kernels.linear_measured import MEASURED
from edgellm.kernels.linear_tuned import tuned
from edgellm.kernels.norm import Norm, NormAhead
from edgellm.kernels.packing import PackedShape, Zero

SHAPES = {
    "SmolLM2 qkv": PackedShape(960, 576, 4, 32, "offset"),
    "SmolLM2 gate-up": PackedShape(3072, 576, 4, 32, "offset", swiglu=True),
    "SmolLM2 down": PackedShape(576, 1536, 4, 32, "offset"),
    "SmolLM2 head": PackedShape(49152, 576, 8, 32, "none"),
    "Qwen2.5-0.5B down": PackedShape(896, 4864, 4, 64, "zero_point"),
    "Qwen2.5-7B gate-up": PackedShape(37888, 3584, 4, 128, "zero_point", swiglu=True),
    "Qwen2.5-7B down": PackedShape(3584, 18944, 4, 128, "centred"),
    "Qwen3-8B qkv": PackedShape(6144, 4096, 4, 128, "centred"),
    "Qwen3-8B o": PackedShape(4096, 4096, 4, 128, "centred"),
    "Qwen3-8B gate-up": PackedShape(24576, 4096, 4, 128, "centred", swiglu=True),
    "Qwen3-8B down": PackedShape(4096, 12288, 4, 128, "offset"),
    "Qwen3-8B head": PackedShape(151936, 4096, 4, 128, "offset"),
    "Qwen-7B down": PackedShape(4096, 11008, 8, 128, "none"),
    "MoE down": PackedShape(2048, 768, 4, 128, "centred"),
    "Q6_K": PackedShape(4099, 4096, 8, 16, "none"),
    "dense": PackedShape(1000, 2048, 16, 64, "none"),
}

AHEAD = NormAhead(At("gain"), At("scales"), At("scaled"), At("squares"))
EPILOGUES: tuple[Epilogue, ...] = ("store", "residual", "logits")


def linear(
    shape: PackedShape, rows: int, device: Device, *, normed: bool = True, epilogue: Epilogue = "store"
) -> list[Launch]:
    epilogue = "swiglu" if shape.swiglu else epilogue
    return decode_linear(
        shape,
        rows=rows,
        device=device,
        x=At("x"),
        norm=Norm(1e-6, At("squares"), At("scales"), At("next_scales")) if normed else None,
        weights=At("weights"),
        bias=None,
        epilogue=epilogue,
        out=At("out"),
        workspace=At("workspace"),
        ahead=AHEAD if epilogue == "residual" else None,
    )


def assert_covered(shape: PackedShape, rows: int, device: Device) -> None:
    """Every panel of every row block is multiplied by one warp, within the device's shared memory."""
    cut = tuned(shape, rows=rows, device=device)
    assert shared_bytes(shape, rows, cut) <= device.shared_per_block
    assert_cut_covers(shape, cut)


def assert_cut_covers(shape: PackedShape, cut: Tuning) -> None:
    assert cut.warps % cut.warps_k == 0 and cut.blocks >= 1
    # Row blocks and panels are parted independently of each other: rows by block and side, panels by slab and
    # by the rest of the warp's number.
    rows_taken = Counter(
        row_block
        for block in range(cut.blocks)
        for warp in range(0, cut.warps, cut.warps_k)
        for row_block in row_blocks_of(shape, cut, block, warp)
    )
    assert rows_taken == Counter(range(shape.row_blocks))
    panels_taken = Counter(
        panel
        for slab in range(cut.slabs)
        for warp in range(cut.warps_k)
        for panel in panels_of(shape, cut, slab, warp)
    )
    assert panels_taken == Counter(range(shape.panels))
    for slab in range(cut.slabs):
        assert any(len(panels_of(shape, cut, slab, warp)) for warp in range(cut.warps_k)), "an empty slab"


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_output_is_computed_once(shape: PackedShape, device: Device) -> None:
    for rows in BUCKETS:
        assert_covered(shape, rows, device)


@given(
    st.integers(1, 5000),
    st.integers(1, 320),
    st.sampled_from([(4, 128), (4, 32), (8, 16), (8, 64), (16, 64)]),
    st.sampled_from(BUCKETS),
    st.sampled_from(sorted(DEVICES)),
)
def test_any_shape_is_covered(n: int, chunks: int, kind: tuple[int, int], rows: int, name: str) -> None:
    bits, group = kind
    k = chunks * max(64, group if bits < 16 else 64)
    zero: Zero = "offset" if bits == 4 else "none"
    assert_covered(PackedShape(n, k, bits, group, zero), rows, DEVICES[name])


def test_a_workspace_has_room_for_every_slab() -> None:
    shape = SHAPES["Qwen2.5-7B down"]
    orin = DEVICES["agx orin"]
    cut = tuned(shape, rows=16, device=orin)
    assert cut.join == "last_block" and cut.slabs > 1
    assert decode_workspace(shape, 16, orin) == COUNTERS_BYTES + cut.slabs * 3584 * 16 * 4
    assert cut.blocks <= COUNTERS_BYTES // 4
    assert decode_workspace(SHAPES["Qwen3-8B o"], 1, orin) == 0


def test_what_does_not_fit_is_refused() -> None:
    tiny = Device(87, 16, 4 << 10)
    with pytest.raises(BuildError, match="4096 columns needs more than the 4096 bytes"):
        tuned(SHAPES["Qwen3-8B o"], rows=16, device=tiny)
    with pytest.raises(ValueError, match="not for 3"):
        linear(SHAPES["Qwen3-8B o"], 3, DEVICES["h100"])


@pytest.mark.parametrize("name", ["a100", "rtx3090", "agx orin", "h100"])
def test_every_kind_compiles_and_fits(name: str) -> None:
    """Each shape's kernels at one row and at sixteen; those between differ in the number of rows only."""
    device = DEVICES[name]
    launches: list[Launch] = []
    for number, shape in enumerate(SHAPES.values()):
        epilogue = EPILOGUES[number % 3]
        for rows in (1, 16):
            launches += linear(shape, rows, device, normed=number % 2 == 0, epilogue=epilogue)
    assert_fits(compile_for(kernels_of(launches), device.sm), device)


def test_measured_cuts_cover_compile_and_fit() -> None:
    """Nobody who pastes one from a sweep has to know what a kernel's registers are."""
    launches: dict[Device, list[Launch]] = {}
    for (sm, multiprocessors, shape, rows), cut in MEASURED.items():
        device = next(d for d in DEVICES.values() if (d.sm, d.multiprocessors) == (sm, multiprocessors))
        assert tuned(shape, rows=rows, device=device) == cut
        assert_covered(shape, rows, device)
        assert cut.slabs == 1 or cut.join != "whole"
        epilogue: Epilogue = "store" if shape.n > shape.k else "residual"
        launches.setdefault(device, []).extend(
            linear(shape, rows, device, normed=epilogue == "store", epilogue=epilogue)
        )
    for device, its in launches.items():
        assert_fits(compile_for(kernels_of(its), device.sm), device)

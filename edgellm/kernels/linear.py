"""Linear layers for 1 to 16 rows: launches of `linear.cu`."""

from __future__ import annotations

from typing import Final, Literal

from edgellm.cuda.launch import Argument, At, Device, Kernel, Launch
from edgellm.kernels.linear_cut import Tuning, shared_bytes
from edgellm.kernels.linear_tuned import tuned
from edgellm.kernels.norm import Norm, NormAhead
from edgellm.kernels.packing import ROW_BLOCK, PackedShape, Zero

Epilogue = Literal["store", "residual", "swiglu", "logits"]
"""`store`: float16 y; `residual`: added to float32; `swiglu`: float16 silu(gate) · up; `logits`: float32."""

BUCKETS: Final = (1, 2, 4, 8, 16)
"""Rows that there are kernels for."""
COUNTERS_BYTES: Final = 4096
"""Of the workspace: 1024 counters that must be 0 before the first launch; launches leave them so."""

_SOURCE: Final = "linear.cu"
ZERO_NAMES: Final[dict[Zero, str]] = {
    "none": "NONE",
    "centred": "CENTRED",
    "zero_point": "ZERO_POINT",
    "offset": "OFFSET",
}


def decode_linear(
    shape: PackedShape,
    *,
    rows: int,
    device: Device,
    x: At,
    norm: Norm | None,
    weights: At,
    bias: At | None,
    epilogue: Epilogue,
    out: At,
    workspace: At | None,
    ahead: NormAhead | None = None,
    tuning: Tuning | None = None,
) -> list[Launch]:
    """y = x · wᵀ + bias for a bucket of rows, all of which are computed and stored.

    Args:
        rows: 1, 2, 4, 8 or 16.
        x: float16 [rows, K], or with `norm` what a `NormAhead` left.
        bias: float32 [16 · row_blocks], see `pack_bias`.
        out: float16 or float32 [rows, shape.outputs], see `Epilogue`.
        workspace: `decode_workspace` bytes, zeros before the first launch; linears that run one after the
            other can share it, other kernels cannot.
        ahead: the norm behind a `residual`, which leaves what it wants; None: nobody does.
        tuning: how it is cut, instead of `tuned`.
    """
    if rows not in BUCKETS:
        raise ValueError(f"there are kernels for {BUCKETS} rows, not for {rows}")
    if (epilogue == "swiglu") != shape.swiglu:
        raise ValueError(f"epilogue {epilogue} does not suit weights with swiglu {shape.swiglu}")
    if ahead and epilogue != "residual":
        raise ValueError(f"epilogue {epilogue} leaves nothing for a norm")
    cut = tuning or tuned(shape, rows=rows, device=device)
    if cut.join == "last_block" and workspace is None:
        raise ValueError("this linear needs a workspace")
    arguments: tuple[Argument, ...] = (
        weights,
        x,
        norm.squares if norm else None,
        float(norm.epsilon if norm else 0.0),
        norm.scales if norm else None,
        norm.next_scales if norm else None,
        bias,
        out,
        *(ahead.arguments if ahead else (None,) * 4),
        workspace if cut.join == "last_block" else None,
        shape.row_blocks,
        shape.outputs,
    )
    kernel = Kernel(
        _SOURCE,
        _expression(shape, rows, epilogue, cut, normed=norm is not None),
        cut.warps * 32,
        shared_bytes(shape, rows, cut),
    )
    return [Launch(kernel, (cut.blocks, cut.slabs, 1), arguments)]


def decode_workspace(shape: PackedShape, rows: int, device: Device) -> int:
    """Bytes that this linear's launches need of a workspace; 0: none."""
    cut = tuned(shape, rows=rows, device=device)
    if cut.join != "last_block":
        return 0
    return COUNTERS_BYTES + cut.slabs * shape.row_blocks * rows * ROW_BLOCK * 4


def _expression(shape: PackedShape, rows: int, epilogue: Epilogue, cut: Tuning, *, normed: bool) -> str:
    weights = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}, {cut.slabs}"
    rest = f"{rows}, {epilogue.upper()}, {str(normed).lower()}, {cut.warps}, {cut.warps_k}, {cut.stages}"
    rest += f", {cut.early}, {cut.abreast}, {cut.sets}, {str(cut.held).lower()}, {cut.blocks_per_sm}"
    if cut.join == "cluster":
        return f"cluster_linear<{weights}, {rest}>"
    return f"linear<{weights}, {cut.join.upper()}, {rest}>"

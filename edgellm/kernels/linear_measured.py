"""Cuts of decode linears that tools/gpu/linear_sweep.py found better, within whole steps, than the rule does.

A device, a shape or a bucket that is not here has what the rule of `linear_tuned` says.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from edgellm.kernels.linear_cut import Tuning
from edgellm.kernels.packing import PackedShape


class Measured(NamedTuple):
    """What a cut was measured for."""

    sm: int
    multiprocessors: int
    shape: PackedShape
    rows: int


def _h100(n: int, k: int, rows: int, *, swiglu: bool = False) -> Measured:
    """On an H100 with 132 SMs, 4 bits in groups of 128 with zero points."""
    return Measured(90, 132, PackedShape(n, k, 4, 128, "zero_point", swiglu), rows)


# blocks, slabs, join, warps, warps_k, stages, early, abreast, sets, held, blocks_per_sm
MEASURED: Final[dict[Measured, Tuning]] = {
    # Qwen3-8B
    _h100(4096, 4096, 1): Tuning(86, 1, "whole", 16, 16, 3, 1, 3, 1, False, 1),
    _h100(6144, 4096, 2): Tuning(128, 1, "whole", 8, 8, 6, 1, 3, 1, False, 1),
    _h100(24576, 4096, 2, swiglu=True): Tuning(132, 1, "whole", 16, 16, 3, 2, 3, 2, False, 1),
    _h100(4096, 12288, 2): Tuning(128, 1, "whole", 16, 8, 7, 4, 1, 1, False, 1),
    _h100(6144, 4096, 4): Tuning(128, 1, "whole", 8, 8, 4, 2, 3, 1, True, 1),
    _h100(4096, 4096, 4): Tuning(86, 1, "whole", 16, 16, 3, 1, 3, 1, True, 1),
    _h100(24576, 4096, 4, swiglu=True): Tuning(132, 1, "whole", 16, 16, 2, 1, 3, 2, False, 1),
    _h100(4096, 12288, 4): Tuning(132, 1, "whole", 16, 16, 5, 2, 1, 2, False, 1),
    _h100(4096, 4096, 8): Tuning(128, 1, "whole", 16, 8, 4, 1, 1, 1, False, 1),
    _h100(24576, 4096, 8, swiglu=True): Tuning(132, 1, "whole", 16, 8, 5, 1, 1, 2, False, 1),
    _h100(4096, 12288, 8): Tuning(38, 3, "cluster", 16, 16, 7, 6, 1, 2, True, 1),
    _h100(6144, 4096, 16): Tuning(132, 1, "whole", 16, 16, 4, 1, 1, 1, False, 1),
    _h100(24576, 4096, 16, swiglu=True): Tuning(132, 1, "whole", 16, 4, 4, 2, 1, 1, False, 1),
    _h100(4096, 12288, 16): Tuning(16, 6, "cluster", 16, 4, 3, 2, 2, 1, False, 1),
    _h100(151936, 4096, 16): Tuning(132, 1, "whole", 16, 16, 4, 1, 1, 1, False, 1),
}

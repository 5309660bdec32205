"""The cut for a decode linear's shape, bucket and device: measured where somebody did, otherwise by a rule.

The time of a decode step is the time to read the weights, so what is chosen here is only how that stays true:
how many bytes are under way in each SM, how evenly they are spread, and that x costs little beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from edgellm.cuda.launch import Device
from edgellm.errors import BuildError
from edgellm.kernels.linear_cut import Join, Tuning, held_registers, shared_bytes, x_bytes
from edgellm.kernels.linear_measured import MEASURED, Measured
from edgellm.kernels.packing import ROW_BLOCK, PackedShape

_SHARED_GOAL: Final = 190 << 10
_SHARED_GOAL_EARLY: Final = 176 << 10
"""Of a block; the second where the next kernel starts before this one has ended."""
_RING_GOAL: Final = 53 << 10
"""Of weights under way in an SM, where there is room: latency × bandwidth, and what arrives meanwhile."""
_EARLY_BYTES: Final = 122 << 10
_EARLY_BYTES_SHARED: Final = 72 << 10
"""Of weights asked for before x, which waits behind them: one stage only where x is much itself. The second
where x goes to shared memory."""
_AHEAD_BYTES: Final = 36 << 10
"""Of weights that arrive while the kernel before ends."""
_SMALL: Final = 64 << 10
"""Of a block that has all its weights under way at once: so little leaves room for the next kernel's."""
_X_GOAL: Final = 72 << 10
"""Of x in a block's shared memory: beyond it the columns are parted among blocks."""
_STAGES_LEAST: Final = 2
_STAGES_MOST: Final = 14
_CLUSTER_MOST: Final = 8
_GPCS: Final = 8
"""Of an H100. Clusters that do not fit run when all others have ended: twice the time."""
_SLABS_MOST: Final = 32
_HELD_PANELS: Final = 4
_HELD_REGISTERS: Final = 80
"""Of x in a warp: its loop over panels is unrolled, and the compiler finds no room for more."""
_REGISTERS: Final = 65_536
"""Of an SM."""
_REGISTERS_MOST: Final = 255
"""Of a thread."""


@cache
def tuned(shape: PackedShape, *, rows: int, device: Device) -> Tuning:
    """The cut for a shape, a bucket and a device.

    Raises:
        BuildError: in no way do two panels for each warp and x fit into the device's shared memory.
    """
    if cut := MEASURED.get(Measured(device.sm, device.multiprocessors, shape, rows)):
        return cut
    cuts = candidates(shape, rows=rows, device=device)
    if not cuts:
        raise BuildError(
            f"a linear of {shape.k} columns needs more than the {device.shared_per_block} bytes of shared "
            "memory that a block has on this device"
        )
    return cuts[0]


def candidates(shape: PackedShape, *, rows: int, device: Device) -> list[Tuning]:
    """All cuts that fit, the one that is expected to be the fastest first."""
    ways = (
        _Way(slabs, join, warps, warps_k, abreast, held)
        for slabs, join in _partings(shape, device)
        for warps, warps_k in _warps(-(-shape.panels // slabs))
        for abreast in (1, 2, 3)
        for held in (True, False)
    )
    cuts = [cut for way in ways if (cut := _fitted(shape, rows, device, way))]
    return sorted(cuts, key=lambda cut: _cost(shape, rows, device, cut))


@dataclass(frozen=True, slots=True)
class _Way:
    """A `Tuning` before its blocks and stages are known."""

    slabs: int
    join: Join
    warps: int
    warps_k: int
    abreast: int
    held: bool


def _partings(shape: PackedShape, device: Device) -> list[tuple[int, Join]]:
    """Numbers of slabs with who joins them; no slab is empty."""
    most = min(shape.panels, _SLABS_MOST)
    slabs = sorted({-(-shape.panels // -(-shape.panels // count)) for count in range(1, most + 1)})
    clusters = _CLUSTER_MOST if device.has_dependent_launch else 1
    return [
        (count, "whole" if count == 1 else "cluster" if count <= clusters else "last_block")
        for count in slabs
    ]


def _warps(slab_panels: int) -> list[tuple[int, int]]:
    """Warps of a block, and how many of them part the columns: sixteen, eight or four; or as many as give
    each the same number of panels."""
    parted = [(warps, warps_k) for warps in (16, 8, 4) for warps_k in (16, 8, 4, 2, 1) if warps_k <= warps]
    return parted + [(warps, warps) for warps in range(9, 16) if slab_panels % warps == 0]


def _fitted(shape: PackedShape, rows: int, device: Device, way: _Way) -> Tuning | None:
    """With as many blocks as SMs, and as many stages as shared memory has room for; None: too few, or too few
    registers."""
    most = max(1, device.multiprocessors // way.slabs)
    if way.join == "cluster" and way.slabs > 2:
        # A cluster's blocks are on SMs of one GPC, and what a GPC has too many is lost: SMs come in pairs.
        lost = way.slabs - 2 if way.slabs % 2 == 0 else way.slabs - 1
        most = max(1, (device.multiprocessors - _GPCS * lost) // way.slabs)
    side = way.warps // way.warps_k * way.abreast
    blocks = min(most, -(-shape.row_blocks // side))
    rounds = -(-shape.row_blocks // (blocks * side))
    slab_panels = -(-shape.panels // way.slabs)
    units = rounds * -(-slab_panels // way.warps_k)
    cut = Tuning(
        blocks=blocks,
        slabs=way.slabs,
        join=way.join,
        warps=way.warps,
        warps_k=way.warps_k,
        stages=0,
        early=0,
        abreast=way.abreast,
        sets=2 if rounds > 1 and rows <= 8 else 1,
        held=way.held,
        blocks_per_sm=1,
    )
    fixed = shared_bytes(shape, rows, cut)
    unit = way.warps * way.abreast * shape.panel_bytes
    goal = _SHARED_GOAL_EARLY if device.has_dependent_launch else _SHARED_GOAL
    # A cluster's block has many columns of few row blocks: all that is left for its ring.
    least = 6 * unit if way.join == "cluster" else 0
    room = min(max(goal, fixed + _RING_GOAL, fixed + least), device.shared_per_block) - fixed
    stages = min(room // unit, _STAGES_MOST, max(_STAGES_LEAST, units + 1))
    if stages < _STAGES_LEAST:
        return None
    small = stages > units and fixed + stages * unit <= _SMALL and device.has_dependent_launch
    registers = _registers(shape, rows, cut)
    if way.held:
        if (
            -(-slab_panels // way.warps_k) > _HELD_PANELS
            or held_registers(shape, rows, cut) > _HELD_REGISTERS
        ):
            return None
    elif way.join == "last_block" and x_bytes(shape, rows, way.slabs) > _X_GOAL:
        return None
    # An SM's four parts have registers of their own, and as many warps as the fullest one.
    threads = -(-way.warps // 4) * 4 * 32
    for blocks_per_sm in (2, 1) if small else (1,):
        if registers <= min(_REGISTERS_MOST, _REGISTERS // (threads * blocks_per_sm)):
            return replace(
                cut, stages=stages, early=_early(rows, cut, stages, unit, units), blocks_per_sm=blocks_per_sm
            )
    return None


def _early(rows: int, cut: Tuning, stages: int, unit: int, units: int) -> int:
    if units * unit <= _SMALL and stages > units:
        return stages - 1
    if rows >= 4 and not (cut.join == "cluster" and rows <= 8):
        return 1
    # What goes to shared memory arrives in order: behind x there must be something under way.
    most = stages - 1 if cut.held else max(1, stages - 2)
    return max(1, min(most, (_EARLY_BYTES if cut.held else _EARLY_BYTES_SHARED) // unit))


def _registers(shape: PackedShape, rows: int, cut: Tuning) -> int:
    """Of a thread, about: tests compile every kernel and see that nothing is spilled."""
    # Without scales, or with many, more operands are under way at a time.
    base = 44 if shape.bits < 16 and shape.group > 16 else 70
    accumulators = (12 if rows > 8 else 6) * cut.abreast
    held = 0
    if cut.held:
        slab_panels = -(-shape.panels // cut.slabs)
        held = held_registers(shape, rows, cut) + 2 * -(-slab_panels // cut.warps_k)
    return base + held + accumulators + (2 if cut.slabs > 1 else 0)


def _cost(shape: PackedShape, rows: int, device: Device, cut: Tuning) -> float:
    """Time in panels that an SM multiplies: rounds with their sums over warps, x, and what slabs wait for
    each other. With dependent launch its numbers are what brings it nearest to 39 sweeps of Qwen3-8B's
    linears on an H100 (tools/gpu/linear_sweep.py); without, instructions counted for Orin."""
    slab_panels = -(-shape.panels // cut.slabs)
    sides = cut.warps // cut.warps_k
    side = sides * cut.abreast
    rounds = -(-shape.row_blocks // (cut.blocks * side))
    measured = device.has_dependent_launch
    # What a round takes is how long its warps are busy; few warps hide latencies badly.
    few = 1 + 0.5 * (16 / cut.warps - 1) if measured else 1.0 if cut.warps > 8 else 1.3
    busy = -(-slab_panels // cut.warps_k) * cut.abreast * cut.warps * few
    if not cut.held:
        # Operands come through shared memory, which is busy with weights, too.
        share = (0.16 if rows <= 8 else 0.09) if measured else (0.4 if rows <= 8 else 0.8)
        busy *= 1 + share / cut.abreast
    elif measured and rows > 8:
        # With half of its registers full of x, a warp has less under way.
        busy *= 1.3
    x_panels = rows * slab_panels * shape.panel * 2 / shape.panel_bytes
    x = (0.74 if measured else 0.6) * x_panels * (sides if cut.held else 1)
    if measured and cut.held and rows <= 2 and cut.blocks_per_sm == 1:
        x += 22.0
    if measured and rows >= 4 and cut.join == "whole":
        # Much of x waits long behind many weights.
        ahead = cut.early * cut.warps * cut.abreast * shape.panel_bytes - _AHEAD_BYTES
        x += 0.4 * max(0, ahead) / shape.panel_bytes
    # Sums over warps are written and read.
    sums = side * cut.warps_k * rows * ROW_BLOCK * 8 / shape.panel_bytes if measured else 0.0
    parts = rounds * side * rows * ROW_BLOCK * 4 * cut.slabs / shape.panel_bytes
    wait = {
        "whole": 0.0,
        # Nobody adds up before everybody has multiplied the last row blocks.
        "cluster": 10.0 * cut.slabs + 41.0 * cut.abreast,
        "last_block": 64.0 + 1.2 * parts,
    }[cut.join]
    waves = -(-cut.blocks * cut.slabs // device.multiprocessors)
    time = waves * (rounds * (busy + 7.2 / cut.abreast + 0.2 * sums) + x + wait)
    if not measured:
        return time * (1 + 0.01 * sides.bit_length())
    # With many row blocks side by side blocks end at different times, and the next kernel waits for the last.
    uneven = {1: 1.0, 2: 1.0, 4: 1.04}.get(sides, 1.3)
    # With two stages nothing is under way behind what is waited for, unless that is all.
    shallow = cut.stages == 2 and rounds * -(-slab_panels // cut.warps_k) > 1
    return time * uneven * (1 + 0.35 / cut.abreast**2 * shallow)

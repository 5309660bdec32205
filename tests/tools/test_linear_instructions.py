"""Counting a kernel's instructions: which loop is taken, where a panel's part of it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from linear_instructions import counted, loop_of

PANEL = ["DEPBAR.LE SB0, 0x1", "LDGSTS.E [R1], [R2.64]", "LDS.128 R4, [R1]", "HMMA.16816.F32 R8, R4, R6, RZ"]
OVER_PANELS = ["IADD3 R0, R0, 0x1, RZ", *PANEL, "FFMA R3, R8, R9, R3", "@P0 BRA `(.L_x_1)"]
OVER_ROUNDS = ["MOV R3, RZ", *PANEL, *PANEL, "FFMA R3, R8, R9, R3", "@!P1 STS [R7], R3", "BAR.SYNC 0x0"]


def sass(*parts: str | list[str]) -> str:
    lines = []
    for part in parts:
        lines += (
            [f"{part}:"] if isinstance(part, str) else [f"        /*{0:04x}*/  {each} ;" for each in part]
        )
    return "\n".join(lines)


def test_a_loop_over_panels_is_all_a_panel() -> None:
    loop = loop_of(sass(["MOV R0, RZ"], ".L_x_0", ["HMMA.16816.F32 R8"], ".L_x_1", OVER_PANELS, ["EXIT"]))
    assert loop == OVER_PANELS
    assert counted(loop, 1) == (7, 0)


def test_an_unrolled_loop_over_rounds_has_panels_and_what_is_beside() -> None:
    text = sass(".L_x_1", OVER_ROUNDS, ["@P0 BRA `(.L_x_1)"], ["BRA `(.L_x_2)"], ".L_x_2", ["EXIT"])
    loop = loop_of(text)
    assert len(loop) == len(OVER_ROUNDS) + 1
    assert counted(loop, 1) == ((2 * len(PANEL) + 1) / 2, 4)


def test_a_kernel_without_products_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match="no loop of products"):
        loop_of(sass(".L_x_1", ["LDGSTS.E [R1], [R2.64]", "@P0 BRA `(.L_x_1)"]))

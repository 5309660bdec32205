"""Boards are named from what they say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from trees import expand, put

from edgellm.governor.platform import Family, identify_board


@pytest.mark.parametrize(
    ("tree", "name", "family", "software", "thermal"),
    [
        ("agx-orin-r35", "Jetson AGX Orin 64GB", Family.AGX_ORIN, "JetPack 5.1.2 (L4T 35.4.1)", True),
        ("orin-nx-r36", "Jetson Orin NX 16GB", Family.ORIN_NX, "JetPack 6.2.1 (L4T 36.4.7)", True),
        (
            "orin-nano-r39",
            "Jetson Orin Nano 8GB (developer kit) Super",
            Family.ORIN_NANO,
            "JetPack 7.2 (L4T 39.0.0)",
            True,
        ),
        ("drive-os-6", "DRIVE AGX Orin", Family.DRIVE_AGX_ORIN, "DRIVE OS 6.0.8.1", True),
        ("pc", "LENOVO 21CBCTO1WW", Family.GENERIC, "unknown", False),
    ],
)
def test_each_tree_is_named(
    tree: str, name: str, family: Family, software: str, thermal: bool, tmp_path: Path
) -> None:
    board = identify_board(expand(tree, tmp_path))
    assert (board.name, board.family, board.software) == (name, family, software)
    assert board.expects.thermal is thermal


def test_nothing_at_all_is_a_generic_host(tmp_path: Path) -> None:
    board = identify_board(tmp_path)
    assert (board.name, board.family, board.l4t, board.drive_os) == (
        "generic host",
        Family.GENERIC,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("revision", "jetpack", "refuses"),
    [
        ("R35 (release), REVISION: 6.3", "5", True),
        ("R35 (release), REVISION: 6.4", "5", False),
        ("R36 (release), REVISION: 4.7", "6.2.1", True),
        ("R36 (release), REVISION: 5.0", "6", False),
        ("R36 (release), REVISION: 4.3", "6.2", False),
        ("R38 (release), REVISION: 2.2", "7.0", True),
        ("R39 (release), REVISION: 0.0", "7.2", False),
        ("R34 (release), REVISION: 1.1", None, False),
    ],
)
def test_jetpack_and_the_allocation_guard_follow_from_the_release(
    revision: str, jetpack: str | None, refuses: bool, tmp_path: Path
) -> None:
    put(tmp_path, "etc/nv_tegra_release", f"# {revision}, GCID: 1, BOARD: generic, EABI: aarch64")
    board = identify_board(tmp_path)
    assert board.jetpack == jetpack
    assert board.nvmap_refuses_free_memory is refuses
    assert board.family is Family.OTHER_TEGRA  # Jetson Linux, but no device tree says which board


@pytest.mark.parametrize(
    ("model", "memory_kb", "name"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 62_799_840, "Jetson AGX Orin 64GB"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 31_000_000, "Jetson AGX Orin 32GB"),
        ("Vendor box with Orin NX", 7_600_000, "Jetson Orin NX 8GB"),
        ("NVIDIA Jetson Orin Nano Developer Kit Super", 7_600_000, "Jetson Orin Nano 8GB Super"),
    ],
)
def test_a_module_without_part_number_is_told_by_its_memory(
    model: str, memory_kb: int, name: str, tmp_path: Path
) -> None:
    put(tmp_path, "proc/device-tree/model", model + "\0")
    put(tmp_path, "proc/device-tree/compatible", "nvidia,tegra234\0")
    put(tmp_path, "proc/meminfo", f"MemTotal:       {memory_kb} kB")
    assert identify_board(tmp_path).name == name


def test_another_tegra_is_named_and_still_expected_to_have_zones(tmp_path: Path) -> None:
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson AGX Thor Developer Kit\0")
    put(tmp_path, "proc/device-tree/compatible", "nvidia,p3971-0050\0nvidia,tegra264\0")
    board = identify_board(tmp_path)
    assert (board.family, board.name) == (Family.OTHER_TEGRA, "NVIDIA Jetson AGX Thor Developer Kit")
    assert board.expects.thermal
    assert board.expects.passive_c is None  # Orin's trips are not assumed of another chip


def test_unreadable_files_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree/model").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_bytes(b"\xff\xfe garbage \x00")
    assert identify_board(tmp_path).family is Family.GENERIC

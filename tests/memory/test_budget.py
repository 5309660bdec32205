"""How much may be taken: a size, or what /proc/meminfo says is free."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "governor"))
from trees import expand

from edgellm.config import load_config
from edgellm.errors import ConfigError
from edgellm.memory.budget import find_budget, read_meminfo
from edgellm.memory.config import MemoryConfig

MIB = 1 << 20


def board(root: Path, text: str) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(text)
    return root


def test_auto_on_an_orin_nx(tmp_path: Path) -> None:
    """By hand: 1,228,800 kB − 65,536 kB − 262,144 kB (256 MiB)."""
    budget = find_budget(MemoryConfig(), expand("orin-nx-r36", tmp_path))
    assert budget.bytes == (1_228_800 - 65_536 - 262_144) * 1024
    assert budget.ever == (16_022_532 - 262_144) * 1024
    assert budget.automatic
    assert "MemAvailable 1.17 GiB − CmaFree 64.0 MiB − memory.reserve 256.0 MiB" in budget.text


def test_auto_with_another_reserve_never_below_nothing(tmp_path: Path) -> None:
    root = expand("orin-nx-r36", tmp_path)
    assert find_budget(MemoryConfig(reserve="0B"), root).bytes == (1_228_800 - 65_536) * 1024
    assert find_budget(MemoryConfig(reserve="2GiB"), root).bytes == 0


def test_a_size_is_a_size_whatever_is_free(tmp_path: Path) -> None:
    root = expand("orin-nx-r36", tmp_path)
    budget = find_budget(MemoryConfig(budget="4GiB"), root)
    assert (budget.bytes, budget.ever, budget.automatic) == (4096 * MIB, 4096 * MIB, False)


def test_more_than_the_board_has_can_never_be(tmp_path: Path) -> None:
    root = board(tmp_path, "MemTotal: 1048576 kB\nMemAvailable: 900000 kB\n")
    assert find_budget(MemoryConfig(budget="4GiB"), root).ever == 768 * MIB


def test_a_kernel_without_a_contiguous_area(tmp_path: Path) -> None:
    info = read_meminfo(board(tmp_path, "MemTotal: 100 kB\nMemAvailable: 50 kB\n"))
    assert info is not None
    assert (info.total, info.available, info.cma_free) == (102_400, 51_200, 0)


@pytest.mark.parametrize("text", [None, "", "MemTotal: 1 kB\n", "garbage"])
def test_auto_needs_meminfo_and_a_size_does_not(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        board(tmp_path, text)
    with pytest.raises(ConfigError, match=r"memory.budget = auto, but .*proc/meminfo.*set it to a size"):
        find_budget(MemoryConfig(), tmp_path)
    budget = find_budget(MemoryConfig(budget="1GiB"), tmp_path)
    assert (budget.bytes, budget.ever) == (1024 * MIB, 1024 * MIB)


@pytest.mark.parametrize("key", ["budget", "reserve"])
def test_what_is_no_size_is_named_with_its_source(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"EDGELLM_MEMORY_{key.upper()}.*'much' is no size.*480MiB"):
        load_config(environment={f"EDGELLM_MEMORY_{key.upper()}": "much"})

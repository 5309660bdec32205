"""Huge pages hold what was there, and small or foreign mappings are left alone."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from edgellm.executor import huge_pages
from edgellm.executor.huge_pages import HUGE_PAGE, SMALLEST, use_huge_pages


def test_what_memory_holds_does_not_change() -> None:
    memory = mmap.mmap(-1, SMALLEST + 2 * HUGE_PAGE)
    memory[:: mmap.PAGESIZE] = bytes(i % 251 for i in range(len(memory) // mmap.PAGESIZE))
    before = bytes(memory)
    assert use_huge_pages() >= SMALLEST
    assert bytes(memory) == before
    memory.close()


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        ("7f0000100000-7f0002100000 rw-p 00000000 00:00 0", (0x7F0000200000, 0x7F0002000000)),
        ("7f0000200000-7f0000a00000 rw-p 00000000 00:00 0 ", (0x7F0000200000, 0x7F0000A00000)),
        ("7f0000200000-7f0002000000 rw-p 00000000 00:00 0          [heap]", (0x7F0000200000, 0x7F0002000000)),
        ("7f0000200000-7f0002000000 rw-p 00000000 00:00 0          [stack]", None),
        ("7f0000200000-7f0002000000 rw-p 00000000 fe:00 123        /weights", None),
        ("7f0000200000-7f0002000000 r--p 00000000 00:00 0", None),
        ("7f0000200000-7f0002000000 rw-s 00000000 00:00 0", None),
        ("7f0000201000-7f0000a01000 rw-p 00000000 00:00 0", None),
    ],
)
def test_whole_huge_pages_of_large_anonymous_mappings(
    line: str, taken: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(line + "\n")
    advised: list[tuple[int, int, int]] = []

    def madvise(start: int, length: int, advice: int) -> int:
        advised.append((start, start + length, advice))
        return 0

    monkeypatch.setattr(huge_pages, "MAPS", maps)
    monkeypatch.setattr(huge_pages, "madvise", madvise)
    total = use_huge_pages()
    ranges = {(start, end) for start, end, _ in advised}
    assert ranges == ({taken} if taken else set())
    assert total == (taken[1] - taken[0] if taken else 0)


def test_a_kernel_without_huge_pages_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "madvise", lambda start, length, advice: 22)
    assert use_huge_pages() == 0
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "none")
    assert use_huge_pages() == 0

"""Dropping the pages of a mapped file, as the kernel counts them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from edgellm.executor import file_pages
from edgellm.executor.file_pages import drop_mapped_pages

SIZE = 64 * mmap.PAGESIZE


def _resident(path: Path) -> int:
    """Kilobytes of the file's mappings that are resident in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, mmap.mmap]:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert sum(mapping[:: mmap.PAGESIZE]) == 0
    return path, mapping


def test_clean_pages_are_dropped_and_come_back(mapped: tuple[Path, mmap.mmap]) -> None:
    path, mapping = mapped
    assert _resident(path) == SIZE // 1024
    drop_mapped_pages(path)
    assert _resident(path) == 0
    assert mapping[:256] == bytes(range(256))
    mapping.close()


def test_a_mapping_that_was_written_to_is_left_alone(mapped: tuple[Path, mmap.mmap]) -> None:
    path, mapping = mapped
    mapping[5] = 99
    drop_mapped_pages(path)
    assert mapping[5] == 99
    mapping.close()


def test_other_files_are_left_alone(mapped: tuple[Path, mmap.mmap], tmp_path: Path) -> None:
    path, mapping = mapped
    drop_mapped_pages(tmp_path / "weight")
    drop_mapped_pages(tmp_path / "missing")
    assert _resident(path) == SIZE // 1024
    mapping.close()


def test_a_system_without_smaps_is_fine(
    mapped: tuple[Path, mmap.mmap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mapping = mapped
    monkeypatch.setattr(file_pages, "SMAPS", tmp_path / "none")
    drop_mapped_pages(path)
    assert _resident(path) == SIZE // 1024
    mapping.close()

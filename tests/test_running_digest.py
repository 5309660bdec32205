"""A digest that follows a file which is being written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edgellm.running_digest import CHUNK_BYTES, RunningDigest


def test_it_is_that_of_the_bytes_that_were_declared_final(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK_BYTES + 17)
    with (tmp_path / "f").open("w+b", buffering=0) as file:
        digest = RunningDigest(file.fileno())
        written = 0
        for end in (1, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES, len(content) - 5):
            file.write(content[written : end + 5])  # five bytes ahead, which may still change
            written = end + 5
            digest.advance(end)
        assert digest.finish() == hashlib.sha256(content[:-5]).hexdigest()
        digest.abandon()


def test_of_nothing(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        assert RunningDigest(file.fileno()).finish() == hashlib.sha256(b"").hexdigest()


def test_a_file_that_ends_before_its_bytes_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        digest = RunningDigest(file.fileno())
        digest.advance(1)
        with pytest.raises(OSError, match="became shorter"):
            digest.finish()


def test_an_abandoned_one_ends(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        file.truncate(1 << 40)
        digest = RunningDigest(file.fileno())
        digest.advance(1 << 40)
        digest.abandon()

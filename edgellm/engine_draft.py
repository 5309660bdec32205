"""Where an engine is written before it is one: a directory beside its place, marked as in use while it is.

The mark is flock(2) on the directory itself, which the kernel takes away with the process, however it ends: a
draft that can be locked belongs to nobody any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["new_draft", "remove_abandoned_drafts"]


@contextmanager
def new_draft(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, of the same file system. What is in it at the end is removed.

    Raises:
        OSError: it cannot be made.
    """
    draft, descriptor = _claim(path)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned_drafts(path: Path) -> list[Path]:
    """Remove the drafts of `path` whose process was killed; gives those removed.

    Those in use, and those that another user owns, stay.
    """
    # mkdtemp's names: another engine's draft must not look like one of this.
    pattern = re.compile(re.escape(_prefix(path)) + r"[a-z0-9_]{8}")
    try:
        found = [entry for entry in sorted(path.parent.iterdir()) if pattern.fullmatch(entry.name)]
    except OSError:
        return []
    return [draft for draft in found if _remove(draft)]


def _prefix(path: Path) -> str:
    return f".{path.name}.building-"


def _claim(path: Path) -> tuple[Path, int]:
    """Make a draft and lock it. One that another build took for abandoned in between is made again."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        try:
            descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # NFS locks no directories; there nothing is removed either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return draft, descriptor
        os.close(descriptor)


def _remove(draft: Path) -> bool:
    try:
        descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(draft)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True

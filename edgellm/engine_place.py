"""How an engine takes its place: written beside it, brought to the disk, then moved there in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edgellm.engine_config import CONFIG
from edgellm.engine_draft import new_draft
from edgellm.enginedir import is_engine
from edgellm.errors import BuildError

__all__ = ["new_engine", "real_path"]

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextmanager
def new_engine(path: Path) -> Iterator[Path]:
    """Make an engine directory: gives a temporary one beside `path`, which becomes `path` at the end.

    Inside, write the files, then call `seal`. If anything is raised, nothing is left behind.

    Raises:
        BuildError: `path` exists and is no engine directory or is not UTF-8, or writing failed (a full disk,
            no permission).
    """
    path = real_path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise BuildError(
            f"{path} is not UTF-8, and no library would load an engine there; name another place with -o"
        ) from error
    made = False
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_draft(path) as draft:
            made = True
            draft.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the engine from the daemon's user
            yield draft
            if not (draft / CONFIG).exists():
                raise AssertionError("new_engine: seal was not called")
            _sync(draft)
            _move_into_place(draft, path)
    except OSError as error:
        if not made:
            raise BuildError(f"cannot create {path}: {error.strerror} ({error.filename})") from error
        hint = "; free some space and build again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise BuildError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def real_path(path: Path) -> Path:
    """An absolute path without symbolic links; where these go round in circles, with them."""
    return Path(os.path.realpath(path))  # Path.resolve would raise RuntimeError, until Python 3.13


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise BuildError(f"{path} exists and is not a directory; name another one with -o")
    if any(path.iterdir()) and not is_engine(path):
        raise BuildError(
            f"{path} exists and is not an engine directory; it is left as it is, name another one"
        )


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    """Bring a directory and its files to the disk, so that after the rename a power cut cannot empty them."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step, renameat2(2) with RENAME_EXCHANGE; in three where it is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if hasattr(libc, "renameat2") and libc.renameat2(*names, _RENAME_EXCHANGE) == 0:
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{other.name}.old-", dir=other.parent))
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _move_into_place(draft: Path, path: Path) -> None:
    """Rename; an engine that is there already changes places with the draft, which is then removed.

    At no moment is there no engine, so a power cut cannot lose both. Files that a running daemon has open
    live on until it closes them.
    """
    if path.exists():
        _exchange(draft, path)
    else:
        draft.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

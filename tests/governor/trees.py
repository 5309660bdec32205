"""Boards as files: expands tests/fixtures/*.tree below a directory.

A tree is text, because a board has hundreds of tiny files:

    # a comment
    [sys/class/thermal/thermal_zone0]   paths that follow are below this; [] is the root
    type: CPU-therm                     a file; \\n and \\0 are escapes, a newline ends it unless \\0 does
    temp !io-error                      a file that exists and cannot be read
    cdev0 -> ../cooling_device3         a symbolic link
    empty/                              an empty directory
"""

from __future__ import annotations

import shutil
from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "fixtures"
TREES = ("agx-orin-r35", "orin-nx-r36", "orin-nano-r39", "drive-os-6", "pc")


def expand(name: str, root: Path) -> Path:
    """Lay out fixtures/NAME.tree below `root`, which is made, and return it."""
    root.mkdir(parents=True, exist_ok=True)
    section = root
    for number, line in enumerate((FIXTURES / f"{name}.tree").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            section = root / line.strip("[]")
            continue
        _entry(section, line, where=f"{name}.tree:{number}")
    return root


def put(root: Path, path: str, text: str) -> None:
    """Give a file a new value."""
    _clear(root / path)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n", encoding="utf-8")


def break_read(root: Path, path: str) -> None:
    """Make a file exist and not be readable: a directory opens, and reading it fails, for root too."""
    _clear(root / path)
    (root / path).mkdir(parents=True)


def remove(root: Path, path: str) -> None:
    """Take a file or directory away, as the kernel does when a driver is unbound."""
    _clear(root / path)


def _entry(section: Path, line: str, where: str) -> None:
    if line.endswith(" !io-error"):
        break_read(section, line.removesuffix(" !io-error"))
    elif " -> " in line:
        name, target = line.split(" -> ")
        (section / name).parent.mkdir(parents=True, exist_ok=True)
        (section / name).symlink_to(target)
    elif line.endswith("/"):
        (section / line).mkdir(parents=True)
    elif ": " in line or line.endswith(":"):
        name, _, text = line.partition(":")
        content = text.strip().replace("\\n", "\n").replace("\\0", "\0")
        path = section / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if content.endswith("\0") else content + "\n", encoding="utf-8")
    else:
        raise ValueError(f"{where}: {line!r} is neither a file, a link nor a directory")


def _clear(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)

"""Which board, and which release of its software."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host
from edgellm.governor.platform import Family

RELEASE_KEY = "PRETTY_NAME="


def check_board(host: Host) -> Iterator[Finding]:
    """The board and its release; a Tegra that is not an Orin was never thought of."""
    board = host.board
    if not host.running and board.family in (Family.GENERIC, Family.OTHER_TEGRA):
        yield Finding.not_asked("board", "the device tree of a running system says which one it is")
    elif board.family is Family.GENERIC:
        yield Finding("board", Level.OK, board.name, "no NVIDIA SoC: the CPU executor serves")
    elif board.family is Family.OTHER_TEGRA:
        yield Finding(
            "board",
            Level.WARN,
            board.name,
            "edgellm knows Jetson Orin and DRIVE AGX Orin only",
            "set [sensors] and [governor] by hand, and see what the thermal line below says",
        )
    else:
        yield Finding("board", Level.OK, board.name, f"configs/{board.family.value}.toml is made for it")
    yield _software(host)
    yield _python(host)


def _software(host: Host) -> Finding:
    board = host.board
    if board.software != "unknown":
        return Finding("release", Level.OK, board.software)
    lines = (host.text("etc/os-release") or "").splitlines()
    name = next(
        (line[len(RELEASE_KEY) :].strip('"') for line in lines if line.startswith(RELEASE_KEY)), "unknown"
    )
    if not host.tegra:
        return Finding("release", Level.OK, name)
    return Finding(
        "release",
        Level.WARN,
        name,
        "/etc/nv_tegra_release or DRIVE OS's version file cannot be read: GPU engines are bound to"
        " the release",
        "install nvidia-l4t-core, or mount the host's /etc into this container",
    )


def _python(host: Host) -> Finding:
    if not host.live:
        return Finding.not_asked("python", "another system's root: its Python cannot be asked")
    return Finding("python", Level.OK, f"{platform.python_version()} on {platform.machine()}", sys.executable)

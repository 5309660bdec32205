"""The GPU's device nodes, and whether the service's user may open them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host

USER = "edgellm"
GROUPS = ("video", "render")
TEGRA_NODES = ("dev/nvmap", "dev/nvgpu/igpu0/*", "dev/nvhost-*gpu", "dev/nvhost-ctrl", "dev/host1x-fence")
OTHER_NODES = ("dev/nvidia0", "dev/nvidiactl", "dev/nvidia-uvm")
RENDER_NODES = ("dev/dri/renderD*",)


def check_devices(host: Host) -> Iterator[Finding]:
    """Nodes by what is there; groups by /etc/group, if the service's user exists."""
    nodes = [
        node
        for pattern in (*TEGRA_NODES, *OTHER_NODES, *RENDER_NODES)
        for node in host.glob(pattern)
        if _is_node(node)
    ]
    gpu = [node for node in nodes if not node.name.startswith("renderD")]
    if gpu:
        yield Finding("devices", Level.OK, f"{len(nodes)} GPU nodes", _names(host, nodes))
    elif host.tegra and host.live:
        yield Finding(
            "devices",
            Level.WARN,
            "no GPU node (/dev/nvmap, /dev/nvgpu/igpu0)",
            "the GPU cannot be used; the cpu executor serves",
            "load nvgpu and nvmap; containers need the NVIDIA runtime, units gpu-devices.conf",
        )
    elif not host.running:
        yield Finding.not_asked("devices")
    else:
        yield Finding("devices", Level.OK, "no GPU node", "the cpu executor needs none")
    yield from _groups(host, gpu)


def _groups(host: Host, nodes: list[Path]) -> Iterator[Finding]:
    members = _group_members(host)
    users = {line.split(":")[0] for line in (host.text("etc/passwd") or "").splitlines()}
    if USER not in users:
        yield Finding("groups", Level.OK, f"no user {USER} here", "tools/install.sh makes it for the service")
        return
    missing = [name for name in GROUPS if USER not in members.get(name, ())]
    if missing and nodes:
        yield Finding(
            "groups",
            Level.WARN,
            f"{USER} is not in {' and '.join(missing)}",
            "the service may not open the GPU's nodes",
            f"usermod --append --groups {','.join(missing)} {USER}, then restart the service",
        )
        return
    clients = sorted(set(members.get(USER, ())) - {USER})
    yield Finding(
        "groups",
        Level.OK,
        f"{USER} is in {', '.join(name for name in GROUPS if name not in missing) or 'no GPU group'}",
        f"may connect to it: {', '.join(clients)}"
        if clients
        else f"nobody else may connect yet: usermod --append --groups {USER} APP",
    )


def _group_members(host: Host) -> dict[str, list[str]]:
    rows = [line.split(":") for line in (host.text("etc/group") or "").splitlines()]
    return {row[0]: row[3].split(",") if row[3] else [] for row in rows if len(row) == 4}


def _names(host: Host, nodes: list[Path]) -> str:
    names = ["/" + str(node.relative_to(host.root)) for node in nodes]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _is_node(path: Path) -> bool:
    try:
        # A root that is not live may hold stand-ins: any file counts there.
        mode = os.stat(path).st_mode  # noqa: PTH116
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISREG(mode)

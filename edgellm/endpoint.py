"""Where the daemon listens and its clients look, and what keeps a client out. Standard library only."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

ENVIRONMENT = "EDGELLM_ENDPOINT"
MAX_IPC_PATH_BYTES = 107
"""sun_path of sockaddr_un holds 108 bytes with its closing zero (unix(7))."""

SYSTEM = "ipc:///run/edgellm/edgellm.sock"
"""The system service's; also what root's daemon listens at."""


def default_endpoint() -> str:
    """Where a daemon listens when nothing names an endpoint.

    `$EDGELLM_ENDPOINT` if set; else /run/edgellm/edgellm.sock for root, and edgellm/edgellm.sock under
    `$XDG_RUNTIME_DIR` (or /run/user/UID, which systemd-logind makes) for anyone else.
    """
    if named := os.environ.get(ENVIRONMENT):
        return named
    if os.geteuid() == 0:
        return SYSTEM
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"ipc://{runtime}/edgellm/edgellm.sock"


def client_endpoints() -> list[str]:
    """Where a client looks, in order, when nothing names an endpoint: its user's daemon, then the service."""
    own = default_endpoint()
    return [own] if os.environ.get(ENVIRONMENT) or own == SYSTEM else [own, SYSTEM]


def events_endpoint(endpoint: str) -> str:
    """Where the daemon at `endpoint` publishes, unless configured otherwise.

    `.pub` in place of `.sock`; for tcp the next port.
    """
    host, _, port = endpoint.rpartition(":")
    if endpoint.startswith("tcp://") and port.isdecimal():
        return f"{host}:{int(port) + 1}"
    return endpoint.removesuffix(".sock") + ".pub"


def is_absent(endpoint: str) -> bool:
    """Whether an ipc endpoint has no socket file."""
    try:
        return (path := _path(endpoint)) is not None and not path.exists()
    except PermissionError:
        return False


def barrier(endpoint: str) -> str | None:
    """Why this process may not connect to an ipc endpoint, and what to do; None if nothing forbids it."""
    path = _path(endpoint)
    if path is None:
        return None
    for place in (*reversed(path.parents), path):
        try:
            entry = place.stat()
        except OSError:
            return None  # there is nothing, or not yet
        needed = os.W_OK if place == path else os.X_OK
        if not os.access(place, needed, effective_ids=True):
            mode, group = stat.S_IMODE(entry.st_mode), _group_name(entry.st_gid)
            if entry.st_gid and mode >> 3 & needed:  # nobody is to join root's own group
                return (
                    f"permission denied: {place} is for group {group} only; join it"
                    f" (sudo usermod -aG {group} USER) and log in again"
                )
            return (
                f"permission denied: {place} is closed to uid {os.geteuid()} (group {group}, mode {mode:04o})"
            )
    return None


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _path(endpoint: str) -> Path | None:
    scheme, _, rest = endpoint.partition("://")
    return Path(rest).absolute() if scheme == "ipc" and rest and not rest.startswith("@") else None

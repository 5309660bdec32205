"""Where the daemon listens and its clients look: one rule for both. Standard library only."""

from __future__ import annotations

import os

ENVIRONMENT = "EDGELLM_ENDPOINT"
MAX_IPC_PATH_BYTES = 107
"""sun_path of sockaddr_un holds 108 bytes with its closing zero (unix(7))."""


def default_endpoint() -> str:
    """The endpoint in use when nothing names one.

    `$EDGELLM_ENDPOINT` if set; else /run/edgellm/edgellm.sock for root, and edgellm/edgellm.sock under
    `$XDG_RUNTIME_DIR` (or /run/user/UID, which systemd-logind makes) for anyone else.
    """
    if named := os.environ.get(ENVIRONMENT):
        return named
    if os.geteuid() == 0:
        return "ipc:///run/edgellm/edgellm.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"ipc://{runtime}/edgellm/edgellm.sock"


def events_endpoint(endpoint: str) -> str:
    """Where the daemon at `endpoint` publishes, unless configured otherwise: `.pub` in place of `.sock`."""
    return endpoint.removesuffix(".sock") + ".pub"

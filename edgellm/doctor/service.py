"""The socket's directory, and the unit as systemd sees it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host
from edgellm.endpoint import default_endpoint

UNIT = "edgellm.service"
UNIT_DIRECTORIES = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
OLDEST_SYSTEMD = 245
PROPERTIES = ("LoadState", "ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts", "StatusText")
DEFAULT_ENDPOINT = "ipc:///run/edgellm/edgellm.sock"
HEALTH_TIMEOUT_S = 2.0


def check_service(host: Host) -> Iterator[Finding]:
    """Where clients would connect, and how the service does."""
    yield _socket_directory(host) if host.running else Finding.not_asked("socket")
    if host.live:
        yield _daemon(host)
    yield _systemd(host)
    yield _unit(host)


def _socket_directory(host: Host) -> Finding:
    endpoint = host.config.server.endpoint or DEFAULT_ENDPOINT
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc":
        return Finding("socket", Level.OK, endpoint, "not a file")
    directory = host.path(str(Path(path).parent))
    shown = f"{Path(path).parent}"
    try:
        status = directory.stat()
    except FileNotFoundError:
        return Finding("socket", Level.OK, f"{shown} does not exist", "the unit makes it when it starts")
    except OSError as error:
        return Finding(
            "socket",
            Level.WARN,
            f"{shown}: {error.strerror}",
            "this user is not one of the service's clients",
            "usermod --append --groups edgellm USER, or run the doctor as root",
        )
    mode = stat.S_IMODE(status.st_mode)
    value = f"{shown} has mode {mode:04o}"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return Finding(
            "socket",
            Level.FAIL,
            value,
            "anyone can put a socket of his own in its place",
            f"chmod 0750 {shown}, or let the unit make it (RuntimeDirectory)",
        )
    return Finding("socket", Level.OK, value)


def _daemon(host: Host) -> Finding:
    """Whether one answers, started by systemd or by hand: at the service's endpoint or at this user's own."""
    endpoints = dict.fromkeys((host.config.server.endpoint or DEFAULT_ENDPOINT, default_endpoint()))
    silent = "none answers"
    for endpoint in endpoints:
        scheme, _, name = endpoint.partition("://")
        if scheme != "ipc":
            continue
        path = host.path(name)
        try:
            path.stat()
        except PermissionError:
            silent = f"{endpoint}: permission denied"
            continue
        except OSError:
            continue
        if not os.access(path, os.W_OK):
            silent = f"{endpoint}: permission denied"
            continue
        health = _health(f"ipc://{path}")
        if health is not None:
            return Finding("daemon", Level.OK, f"{health} at {endpoint}")
    if "denied" in silent:
        return Finding(
            "daemon",
            Level.WARN,
            silent,
            "this user is not one of the service's clients",
            "usermod --append --groups edgellm USER, and log in again",
        )
    return Finding("daemon", Level.OK, silent, f"looked at {', '.join(endpoints)}")


def _health(endpoint: str) -> str | None:
    """`ready`, `loading`, `draining`, or None: nobody answers."""
    from edgellm.client import Client
    from edgellm.errors import ClientError, RequestError

    try:
        with Client(endpoint, timeout=HEALTH_TIMEOUT_S, connect_timeout=HEALTH_TIMEOUT_S) as client:
            return client.health().status
    except (ClientError, RequestError):
        return None


def _systemd(host: Host) -> Finding:
    output = host.run(["systemctl", "--version"]) if host.run else None
    if output is None:
        why = "no systemctl here: edgellm serve runs by hand" if host.live else "another system's root"
        return Finding.not_asked("systemd", why)
    found = re.match(r"systemd (\d+)", output)
    version = int(found[1]) if found else 0
    if version < OLDEST_SYSTEMD:
        return Finding(
            "systemd",
            Level.WARN,
            f"version {version or 'unknown'}",
            f"the unit is written for {OLDEST_SYSTEMD} and later: older ones ignore parts of it",
            "systemd-analyze verify edgellm.service says which",
        )
    return Finding("systemd", Level.OK, f"version {version}")


def _unit(host: Host) -> Finding:
    if not any(host.exists(f"{directory}/{UNIT}") for directory in UNIT_DIRECTORIES):
        return Finding("unit", Level.OK, f"{UNIT} is not installed", "tools/install.sh installs it")
    if host.run is None:
        return Finding(
            "unit", Level.OK, f"{UNIT} is installed", "another system's root: its state is not asked"
        )
    output = host.run(["systemctl", "show", UNIT, *(f"--property={name}" for name in PROPERTIES)])
    state = dict(line.split("=", 1) for line in (output or "").splitlines() if "=" in line)
    if not state.get("ActiveState") or state.get("LoadState") != "loaded":
        return Finding(
            "unit", Level.OK, f"{UNIT} is installed", "systemd does not run here, or has not read it yet"
        )
    return _unit_state(state)


def _unit_state(state: dict[str, str]) -> Finding:
    active = state["ActiveState"]
    value = f"{active} ({state.get('SubState', '?')})"
    restarts = state.get("NRestarts", "0")
    if active == "failed":
        code = state.get("ExecMainStatus", "?")
        return Finding(
            "unit",
            Level.FAIL,
            f"failed: {state.get('Result', '?')}, exit code {code}",
            "docs/operations.md says what the codes mean",
            f"journalctl --unit {UNIT} --lines 20",
        )
    if state.get("SubState") == "auto-restart":
        return Finding(
            "unit",
            Level.FAIL,
            f"{value}: {state.get('Result', '?')}, exit code {state.get('ExecMainStatus', '?')}",
            "it failed and is started again, and again",
            f"journalctl --unit {UNIT} --lines 20",
        )
    if restarts not in {"", "0"}:
        return Finding(
            "unit",
            Level.WARN,
            f"{value}, restarted {restarts} times",
            "it failed before",
            f"journalctl --unit {UNIT} --priority warning",
        )
    return Finding("unit", Level.OK, value, state.get("StatusText", ""))

"""The daemon's side of systemd's notify protocol (sd_notify(3)) and of its watchdog.

A message is newline-separated `NAME=VALUE` lines in one datagram to the socket that NOTIFY_SOCKET names:
READY, STATUS, RELOADING with MONOTONIC_USEC, STOPPING, EXTEND_TIMEOUT_USEC, WATCHDOG. systemd-python sends it
where it is installed (Debian's python3-systemd), otherwise this module does; the lines are the same.

Nothing here raises at run time, and nothing happens where NOTIFY_SOCKET is not set: a service manager that
does not listen must never be what stops the daemon.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0
"""A service manager that takes no message for so long (its queue is full) loses this one."""

PETS_PER_TIMEOUT = 2
"""sd_watchdog_enabled(3) advises to ping at half of the timeout."""


class Daemon(Protocol):
    """What is used of systemd-python's `systemd.daemon`."""

    def notify(self, status: str) -> bool:
        """Send a message to $NOTIFY_SOCKET; whether there was one."""


def systemd_python(module: str) -> Any | None:
    """`systemd.MODULE` of systemd-python, or None where it is not installed."""
    try:
        return importlib.import_module(f"systemd.{module}")
    except ImportError:
        return None


class Notifier:
    """Tells the service manager how the service is; from any thread, never failing.

    Args:
        environment: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are read, once.
        daemon: systemd-python's `systemd.daemon`, or None for the plain protocol; by default, what is there.

    Attributes:
        enabled: whether a service manager listens.
        watchdog_s: seconds without `pet()` after which the service is killed, or None without a watchdog.
    """

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        *,
        daemon: Daemon | str | None = "auto",
    ) -> None:
        self._daemon = systemd_python("daemon") if isinstance(daemon, str) else daemon
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.enabled = self._address is not None
        self.watchdog_s = _watchdog_s(environment) if self.enabled else None
        self._complained = False

    def ready(self, status: str | None = None) -> None:
        """Start-up, or a reload, is finished; the status comes in the same message."""
        self._send("READY=1", *_status(status))

    def status(self, text: str) -> None:
        """The one line that `systemctl status` shows."""
        self._send(*_status(text))

    def extend_timeout(self, seconds: float, status: str | None = None) -> None:
        """Start-up or shut-down may take `seconds` more from now; say so again before they are over."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", *_status(status))

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it."""
        # MONOTONIC_USEC tells this reload from an earlier one; Type=notify-reload (systemd 253) needs it.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str | None = None) -> None:
        """The service drains, and then exits."""
        self._send("STOPPING=1", *_status(status))

    def pet(self) -> None:
        """The service is alive: start the watchdog's time anew."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        message = "\n".join(lines)
        try:
            if self._daemon is not None:
                self._daemon.notify(message)
            else:
                self._send_plain(message.encode())
        except OSError as error:
            # Once: a message that cannot be sent twice a second must not fill the log.
            if not self._complained:
                self._complained = True
                log.warning("systemd's notify socket takes no message: %s", error)

    def _send_plain(self, message: bytes) -> None:
        assert self._address is not None
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SEND_TIMEOUT_S)
            sender.connect(self._address)
            sender.send(message)


class Watchdog:
    """Pets systemd's watchdog, but only if every loop of the daemon went on since the last time.

    The owner calls `look` in its own loop, at least every `interval_s`; a loop that hangs stops the petting,
    and systemd kills and restarts the service within WatchdogSec. The beats must advance also when there is
    nothing to do, and in less than half the watchdog's time when there is.

    Args:
        notifier: whose watchdog it is.
        beats: the loops' counters by name, read at each look; a counter that changed is alive.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        notifier: Notifier,
        beats: Mapping[str, Callable[[], int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifier = notifier
        self._beats = beats
        self._clock = clock
        self._seen: dict[str, int] = {}
        self._petted: float | None = None
        self._mourned: frozenset[str] = frozenset()

    @property
    def interval_s(self) -> float | None:
        """Seconds between looks at most, or None where no watchdog is armed."""
        timeout = self._notifier.watchdog_s
        return None if timeout is None else timeout / PETS_PER_TIMEOUT

    def look(self) -> Sequence[str]:
        """Pet if every beat advanced since the last pet; gives the names of the loops that did not.

        Loops that are still silent after `interval_s` are logged, once: after the kill it is too late to.
        """
        beats = {name: read() for name, read in self._beats.items()}
        silent = [name for name, beat in beats.items() if self._seen.get(name) == beat]
        now = self._clock()
        if silent:
            self._mourn(silent, now)
            return silent
        self._seen = beats
        self._petted = now
        self._mourned = frozenset()
        self._notifier.pet()
        return ()

    def _mourn(self, silent: Sequence[str], now: float) -> None:
        interval = self.interval_s
        if interval is None or self._petted is None or now - self._petted < interval:
            return
        if fresh := frozenset(silent) - self._mourned:
            self._mourned |= fresh
            log.error(
                "no progress for %.1f s in: %s; systemd's watchdog kills the service at %.1f s",
                now - self._petted,
                ", ".join(sorted(fresh)),
                self._notifier.watchdog_s,
            )


def _address(text: str) -> str | bytes | None:
    """The address to connect to: a path, or an abstract name with a zero byte for its `@`."""
    if text.startswith("/"):
        return text
    if text.startswith("@") and len(text) > 1:
        return b"\0" + os.fsencode(text[1:])
    # sd_notify knows vsock: too, which only virtual machines' managers use; anything else is no address.
    return None


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """WATCHDOG_USEC in seconds, if it is meant for this process (WATCHDOG_PID)."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = environment.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isdecimal() and int(usec) > 0 else None


def _status(text: str | None) -> tuple[str, ...]:
    # A line break would start the next assignment of the message.
    return () if text is None else ("STATUS=" + " ".join(text.splitlines()),)

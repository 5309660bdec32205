"""Plays systemd: a notify socket, and a child started the way systemd starts a service."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Message:
    """One datagram: its assignments, the sender's pid, and when it came."""

    fields: dict[str, str]
    pid: int
    at: float


@dataclass
class NotifySocket:
    """Receives what a service tells its manager, with the sender's credentials as systemd does."""

    address: str
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def __enter__(self) -> NotifySocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An empty datagram from ourselves wakes the thread up: closing the socket would not.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.connect("\0" + self.address[1:] if self.address.startswith("@") else self.address)
            waker.send(b"\0END")
        self._thread.join(5)
        self._socket.close()

    def wait(self, what: Callable[[Message], bool], *, after: float = 0.0, timeout: float = 20.0) -> Message:
        """The first message of that kind that came after a monotonic time; AssertionError if none comes."""
        end = time.monotonic() + timeout
        with self._arrived:
            while True:
                for message in self.messages:
                    if message.at > after and what(message):
                        return message
                if not self._arrived.wait(end - time.monotonic()) and time.monotonic() >= end:
                    raise AssertionError(f"no such message in {timeout} s; there were {self.messages}")

    def wait_for(self, name: str, *, after: float = 0.0, timeout: float = 20.0) -> Message:
        """The first message after that time that assigns `name`."""
        return self.wait(lambda message: name in message.fields, after=after, timeout=timeout)

    def _receive(self) -> None:
        size = socket.CMSG_SPACE(12)
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(65536, size)
            if data == b"\0END":
                return
            pid = int.from_bytes(ancillary[0][2][:4], "little") if ancillary else 0
            lines = data.decode().splitlines()
            # partition, not split: a STATUS may hold an equals sign.
            fields = {name: value for name, _, value in (line.partition("=") for line in lines)}
            with self._arrived:
                self.messages.append(Message(fields, pid, time.monotonic()))
                self._arrived.notify_all()


@contextlib.contextmanager
def service(
    command: Sequence[str],
    notify: NotifySocket,
    *,
    watchdog_s: float | None = None,
    environment: dict[str, str] | None = None,
    log: Path,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a service as systemd does: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, stderr to a file."""
    environment = {**os.environ, **(environment or {}), "NOTIFY_SOCKET": notify.address}
    words = list(command)
    if watchdog_s is not None:
        environment["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
        # The shell's pid stays through exec, so it can be named before the service runs.
        words = ["/bin/sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh", *words]
    with log.open("wb") as stream:
        child = subprocess.Popen(words, env=environment, stderr=stream, stdout=stream, start_new_session=True)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait(10)

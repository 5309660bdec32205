"""A connection to one daemon: a DEALER, its monitor, and what is open on it."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Sequence
from typing import Any

import zmq

from edgellm.client.session import Reply, Session
from edgellm.curve import CurveKeys, secure_client
from edgellm.endpoint import barrier, client_endpoints, is_absent
from edgellm.errors import BadKeys, ConnectionLost, EdgellmError, RequestTimeout, Unreachable

LINGER_MS = 200
"""How long closing waits for a last cancel to leave."""

INTERRUPT_S = 0.25
"""Longest sleep in libzmq: a Ctrl-C that arrives on the way into it is only seen when it returns."""

WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
"""What a client wants to be told of its connection."""


class Link:
    """A DEALER to one endpoint, and what is open on it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        connect_timeout: float,
        curve: CurveKeys | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._connect_timeout = connect_timeout
        self._session = Session()
        self._greeted = False
        self._gone = False
        self._socket = dealer(context)
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        connect(self._socket, endpoint, self.close, curve)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def ask(self, fields: dict[str, Any], timeout: float) -> Reply:
        id_ = self.send(fields)
        try:
            reply = self.receive(id_, timeout)
        except BaseException as error:
            if not isinstance(error, EdgellmError):  # KeyboardInterrupt: nobody waits for the answer any more
                self.cancel(id_)
            raise
        self.forget(id_)
        return reply

    def send(self, fields: dict[str, Any]) -> int:
        end = time.monotonic() + self._connect_timeout
        while not self._greeted:
            self._monitor.poll(max(0, int(1000 * (end - time.monotonic()))))
            self._read()
            if self._gone:
                raise Unreachable(unknown_key(self.endpoint))
            if not self._greeted and time.monotonic() >= end:
                raise Unreachable(obstacle(self.endpoint))
        if not self._socket.poll(max(0, int(1000 * (end - time.monotonic()))), zmq.POLLOUT):
            raise Unreachable(f"the daemon at {self.endpoint} takes no requests")
        id_, payload = self._session.open(fields)
        self._socket.send(payload)
        return id_

    def receive(self, id_: int, timeout: float) -> Reply:
        """The next reply to a request; the request is over when this raises."""
        end = time.monotonic() + timeout
        while True:
            if (reply := self._session.take(id_)) is not None:
                return reply
            left = end - time.monotonic()
            if left <= 0:
                self.cancel(id_)
                raise RequestTimeout(f"{self.endpoint} did not answer within {timeout:g} s")
            self._poller.poll(int(1000 * min(left, INTERRUPT_S)) + 1)
            self._read()

    def cancel(self, id_: int) -> None:
        """Give a request up. Does not wait for the daemon to hear it."""
        if not self._socket.closed:
            with contextlib.suppress(zmq.Again):
                self._socket.send(self._session.cancellation(id_), zmq.NOBLOCK)

    def forget(self, id_: int) -> None:
        self._session.close(id_)

    def lost(self) -> bool:
        """Whether the daemon is gone, as far as is known without asking it."""
        if not self._gone:
            self._read()
        return self._gone

    def _read(self) -> None:
        # What happened is asked first and what arrived second: a daemon's last words come before its end.
        gone = False
        with contextlib.suppress(zmq.Again):
            while True:
                self._greeted, lost = heard(self._monitor.recv_multipart(zmq.NOBLOCK), self._greeted)
                gone = gone or lost
        with contextlib.suppress(zmq.Again):
            while True:
                self._session.feed(self._socket.recv(zmq.NOBLOCK))
        if gone and not self._gone:
            self._gone = True
            self._session.fail(ConnectionLost(f"the daemon at {self.endpoint} went away"))

    def close(self) -> None:
        gone, self._gone = self._gone, True
        self._session.fail(ConnectionLost(f"the connection to {self.endpoint} was closed"))
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._socket.close(linger=0 if gone else LINGER_MS)
            self._monitor.close(linger=0)


def listed(endpoints: str | Sequence[str] | None) -> list[str]:
    """The endpoints to try, in order."""
    if endpoints is None:
        return client_endpoints()
    return [endpoints] if isinstance(endpoints, str) else list(endpoints)


def obstacle(endpoint: str) -> str:
    """Why nobody is heard at an endpoint."""
    if endpoint.startswith("tcp://"):  # a daemon with another key cannot be told from silence
        return f"nothing serves at {endpoint} under the public key that this client has of the daemon"
    return barrier(endpoint) or f"nothing serves at {endpoint}"


def unknown_key(endpoint: str) -> str:
    """What to say when a daemon refuses this client's key."""
    return f"{endpoint} does not know this client's key: put its NAME.key into server.curve_clients there"


def worth_trying(endpoints: Sequence[str]) -> list[str]:
    """Those of several endpoints that lead somewhere. One that does not would cost a whole timeout."""
    return [each for each in endpoints if barrier(each) is None and not is_absent(each)]


def dealer(context: zmq.Context[Any]) -> Any:
    """A DEALER as both clients use it.

    IMMEDIATE stays off: with it libzmq loses what a daemon said last before it left.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
    return socket


def heard(event: list[bytes], greeted: bool) -> tuple[bool, bool]:
    """What a monitor's event means: whether the daemon has been met, and whether it is gone again.

    Who is refused for its key has lost it, too: libzmq does not try again.
    """
    (number,) = struct.unpack_from("=H", event[0])  # zmq_socket_monitor(3)
    if number == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return greeted, True
    return greeted or number == zmq.EVENT_HANDSHAKE_SUCCEEDED, greeted and number == zmq.EVENT_DISCONNECTED


def connect(socket: Any, endpoint: str, close: Any, curve: CurveKeys | None) -> None:
    """Connect, which only a malformed endpoint can fail, and over tcp missing keys.

    Raises:
        Unreachable: saying how an endpoint is written.
        BadKeys: saying what is wrong with them.
    """
    try:
        secure_client(socket, endpoint, curve)
        socket.connect(endpoint)
    except BadKeys:
        close()
        raise
    except zmq.ZMQError as error:
        close()
        raise Unreachable(
            f"{endpoint!r} is not an endpoint ({error.strerror}): use ipc://PATH or tcp://HOST:PORT"
        ) from None

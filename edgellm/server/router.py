"""The ROUTER socket: what arrives, from whom, who has vanished, and sends that never wait."""

from __future__ import annotations

import contextlib
import enum
import os
import socket as sockets
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

import zmq

from edgellm.errors import BadRequest
from edgellm.server.access import Peer
from edgellm.server.listener import Listener
from edgellm.server.zap import Authenticator
from edgellm.server_config import ServerConfig

SEND_HIGH_WATER = 64
"""Messages that may wait for one peer inside libzmq; beyond it a request's deltas merge here."""

HARD_LIMIT_BYTES = 16 << 20
"""A larger frame makes libzmq drop the connection before it is held in memory; smaller ones get an answer."""

HELD_BYTES = 32 << 20
"""Of one peer's messages libzmq holds no more than this for us; then the peer's own socket fills.

It counts whole messages: the frames of one that never ends are held without bound, and libzmq 4.3 has nothing
to set against that.
"""

LINGER_MS = 1_000
WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_EVENT = Struct("=HI")  # zmq_socket_monitor(3): event number, value
_UCRED = Struct("=iII")  # struct ucred, unix(7): pid, uid, gid
_KEPT_FRAMES = 2


class Sent(enum.Enum):
    """What became of a send."""

    YES = enum.auto()
    FULL = enum.auto()  # the peer does not read; try again later
    GONE = enum.auto()  # there is no such peer


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message: from which connection, and either its payload or what is wrong with its frames.

    Attributes:
        route: the connection's routing id.
        descriptor: the connection's file descriptor inside libzmq: what the monitor calls it.
        delimited: an empty frame came first (a REQ socket sends one), and the answer needs one too.
        payload: the body; with `problem` the beginning of the frame most likely to hold an id.
    """

    route: bytes
    descriptor: int
    peer: Peer
    delimited: bool
    payload: bytes
    problem: BadRequest | None = None


class Router:
    """The daemon's socket. Used by one thread at a time, and after `bind` only by the I/O thread.

    Args:
        authenticator: whom to let in; needed for tcp.

    Raises:
        ConfigError: in the constructor and in `bind`, naming `server.endpoint`.
        TemporaryShortage: in `bind`: no interface has the address yet.
    """

    def __init__(
        self, config: ServerConfig, endpoint: str, authenticator: Authenticator | None = None
    ) -> None:
        self._config = config
        self._listener = Listener(config, endpoint, "server.endpoint", authenticator)
        self._authenticator = authenticator
        self._alive: set[int] = set()
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect to."""
        return self._listener.endpoint

    def bind(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Take the lock, bind, and set the socket file's mode and group."""
        self.socket = socket = self._listener.open(context, zmq.ROUTER)
        # Sends to a full or vanished peer fail instead of vanishing. ROUTER_HANDOVER stays off: with it a
        # peer that claims another's routing id would be sent the other's answers.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER)
        hard_limit = max(HARD_LIMIT_BYTES, 2 * self._config.max_message_bytes)
        socket.setsockopt(zmq.MAXMSGSIZE, hard_limit)
        socket.setsockopt(zmq.RCVHWM, max(HELD_BYTES // hard_limit, 1))
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.monitor = socket.get_monitor_socket(WATCHED)
        self._listener.bind(socket)

    def receive(self) -> Incoming | None:
        """The next message, or None if there is none now. Never waits."""
        assert self.socket is not None
        try:
            head = self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        kept: list[zmq.Frame] = []
        count = size = 0
        last = head
        while last.more:
            last = self.socket.recv(zmq.NOBLOCK, copy=False)  # a message arrives whole: never Again here
            count += 1
            size += len(last)
            if len(kept) < _KEPT_FRAMES:
                kept.append(last)
        delimited = len(kept) > 1 and len(kept[0]) == 0
        body = kept[1] if delimited else kept[0] if kept else None
        problem = None
        if count > 1 + delimited:
            problem = BadRequest(
                f"a message is one frame, after an empty delimiter or none: this has {count}"
            )
        elif size > self._config.max_message_bytes:
            problem = BadRequest(
                f"the message is {size} bytes, and {self._config.max_message_bytes} are allowed"
                " (server.max_message_bytes)"
            )
        elif not size:
            problem = BadRequest("the message is empty: send a MessagePack map")
        return Incoming(
            route=head.bytes,
            descriptor=int(last.get(zmq.SRCFD)),
            peer=self._peer(last),
            delimited=delimited,
            payload=b"" if body is None else bytes(body.buffer[: self._config.max_message_bytes]),
            problem=problem,
        )

    def send(self, route: bytes, payload: bytes, delimited: bool) -> Sent:
        """Send if there is room. Never waits; a message goes whole or not at all."""
        assert self.socket is not None
        try:
            self.socket.send(route, zmq.NOBLOCK | zmq.SNDMORE)
            if delimited:
                self.socket.send(b"", zmq.NOBLOCK | zmq.SNDMORE)
            self.socket.send(payload, zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.YES

    def vanished(self) -> Iterator[int]:
        """Descriptors of connections that have ended since the last call, in order.

        libzmq announces an end before it closes the descriptor. So if this is drained after a message was
        received and before it is acted on, a descriptor that was reused in between is never mistaken.
        """
        assert self.monitor is not None
        while True:
            try:
                event, descriptor = _EVENT.unpack(self.monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                return
            if event == zmq.EVENT_ACCEPTED:
                self._alive.add(descriptor)
            elif event == zmq.EVENT_DISCONNECTED:
                self._alive.discard(descriptor)
                yield descriptor
            elif self._authenticator is not None:
                self._authenticator.refusals.note("its handshake failed: no key, or not this daemon's")

    def alive(self, descriptor: int) -> bool:
        """Whether the connection is still there, as of the last `vanished`."""
        return descriptor in self._alive

    def hang_up(self, descriptor: int, peer: Peer) -> None:
        """Shut a connection down: libzmq has no call for it, but its end is noticed like any other.

        `vanished` must have been drained just before. Should the descriptor belong to another process by now,
        nothing is done.
        """
        if not self.alive(descriptor):
            return
        with contextlib.suppress(OSError), sockets.socket(fileno=os.dup(descriptor)) as connection:
            if _is_of(connection, peer):
                connection.shutdown(sockets.SHUT_RDWR)

    def _peer(self, frame: zmq.Frame) -> Peer:
        # Over ipc a peer may send a User-Id of its own; over tcp an IPv6 address may look like a uid.
        address = _property(frame, "Peer-Address")
        if self._listener.over_tcp:
            return Peer(key=_property(frame, "User-Id"), host=address)
        return Peer.from_address(address)

    def close(self) -> None:
        """Close; the context's end then waits at most LINGER_MS for what is left to be sent. Idempotent."""
        if self.socket is not None:
            self.socket.disable_monitor()
            self.socket.close()
            self.socket = None
        if self.monitor is not None:
            self.monitor.close(linger=0)
            self.monitor = None

    def release(self) -> None:
        """Let go of the address, once the context has ended; idempotent."""
        self._listener.release()


def _is_of(connection: sockets.socket, peer: Peer) -> bool:
    if connection.family != sockets.AF_UNIX:
        return bool(connection.getpeername()[0] == peer.host)
    credentials = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _UCRED.size)
    return bool(_UCRED.unpack(credentials)[0] == peer.pid)


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""

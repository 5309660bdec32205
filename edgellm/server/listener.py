"""What the daemon's two sockets have in common: an address, who may connect, when a peer is lost."""

from __future__ import annotations

import zmq

from edgellm.server.address import Umask
from edgellm.server.tcp_address import TcpAddress, address_of, bind_error
from edgellm.server.zap import Authenticator
from edgellm.server_config import ServerConfig

HANDSHAKE_MS = 2_000
HEARTBEAT_MS = 10_000
HEARTBEAT_TIMEOUT_MS = 30_000


class Listener:
    """An endpoint to listen on.

    Args:
        knob: the configuration key that errors name.
        authenticator: whom to let in; needed for tcp.

    Attributes:
        over_tcp: whether peers come over tcp with CURVE keys, or over ipc as processes of this machine.

    Raises:
        ConfigError: in the constructor and in `open` and `bind`, naming the knob.
        TemporaryShortage: in `bind`: no interface has the address yet.
    """

    def __init__(
        self, config: ServerConfig, endpoint: str, knob: str, authenticator: Authenticator | None
    ) -> None:
        self._config = config
        self._address = address_of(endpoint, knob)
        self._authenticator = authenticator
        self.over_tcp = isinstance(self._address, TcpAddress)

    @property
    def endpoint(self) -> str:
        """Where peers connect to."""
        return self._address.endpoint

    def open(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        """Take the address's lock and make a socket for it, not bound yet."""
        self._address.acquire()
        socket = context.socket(kind)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if isinstance(self._address, TcpAddress):
            assert self._authenticator is not None
            self._authenticator.guard(socket)
            self._address.prepare(socket)
        return socket

    def bind(self, socket: zmq.Socket[bytes]) -> None:
        """Bind, and set the socket file's mode and group."""
        mode = int(self._config.socket_mode, 8)
        try:
            with Umask(mode):
                socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            raise bind_error(self._address, error) from None
        self._address.open_to(mode, self._config.socket_group)

    def release(self) -> None:
        """Let go of the address, once the context has ended; idempotent."""
        self._address.release()

"""The PUB socket: state changes and statistics, for whoever listens."""

from __future__ import annotations

import zmq

from edgellm.protocol import Published, encode
from edgellm.server.listener import Listener
from edgellm.server.zap import Authenticator
from edgellm.server_config import ServerConfig

HIGH_WATER = 16
"""Messages that may wait for one subscriber inside libzmq; one that does not read misses what comes after."""

MAX_TOPIC_BYTES = 256
"""A subscription that is longer makes libzmq drop the connection."""

MAX_CURVE_BYTES = 1024
"""The same over tcp, where CURVE's handshake and its envelopes need more."""


class Publisher:
    """Sends to all subscribers and waits for none. After `bind` used by the I/O thread alone.

    Args:
        authenticator: whom to let in; needed for tcp.

    Raises:
        ConfigError: in the constructor and in `bind`, naming `server.events_endpoint`.
        TemporaryShortage: in `bind`: no interface has the address yet.
    """

    def __init__(
        self, config: ServerConfig, endpoint: str, authenticator: Authenticator | None = None
    ) -> None:
        # The file may be configured to lie anywhere, so it has a lock of its own.
        self._listener = Listener(config, endpoint, "server.events_endpoint", authenticator)
        self._socket: zmq.Socket[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where subscribers connect to."""
        return self._listener.endpoint

    def bind(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Take the lock, bind, and set the socket file's mode and group."""
        self._socket = socket = self._listener.open(context, zmq.PUB)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_CURVE_BYTES if self._listener.over_tcp else MAX_TOPIC_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        self._listener.bind(socket)

    def publish(self, message: Published) -> None:
        """Send to those who subscribed to the message's topic, which is its `ev`, and have room."""
        if self._socket is not None:
            topic = str(message.__struct_config__.tag).encode()
            self._socket.send_multipart([topic, encode(message)], zmq.NOBLOCK)

    def close(self) -> None:
        """Close; idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def release(self) -> None:
        """Let go of the address, once the context has ended; idempotent."""
        self._listener.release()

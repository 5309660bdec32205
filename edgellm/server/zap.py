"""Who may connect over tcp: CURVE keys, and the ZAP handler (rfc.zeromq.org/spec/27) that knows them.

libzmq does the cryptography and asks here, over an inproc socket, about each client that has proved to own
the secret half of its key. The answer names the client; that name, its User-Id, is who it is to the rules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import zmq
from zmq.utils import z85

from edgellm.curve import KeyPair, read_directory, read_pair
from edgellm.errors import BadKeys, ConfigError
from edgellm.server_config import ServerConfig

log = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"edgellm"
QUIET_S = 60.0
"""Refusals are logged once in so long: whoever can reach the port must not be able to fill the journal."""

_REQUEST_FRAMES = 7  # version, request id, domain, address, routing id, mechanism, client key


class Refusals:
    """Counts the clients that were turned away, and says so now and then.

    Attributes:
        count: since the start.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.count = 0
        self._clock = clock
        self._said: float | None = None

    def note(self, why: str) -> None:
        """One more."""
        self.count += 1
        now = self._clock()
        if self._said is None or now - self._said >= QUIET_S:
            self._said = now
            log.warning("tcp: a client was refused: %s; %d refused so far", why, self.count)


class Authenticator:
    """The daemon's keys, its clients', and the socket over which libzmq asks; after `bind` the I/O thread's.

    Args:
        served: the tcp endpoint, after the key of the configuration that it is from.

    Raises:
        ConfigError: in the constructor, naming what is missing or which file is bad.
    """

    def __init__(
        self, config: ServerConfig, served: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if config.curve_secret_key is None or config.curve_clients is None:
            raise ConfigError(
                f"{served} can be reached from other machines and is served with CURVE keys only: set"
                " server.curve_secret_key to the daemon's own NAME.key_secret and server.curve_clients to a"
                " directory of its clients' NAME.key; `edgellm keygen` makes them"
            )
        self.refusals = Refusals(clock)
        self._directory = Path(config.curve_clients)
        self._rules = config.rules
        self._pair = _read_pair(Path(config.curve_secret_key))
        self._clients: Mapping[bytes, str] = self.read_clients()
        self.socket: zmq.Socket[bytes] | None = None

    def read_clients(self) -> dict[bytes, str]:
        """The clients' keys as they are now: raw key → name. May be called from any thread.

        Raises:
            ConfigError: the directory, or a file in it, is bad.
        """
        try:
            clients = read_directory(self._directory)
        except BadKeys as error:
            raise ConfigError(f"server.curve_clients: {error}") from None
        for index, rule in enumerate(self._rules):
            if rule.key is not None and rule.key not in clients.values():
                log.warning("server.rules[%d]: there is no %s.key in %s", index, rule.key, self._directory)
        return clients

    def allow(self, clients: Mapping[bytes, str]) -> None:
        """From now on these may connect. Who is connected stays."""
        self._clients = clients

    def bind(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Be there for libzmq's questions; before any socket that asks is bound."""
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Let only those in who have a key; before `socket` is bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._pair.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        # Should nobody answer the questions, libzmq would otherwise let everyone in.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def answer(self) -> None:
        """Answer what libzmq has asked meanwhile. Never waits."""
        assert self.socket is not None
        while True:
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            reply, refused = judge(request, self._clients)
            if refused:
                self.refusals.note(refused)
            self.socket.send_multipart(reply, zmq.NOBLOCK)

    def close(self) -> None:
        """Close; idempotent."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def judge(request: Sequence[bytes], clients: Mapping[bytes, str]) -> tuple[list[bytes], str]:
    """A ZAP request's reply, and why the client is refused, or "".

    Args:
        request: its frames.
        clients: raw public key → name.
    """
    request_id = request[1] if len(request) > 1 else b""
    name = None
    if len(request) != _REQUEST_FRAMES or request[0] != b"1.0":
        refused = "libzmq asks in a form that is not known"
    elif request[2] != DOMAIN or request[5] != b"CURVE":
        refused = "it comes without a key"
    elif (name := clients.get(request[6])) is None:
        key = z85.encode(request[6]).decode() if len(request[6]) == 32 else "malformed"
        host = request[3].decode("ascii", "replace")
        refused = f"{host} has the public key {key}, which is not in server.curve_clients"
    else:
        refused = ""
    status = (b"200", b"OK", name.encode()) if name is not None else (b"400", b"unknown key", b"")
    return [b"1.0", request_id, *status, b""], refused


def _read_pair(path: Path) -> KeyPair:
    try:
        return read_pair(path)
    except BadKeys as error:
        raise ConfigError(f"server.curve_secret_key: {error}") from None

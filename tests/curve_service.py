"""Servers over tcp on the loopback, with keys for whoever a test needs."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
from fake_engine import DIRECTORY, INFO, ByteTokenizer, FakeEngine, PlainTemplate, echo

from edgellm.curve import CurveKeys, write_new_pair
from edgellm.server import Server
from edgellm.server_config import ServerConfig


def free_ports() -> int:
    """A port of the loopback that nothing listens at, nor at the next."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class TcpService:
    """A server on 127.0.0.1 that knows the clients named, with an engine that echoes behind it.

    Attributes:
        keys: directory with all pairs: `server.key`, and NAME.key of each client.
        clients: the server's directory of clients.
    """

    def __init__(self, directory: Path, *names: str, config: ServerConfig | None = None) -> None:
        self.keys, self.clients = directory / "keys", directory / "clients"
        self.clients.mkdir()
        _, secret = write_new_pair(self.keys, "server")
        for name in names:
            self.admit(name)
        self.endpoint = f"tcp://127.0.0.1:{free_ports()}"
        self.server = Server(
            msgspec.structs.replace(
                config or ServerConfig(),
                endpoint=self.endpoint,
                curve_secret_key=str(secret),
                curve_clients=str(self.clients),
            )
        )
        self.engine = FakeEngine(self.server.deliver)
        self.engine.script = echo
        self.server.bind()
        self.server.start()
        self.server.attach(
            engine=self.engine,
            tokenizer=ByteTokenizer(),
            template=PlainTemplate(),
            directory=DIRECTORY,
            info=INFO,
        )

    def pair(self, name: str) -> CurveKeys:
        """A client's keys; made if there are none, which does not make the server know them."""
        if not (self.keys / f"{name}.key").exists():
            write_new_pair(self.keys, name)
        return CurveKeys(self.keys / f"{name}.key_secret", self.keys / "server.key")

    def admit(self, name: str) -> CurveKeys:
        """Put a client's key where the server looks when it reads them."""
        keys = self.pair(name)
        (self.clients / f"{name}.key").write_bytes((self.keys / f"{name}.key").read_bytes())
        return keys

    def __enter__(self) -> TcpService:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close(flush_s=0.2)

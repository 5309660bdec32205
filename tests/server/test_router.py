"""The socket without its server: what libzmq holds for a daemon that does not come to take it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import zmq
from fake_engine import Peer

from edgellm.server.router import HARD_LIMIT_BYTES, HELD_BYTES, Router
from edgellm.server_config import ServerConfig

PIECE = 4 << 20


def test_a_peer_makes_the_daemon_hold_no_more_than_so_much(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/edgellm.sock"
    router = Router(ServerConfig(endpoint=endpoint), endpoint)
    with zmq.Context() as context, contextlib.closing(router):
        router.bind(context)
        with Peer(endpoint, SNDHWM=1) as peer:
            sent = 0
            while sent < 4 * HELD_BYTES and peer.socket.poll(200, zmq.POLLOUT):
                peer.socket.send(b"x" * PIECE)
                sent += PIECE
            # Beside what waits: one message each at the peer, on its way, and being read.
            assert sent <= HELD_BYTES + 3 * HARD_LIMIT_BYTES
            received = 0
            while router.socket is not None and router.socket.poll(200):
                incoming = router.receive()
                assert incoming is not None
                assert incoming.problem is not None
                received += PIECE
            assert received == sent
    router.release()

"""Clients that vanish, and clients that do not read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import pytest
import zmq
from fake_engine import Peer, Service, echo

from edgellm.scheduler.request import Finish
from edgellm.server import connection as connection_module
from edgellm.server_config import ServerConfig


def eventually(condition: object, timeout: float = 5.0) -> None:
    end = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_has_its_requests_stopped(tmp_path: Path, stream: bool) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as other:
        peer = Peer(service.endpoint)
        peer.send(id=1, op="generate", prompt="x", stream=stream)
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        other.send(id=1, op="generate", prompt="x")
        service.engine.wait(lambda engine: len(engine.requests) == 2)
        vanished, kept = service.engine.requests
        peer.vanish()
        # Nothing more is generated: the disconnection alone must do it.
        service.engine.wait(lambda engine: engine.stopped == [(vanished.key, Finish.CANCELLED)])
        service.engine.end(kept.key, data=b"still here")
        assert other.receive()["text"] == "still here"
        assert other.ask(id=2, op="status")["clients"] == 1
        assert service.server.open_requests == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_has_its_requests_stopped(tmp_path: Path, end: signal.Signals) -> None:
    program = (
        "import zmq, msgpack, sys, time; s = zmq.Context().socket(zmq.REQ); s.connect(sys.argv[1]);"
        "s.send(msgpack.packb({'v': 1, 'id': 1, 'op': 'generate', 'prompt': 'x'})); time.sleep(60)"
    )
    with Service(tmp_path) as service:
        process = subprocess.Popen([sys.executable, "-c", program, service.endpoint])
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        process.send_signal(end)
        process.wait()
        service.engine.wait(lambda engine: engine.stopped == [(engine.requests[0].key, Finish.CANCELLED)])


def test_a_request_whose_client_is_gone_already_is_not_begun(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as other:
        for _ in range(30):
            context = zmq.Context()
            socket = context.socket(zmq.DEALER)
            socket.connect(service.endpoint)
            socket.send(msgpack.packb({"v": 1, "id": 1, "op": "generate", "prompt": "x"}))
            context.destroy(linger=1000)  # sent, and gone at once
        eventually(lambda: other.ask(id=1, op="status")["clients"] == 1)
        assert {request.key for request in service.engine.requests} <= {
            key for key, _ in service.engine.stopped
        }
        eventually(lambda: service.server.open_requests == 0)


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_all_in_the_end(tmp_path: Path) -> None:
    steps, per_step = 3000, b"0123456789"
    with Service(tmp_path) as service, Peer(service.endpoint) as other:
        slow = Peer(service.endpoint, RCVHWM=1)
        slow.send(id="slow", op="generate", prompt="x", stream=True, max_tokens=200)
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        key = service.engine.requests[0].key
        for _ in range(steps):
            service.engine.say(key, per_step)
            assert other.ask(id=1, op="health")["status"] == "ready"
        service.engine.end(key)
        service.engine.script = echo
        assert other.ask(id=2, op="generate", prompt="quick")["text"] == "quick"
        replies = slow.until_end("slow")
        deltas, done = replies[1:-1], replies[-1]
        assert "".join(delta["text"] for delta in deltas) == done["text"] == (per_step * steps).decode()
        assert len(deltas) < steps  # what could not leave was merged
        slow.vanish()


def test_a_client_that_asks_on_without_reading_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "MAX_WAITING_BYTES", 1_000_000)
    with Service(tmp_path) as service, Peer(service.endpoint) as other:
        greedy = Peer(service.endpoint, RCVHWM=1)
        greedy.send(id="open", op="generate", prompt="x")
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        text = "y" * 50_000  # answers large enough to fill the socket's buffers soon
        for number in range(200):
            greedy.send(id=number, op="tokenize", text=text)
        service.engine.wait(lambda engine: len(engine.stopped) == 1)
        eventually(lambda: "does not read" in caplog.text)
        assert str(os.getpid()) in caplog.text
        assert other.silent()
        greedy.vanish()


def test_a_client_that_takes_nothing_for_too_long_is_dropped(tmp_path: Path) -> None:
    with Service(tmp_path, ServerConfig(send_timeout_s=0.1)) as service, Peer(service.endpoint) as other:
        slow = Peer(service.endpoint, RCVHWM=1)
        monitor = slow.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        slow.send(id="slow", op="generate", prompt="x", stream=True)
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        key = service.engine.requests[0].key
        while not service.engine.stopped:
            service.engine.say(key, b"z" * 1000)
            assert other.silent()
        assert service.engine.stopped == [(key, Finish.CANCELLED)]
        while not monitor.poll(0):  # libzmq notices the end when it has read what came before
            assert slow.socket.poll(5000), "the connection is still open"
            slow.socket.recv()
        monitor.close()
        slow.vanish()

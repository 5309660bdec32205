"""Bind, load, serve, drain, close: what a client hears in each, and what keeps a daemon from starting."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fake_engine import Peer, Service, echo

from edgellm.errors import ConfigError
from edgellm.scheduler.request import Finish
from edgellm.server import Server
from edgellm.server_config import ServerConfig

USER = [{"role": "user", "content": "hi"}]


@contextlib.contextmanager
def bound(endpoint: str, config: ServerConfig = ServerConfig()) -> Iterator[Server]:  # noqa: B008
    server = Server(msgspec.structs.replace(config, endpoint=endpoint))
    try:
        server.bind()
        yield server
    finally:
        server.close()


def test_while_loading_health_answers_and_requests_are_told_to_come_back(tmp_path: Path) -> None:
    with Service(tmp_path, ready=False) as service, Peer(service.endpoint) as peer:
        service.server.set_phase("executor")
        service.server.set_progress("prepack", 0.5)
        health = peer.ask(id=1, op="health")
        assert (health["status"], health["phase"], health["progress"]) == ("loading", "prepack", 0.5)
        for fields in (
            {"op": "chat", "messages": USER},
            {"op": "generate", "prompt": "x"},
            {"op": "tokenize", "text": "x"},
            {"op": "model"},
        ):
            reply = peer.ask(id=2, **fields)
            assert (reply["code"], reply["retry_after_ms"]) == ("loading", 500)
        assert peer.ask(id=3, op="status")["status"] == "loading"
        service.engine.script = echo
        service.attach()
        assert peer.ask(id=4, op="generate", prompt="x")["text"] == "x"


def test_draining_ends_what_is_open_and_refuses_what_is_new(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        peer.send(id="old", op="generate", prompt="x")
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        service.server.drain()
        assert peer.ask(id="new", op="generate", prompt="x")["code"] == "shutting_down"
        assert peer.ask(id="h", op="health")["status"] == "draining"
        assert service.server.open_requests == 1
        service.engine.end(service.engine.requests[0].key, data=b"done")
        assert peer.receive()["text"] == "done"
        assert service.server.open_requests == 0


def test_drain_while_loading_is_not_undone_by_attach(tmp_path: Path) -> None:
    with Service(tmp_path, ready=False) as service, Peer(service.endpoint) as peer:
        service.server.drain()
        service.attach()
        assert peer.ask(id=1, op="generate", prompt="x")["code"] == "shutting_down"


def test_closing_answers_every_open_request(tmp_path: Path) -> None:
    service = Service(tmp_path)
    with Peer(service.endpoint) as peer:
        for number in range(3):
            peer.send(id=number, op="generate", prompt="x", stream=number == 2)
        service.engine.wait(lambda engine: len(engine.requests) == 3)
        service.close()
        service.close()
        replies = [peer.receive() for _ in range(4)]
        errors = {reply["id"]: reply["code"] for reply in replies if reply["ev"] == "error"}
        assert errors == dict.fromkeys(range(3), "shutting_down")
    assert not (tmp_path / "edgellm.sock").exists()


def test_a_dead_engine_s_requests_are_ended_once(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        peer.send(id=1, op="generate", prompt="x")
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        service.server.end_all(Finish.FAULT)
        assert peer.receive()["code"] == "internal"
        service.engine.end(service.engine.requests[0].key)  # its last words, too late
        assert peer.silent()


def test_the_beat_goes_on(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        beat = service.server.beat
        assert peer.silent()
        assert service.server.beat > beat
        assert service.server.alive
    assert not service.server.alive


def test_a_second_daemon_on_the_socket_refuses_and_says_who_has_it(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), bound(service.endpoint):
            pass
        assert peer.silent()  # and the first is none the worse


def test_the_socket_of_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/edgellm.sock"
    program = (
        "import os, sys; from edgellm.server import Server; from edgellm.server_config import ServerConfig;"
        "s = Server(ServerConfig(endpoint=sys.argv[1])); s.bind(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, endpoint], check=False)
    assert (tmp_path / "edgellm.sock").exists()
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        assert peer.silent()


def test_the_socket_is_closed_to_others(tmp_path: Path) -> None:
    with bound(f"ipc://{tmp_path}/deep/er/edgellm.sock"):
        assert stat.S_IMODE((tmp_path / "deep/er/edgellm.sock").stat().st_mode) == 0o660
        assert stat.S_IMODE((tmp_path / "deep/er").stat().st_mode) == 0o750
    group = os.getgroups()[0] if os.getgroups() else os.getgid()
    with bound(f"ipc://{tmp_path}/other.sock", ServerConfig(socket_mode="0600", socket_group=str(group))):
        found = (tmp_path / "other.sock").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o600, group)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("tcp://127.0.0.1:5555", "CURVE"),
        ("inproc://x", "ipc://PATH"),
        ("/run/edgellm.sock", "ipc://PATH"),
        ("ipc://", "ipc://PATH"),
        ("ipc://*", "names no file"),
        ("ipc://@abstract", "names no file"),
        ("ipc:///" + "x" * 107, "108 bytes"),
    ],
)
def test_endpoints_that_cannot_be_served(endpoint: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        Server(ServerConfig(endpoint=endpoint))
    assert "server.endpoint" in str(raised.value)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "edgellm.sock"
    precious.write_text("not a socket")
    with pytest.raises(ConfigError, match="not a socket"), bound(f"ipc://{precious}"):
        pass
    assert precious.read_text() == "not a socket"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"server\.endpoint"), bound(f"ipc://{tmp_path}/file/edgellm.sock"):
        pass


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """In a process without privileges, which root has to become first."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    program = (
        "import os, sys\n"
        "from edgellm.errors import ConfigError\n"
        "from edgellm.server import Server\n"
        "from edgellm.server_config import ServerConfig\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "os.chdir('/')\n"
        "try: Server(ServerConfig(endpoint='ipc://' + sys.argv[1] + '/edgellm.sock')).bind()\n"
        "except ConfigError as error: print(error)\n"
    )
    # The parents of tmp_path are closed to others: enter it by its descriptor.
    descriptor = os.open(locked, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(descriptor, True)
    try:
        said = subprocess.run(
            [sys.executable, "-c", program, f"/proc/self/fd/{descriptor}"],
            capture_output=True,
            text=True,
            check=True,
            close_fds=False,
        ).stdout
    finally:
        os.close(descriptor)
    assert "server.endpoint" in said
    assert "writable" in said


def test_an_unknown_group_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"server\.socket_group.*no group nosuchgroup"),
        bound(f"ipc://{tmp_path}/edgellm.sock", ServerConfig(socket_group="nosuchgroup")),
    ):
        pass
    with bound(f"ipc://{tmp_path}/edgellm.sock"):  # the lock was let go
        pass


def test_a_foreign_listener_s_socket_is_only_cleared_under_the_lock(tmp_path: Path) -> None:
    """A stale socket file that another program left is cleared too; nothing listens on it."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "edgellm.sock"))
    stale.close()
    with bound(f"ipc://{tmp_path}/edgellm.sock"):
        pass

"""What is published, to whom, and what keeps a daemon from publishing."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zmq
from fake_engine import SLOTS, Peer, Service
from fake_governor import HEATING_UP, THROTTLED, FakeGovernor

from edgellm import protocol
from edgellm.endpoint import events_endpoint
from edgellm.errors import ConfigError
from edgellm.governor.causes import Settings
from edgellm.governor.config import GovernorConfig
from edgellm.governor.governor import Governor
from edgellm.server import Server
from edgellm.server_config import ServerConfig


class Subscriber:
    """A SUB socket and msgpack, as docs/protocol.md has it. Heard by the daemon once it is constructed."""

    def __init__(self, service: Service, topic: str = "", **options: int) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.SUB)
        self.socket.linger = 0
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.subscribe("stats")
        self.socket.connect(service.events_endpoint)
        while not self.socket.poll(10):
            service.server.publish_statistics()
        if topic != "stats":
            self.socket.subscribe(topic)
            self.socket.unsubscribe("stats")
            self._settle(service)

    def _settle(self, service: Service) -> None:
        """Until statistics come under the new subscription, or not at all, nothing is sure."""
        while self.socket.poll(50):
            self.socket.recv_multipart()
            service.server.publish_statistics()

    def receive(self, timeout: float = 5.0) -> tuple[str, dict[str, Any]]:
        assert self.socket.poll(int(1000 * timeout)), "nothing was published"
        topic, payload = self.socket.recv_multipart()
        message: dict[str, Any] = msgpack.unpackb(payload)
        assert (message["v"], message["id"], message["ev"]) == (1, None, topic.decode())
        return topic.decode(), message

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service


def test_a_transition_is_published_without_waiting_for_statistics(service: Service) -> None:
    with Subscriber(service, "state") as subscriber:
        before = time.time()
        service.server.publish_transition(HEATING_UP)
        topic, message = subscriber.receive()
        assert topic == "state"
        assert before <= message.pop("at") <= time.time()
        assert message == {
            "ev": "state", "v": 1, "id": None, "state": "THROTTLED", "previous": "NORMAL", "reason": "heat",
            "detail": THROTTLED.detail, "batch_cap": 3, "duty": 0.5,
        }  # fmt: skip


def test_what_a_client_asks_for_is_published_too(service: Service) -> None:
    governor = Governor(
        Settings(SLOTS, GovernorConfig(enabled=False)),
        lambda: None,
        apply=lambda _: None,
        tell=service.server.publish_transition,
    )
    governor.tick()
    service.server.govern(governor)
    with Subscriber(service, "state") as subscriber, Peer(service.endpoint) as peer:
        assert peer.ask(id=1, op="suspend")["batch_cap"] == 0
        _, message = subscriber.receive()
        assert (message["previous"], message["reason"], message["batch_cap"]) == ("NORMAL", "suspend", 0)


def test_statistics_are_what_status_answers(service: Service) -> None:
    service.server.govern(FakeGovernor(THROTTLED))
    with Subscriber(service, "stats") as subscriber, Peer(service.endpoint) as peer:
        status = peer.ask(id=1, op="status")
        service.server.publish_statistics()
        while (message := subscriber.receive()[1])["clients"] != 1:  # the ones that it found its way by
            pass
    assert set(message) == set(status)
    changing = {"ev", "id", "uptime_s", "rss_bytes"}
    assert {k: v for k, v in message.items() if k not in changing} == {
        k: v for k, v in status.items() if k not in changing
    }
    assert message["state"] == "THROTTLED"
    msgspec.convert(message, protocol.StatsEvent)


def test_while_loading_statistics_say_so(tmp_path: Path) -> None:
    with Service(tmp_path, ready=False) as service, Subscriber(service, "stats") as subscriber:
        _, message = subscriber.receive()
        assert (message["status"], message["state"], message["slots"]) == ("loading", None, 0)


def test_a_subscriber_that_does_not_read_holds_nobody_up(service: Service) -> None:
    with (
        Subscriber(service, "state", RCVHWM=1, RCVBUF=4096),
        Subscriber(service, "state", RCVHWM=20_000) as reader,
        Peer(service.endpoint) as peer,
    ):
        for _ in range(200):
            for _ in range(16):
                service.server.publish_transition(HEATING_UP)
            assert peer.ask(id=1, op="health")["ev"] == "health"
        assert reader.receive()[0] == "state"
        assert service.server.alive


def test_a_subscriber_that_vanishes_is_no_matter(service: Service) -> None:
    with Subscriber(service, "state"):
        service.server.publish_transition(HEATING_UP)
    service.server.publish_transition(HEATING_UP)
    with Subscriber(service, "state") as subscriber:
        service.server.publish_transition(HEATING_UP)
        assert subscriber.receive()[1]["state"] == "THROTTLED"


def test_a_subscription_beyond_reason_is_dropped_and_the_others_stay(service: Service) -> None:
    with Subscriber(service, "state") as subscriber, Subscriber(service, "state") as greedy:
        greedy.socket.subscribe("x" * 10_000)
        with Peer(service.endpoint) as peer:
            assert peer.silent()
        service.server.publish_transition(HEATING_UP)
        assert subscriber.receive()[1]["state"] == "THROTTLED"


def test_publishing_after_the_end_is_no_error(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.close()
    service.server.publish_transition(HEATING_UP)
    service.server.publish_statistics()


# Where.


@contextlib.contextmanager
def bound(endpoint: str, **fields: Any) -> Iterator[Server]:
    server = Server(ServerConfig(endpoint=endpoint, **fields))
    try:
        server.bind()
        yield server
    finally:
        server.close()


@pytest.mark.parametrize(
    ("endpoint", "events"),
    [
        ("ipc:///run/edgellm/edgellm.sock", "ipc:///run/edgellm/edgellm.pub"),
        ("ipc:///run/edgellm/a.sock.d/x", "ipc:///run/edgellm/a.sock.d/x.pub"),
    ],
)
def test_events_lie_beside_the_requests(endpoint: str, events: str) -> None:
    assert events_endpoint(endpoint) == events


def test_the_file_has_the_same_mode_and_group_and_goes_with_the_daemon(tmp_path: Path) -> None:
    mine = [group for group in os.getgroups() if group != os.getegid()]
    group = 4242 if os.geteuid() == 0 else mine[0] if mine else os.getegid()
    path = tmp_path / "edgellm.pub"
    with bound(f"ipc://{tmp_path}/edgellm.sock", socket_mode="0600", socket_group=str(group)) as server:
        assert server.events_endpoint == f"ipc://{path}"
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o600, group)
    assert not path.exists()


def test_the_file_of_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "edgellm.pub"))
    stale.close()
    with Service(tmp_path) as service, Subscriber(service, "state") as subscriber:
        service.server.publish_transition(HEATING_UP)
        assert subscriber.receive()[0] == "state"


def test_it_may_lie_elsewhere(tmp_path: Path) -> None:
    elsewhere = f"ipc://{tmp_path}/there/events"
    with bound(f"ipc://{tmp_path}/edgellm.sock", events_endpoint=elsewhere) as server:
        assert server.events_endpoint == elsewhere
        assert (tmp_path / "there/events").is_socket()
    assert not (tmp_path / "edgellm.pub").exists()


def test_two_daemons_never_share_an_events_endpoint(tmp_path: Path) -> None:
    events = f"ipc://{tmp_path}/events"
    with bound(f"ipc://{tmp_path}/one.sock", events_endpoint=events) as one:
        with (
            pytest.raises(ConfigError, match=rf"server\.events_endpoint: .*process {os.getpid()}"),
            bound(f"ipc://{tmp_path}/two.sock", events_endpoint=events),
        ):
            pass
        assert not (tmp_path / "two.sock").exists()
        assert Path(one.events_endpoint.removeprefix("ipc://")).is_socket()
        with bound(f"ipc://{tmp_path}/two.sock"):  # the first one's failure left no lock behind
            pass


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ("tcp://127.0.0.1:5556", "CURVE"),
        ("ipc://*", "names no file"),
        ("ipc:///" + "x" * 107, "108 bytes"),
        ("ipc:///nowhere/edgellm.sock", "needs its own path"),
    ],
)
def test_events_endpoints_that_cannot_be_served(events: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        Server(ServerConfig(endpoint="ipc:///nowhere/edgellm.sock", events_endpoint=events))
    assert "server.events_endpoint" in str(raised.value)


def test_a_path_that_only_the_requests_fit_in_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.events_endpoint.*110 bytes"):
        Server(ServerConfig(endpoint="ipc:///" + "x" * 105))


def test_a_directory_that_cannot_be_made_keeps_neither_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"server\.events_endpoint"),
        bound(f"ipc://{tmp_path}/edgellm.sock", events_endpoint=f"ipc://{tmp_path}/file/events"),
    ):
        pass
    assert not (tmp_path / "edgellm.sock").exists()


def test_what_cannot_bind_lets_go_of_what_it_had(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("not a socket")
    endpoint = f"ipc://{tmp_path}/edgellm.sock"
    failed = Server(ServerConfig(endpoint=endpoint, events_endpoint=f"ipc://{tmp_path}/events"))
    with pytest.raises(ConfigError):
        failed.bind()
    with bound(endpoint):
        failed.close()
        assert (tmp_path / "edgellm.sock").is_socket()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "edgellm.pub"
    precious.write_text("not a socket")
    with (
        pytest.raises(ConfigError, match=r"server\.events_endpoint: .*not a socket"),
        bound(f"ipc://{tmp_path}/edgellm.sock"),
    ):
        pass
    assert precious.read_text() == "not a socket"

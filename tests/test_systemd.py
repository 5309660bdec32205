"""The notify protocol against a real datagram socket, through both implementations."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm import systemd
from edgellm.systemd import Daemon, Notifier, Watchdog, systemd_python


class Manager:
    """Receives datagrams at an address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    def received(self) -> list[str]:
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(self._socket.recv(65536).decode())
        return messages

    def close(self) -> None:
        self._socket.close()


class FakeDaemon:
    """systemd.daemon as systemd-python documents it: one message per call, to the socket in os.environ."""

    def __init__(self, address: str) -> None:
        self._address = address

    def notify(self, status: str) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect("\0" + self._address[1:] if self._address.startswith("@") else self._address)
            sender.send(status.encode())
        return True


def real_daemon(address: str) -> Daemon:
    module = systemd_python("daemon")
    assert module is not None
    daemon: Daemon = module
    return daemon


WAYS: dict[str, Callable[[str], Daemon | None]] = {
    "plain": lambda _address: None,
    "injected": FakeDaemon,
    # systemd-python itself where it is installed; the contract of the injected one is checked without it.
    **({"systemd-python": real_daemon} if systemd_python("daemon") else {}),
}


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"{tmp_path}/notify"
    manager = Manager(
        name if request.param == "path" else f"@edgellm-test-{os.getpid()}-{time.monotonic_ns()}"
    )
    yield manager
    manager.close()


@pytest.fixture(params=WAYS)
def notifier(request: pytest.FixtureRequest, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Notifier:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    return Notifier(daemon=WAYS[request.param](manager.address))


def test_every_message_is_what_sd_notify_documents(notifier: Notifier, manager: Manager) -> None:
    notifier.extend_timeout(30, "loading: weights, 12 %")
    notifier.ready("serving")
    notifier.status("THROTTLED: gpu-thermal 91 °C")
    notifier.pet()
    notifier.stopping()
    assert manager.received() == [
        "EXTEND_TIMEOUT_USEC=30000000\nSTATUS=loading: weights, 12 %",
        "READY=1\nSTATUS=serving",
        "STATUS=THROTTLED: gpu-thermal 91 °C",
        "WATCHDOG=1",
        "STOPPING=1",
    ]


def test_reloading_carries_the_monotonic_clock(notifier: Notifier, manager: Manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    (message,) = manager.received()
    first, second = message.split("\n")
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= after


def test_a_status_cannot_smuggle_an_assignment(notifier: Notifier, manager: Manager) -> None:
    notifier.status("cannot load\nREADY=1")
    assert manager.received() == ["STATUS=cannot load READY=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_manager_nothing_is_sent(environment: dict[str, str]) -> None:
    class Never:
        def notify(self, status: str) -> bool:
            raise AssertionError(status)

    notifier = Notifier({**environment, "WATCHDOG_USEC": "1000000"}, daemon=Never())
    assert not notifier.enabled
    assert notifier.watchdog_s is None
    notifier.ready()
    notifier.reloading()
    notifier.extend_timeout(1)
    notifier.stopping()
    notifier.pet()


@pytest.mark.parametrize("plain", [True, False])
def test_a_manager_that_went_away_is_logged_once(
    plain: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = str(tmp_path / "gone")
    notifier = Notifier({"NOTIFY_SOCKET": address}, daemon=None if plain else FakeDaemon(address))
    for _ in range(3):
        notifier.pet()
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == "WARNING"


def test_a_full_queue_loses_a_message_instead_of_hanging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setattr(systemd, "SEND_TIMEOUT_S", 0.01)
    notifier = Notifier({"NOTIFY_SOCKET": manager.address}, daemon=None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        filler.connect(manager.address)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.send(b"x")
                sent += 1
    notifier.pet()
    assert len(manager.received()) == sent
    assert "takes no message" in caplog.text
    manager.close()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "10000000"}, 10.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_armed_for_this_process_alone(
    environment: dict[str, str], seconds: float | None
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "/run/nowhere", **environment}, daemon=None)
    assert notifier.watchdog_s == seconds


class Beats:
    def __init__(self) -> None:
        self.now = 0.0
        self.engine = 0
        self.io = 0


@pytest.fixture
def beats() -> Beats:
    return Beats()


@pytest.fixture
def watchdog(tmp_path: Path, beats: Beats) -> Iterator[tuple[Watchdog, Manager]]:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "10000000"}, daemon=None)
    loops = {"engine": lambda: beats.engine, "I/O": lambda: beats.io}
    yield Watchdog(notifier, loops, clock=lambda: beats.now), manager
    manager.close()


def test_pets_while_both_loops_advance(watchdog: tuple[Watchdog, Manager], beats: Beats) -> None:
    dog, manager = watchdog
    assert dog.interval_s == 5.0
    for _ in range(3):
        beats.engine += 1
        beats.io += 7
        assert dog.look() == ()
    assert manager.received() == ["WATCHDOG=1"] * 3


@pytest.mark.parametrize("silent", ["engine", "I/O"])
def test_one_silent_loop_is_enough_to_stop(
    watchdog: tuple[Watchdog, Manager], beats: Beats, silent: str, caplog: pytest.LogCaptureFixture
) -> None:
    dog, manager = watchdog
    dog.look()
    manager.received()
    for second in range(1, 10):
        beats.now = float(second)
        beats.engine += silent != "engine"
        beats.io += silent != "I/O"
        assert dog.look() == [silent]
    assert manager.received() == []
    # Said once, at half the time: after the kill nobody is left to say it.
    assert [record.getMessage() for record in caplog.records] == [
        f"no progress for 5.0 s in: {silent}; systemd's watchdog kills the service at 10.0 s"
    ]


def test_a_loop_that_comes_back_is_petted_again(watchdog: tuple[Watchdog, Manager], beats: Beats) -> None:
    dog, manager = watchdog
    dog.look()
    beats.io += 1
    assert dog.look() == ["engine"]
    beats.engine += 1
    # The I/O loop's advance since the last pet still counts.
    assert dog.look() == ()
    assert manager.received() == ["WATCHDOG=1"] * 2


def test_a_counter_that_starts_anew_is_alive(watchdog: tuple[Watchdog, Manager], beats: Beats) -> None:
    dog, _manager = watchdog
    beats.engine = beats.io = 100
    dog.look()
    beats.engine = beats.io = 1
    assert dog.look() == ()

"""Limiting and listening with both clients, against a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from fake_engine import Service
from fake_governor import HEATING_UP, THROTTLED, FakeGovernor

from edgellm import AsyncClient, Client
from edgellm.client import Decision, Events, StateChange, Statistics, subscribe
from edgellm.errors import BadRequest, Loading, ProtocolError, RequestTimeout, Unreachable

SUSPENDED = Decision("THROTTLED", "suspend", "suspended by uid 0", 0, 0.0, None)
OWN = f"uid {os.geteuid()}"


@pytest.fixture
def governor() -> FakeGovernor:
    return FakeGovernor(THROTTLED)


@pytest.fixture
def service(tmp_path: Path, governor: FakeGovernor) -> Iterator[Service]:
    with Service(tmp_path) as service:
        service.server.govern(governor)
        yield service


@contextlib.contextmanager
def publishing(service: Service) -> Iterator[None]:
    """Statistics, as the main thread would have them published, but faster."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.005):
            service.server.publish_statistics()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_limit_suspend_and_resume(service: Service, governor: FakeGovernor) -> None:
    with Client(service.endpoint, timeout=5) as client:
        assert client.limit(duty=0.5) == SUSPENDED
        assert client.suspend() == SUSPENDED
        until = client.suspend(ttl_ms=60_000).until
        assert until is not None
        assert client.resume().state == "NORMAL"
        assert client.resume(everyone=True).batch_cap == 4
        with pytest.raises(BadRequest):
            client.limit()
    assert [(limit.batch, limit.duty) for limit in governor.limits] == [(None, 0.5), (0, 0.0), (0, 0.0)]
    assert governor.released == [OWN, None]


def test_limit_suspend_and_resume_with_asyncio(service: Service, governor: FakeGovernor) -> None:
    async def ask() -> None:
        async with AsyncClient(service.endpoint, timeout=5) as client:
            assert await client.limit(batch_cap=1, duty=0.5) == SUSPENDED
            assert (await client.suspend(ttl_ms=60_000)).batch_cap == 0
            assert (await client.resume()).state == "NORMAL"
            assert (await client.status()).state == "THROTTLED"

    asyncio.run(ask())
    assert [limit.batch for limit in governor.limits] == [1, 0]
    assert governor.released == [OWN]


def test_limiting_while_loading_is_an_error_of_its_own(tmp_path: Path) -> None:
    with (
        Service(tmp_path, ready=False) as service,
        Client(service.endpoint, timeout=5) as client,
        pytest.raises(Loading),
    ):
        client.suspend()


def test_status_tells_the_state(service: Service) -> None:
    with Client(service.endpoint, timeout=5) as client:
        status = client.status()
        assert (status.state, status.reason, status.duty) == ("THROTTLED", "heat", 0.5)
        assert status.transitions == {"NORMAL": 1, "SHED": 2}
        assert status.hottest_c is None


def test_who_comes_late_learns_the_state_from_statistics_and_then_hears_of_changes(service: Service) -> None:
    with subscribe(service.endpoint, silence=5) as events:
        with publishing(service):
            first = next(events)
        assert isinstance(first, Statistics)
        assert (first.state, first.slots) == ("THROTTLED", 4)
        service.server.publish_transition(HEATING_UP)
        change = next(event for event in events if isinstance(event, StateChange))
        assert (change.previous, change.state, change.batch_cap) == ("NORMAL", "THROTTLED", 3)
        assert change.detail == THROTTLED.detail


def test_only_what_is_subscribed_to_comes(service: Service) -> None:
    with subscribe(service.endpoint, topics=["state"]) as events, publishing(service):
        with pytest.raises(RequestTimeout, match=r"edgellm\.pub within 0\.1 s"):
            events.receive(0.1)
        service.server.publish_transition(HEATING_UP)
        assert isinstance(events.receive(5), StateChange)


def test_silence_ends_the_iteration_if_so_wished(tmp_path: Path) -> None:
    with subscribe(f"ipc://{tmp_path}/none.sock", silence=0.05) as events, pytest.raises(RequestTimeout):
        next(events)


def test_a_daemon_that_comes_later_is_heard(tmp_path: Path) -> None:
    with (
        subscribe(f"ipc://{tmp_path}/edgellm.sock", silence=10) as events,
        Service(tmp_path) as service,
        publishing(service),
    ):
        assert isinstance(next(events), Statistics)


def test_the_endpoint_is_the_environment_s_or_named(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLM_ENDPOINT", service.endpoint)
    with subscribe() as events:
        assert events.endpoint == service.events_endpoint
    with subscribe("ipc:///nowhere", at=f"ipc://{tmp_path}/events") as events:
        assert events.endpoint == f"ipc://{tmp_path}/events"
    with pytest.raises(Unreachable, match="ipc://PATH"):
        subscribe("nonsense")


def heard(tmp_path: Path, *messages: Any) -> Events:
    """Events of something that publishes these messages, each under the topic `stats`."""
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind(f"ipc://{tmp_path}/e.pub")
    events = subscribe(f"ipc://{tmp_path}/e.sock", topics=["stats"], silence=5)
    assert publisher.poll(5000)
    publisher.recv()  # the subscription
    for message in messages:
        payload = message if isinstance(message, bytes) else msgpack.packb(message)
        publisher.send_multipart([b"stats", payload])
    context.destroy(linger=1000)
    return events


CHANGE = {
    "ev": "state", "v": 1, "id": None, "state": "SHED", "previous": "NORMAL", "reason": "heat", "detail": "d",
    "batch_cap": 1, "duty": 0.05, "at": 1.0,
}  # fmt: skip


def test_events_and_fields_that_a_newer_daemon_adds_are_passed_over(tmp_path: Path) -> None:
    with heard(tmp_path, {"ev": "weather", "v": 1, "id": None}, {**CHANGE, "more": 1}) as events:
        assert next(events) == StateChange("SHED", "NORMAL", "heat", "d", 1, 0.05, 1.0)


@pytest.mark.parametrize(
    "message", [b"\xc1", b"", {"ev": "state"}, [1], {"v": 1, "ev": "state"}, {**CHANGE, "v": 2}]
)
def test_what_is_not_the_protocol_is_an_error_of_its_own(tmp_path: Path, message: Any) -> None:
    with heard(tmp_path, message) as events, pytest.raises(ProtocolError):
        next(events)


def test_listening_needs_neither_msgspec_nor_numpy() -> None:
    program = (
        "import sys; from edgellm.client import subscribe; "
        "print(sorted({'msgspec', 'numpy', 'psutil', 'asyncio', 'rich'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"

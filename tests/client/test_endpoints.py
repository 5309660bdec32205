"""Which daemon a client asks, and what it says where it may not or where there is none."""

from __future__ import annotations

import grp
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Service, echo

from edgellm import Client, errors
from edgellm.client import subscribe
from edgellm.endpoint import SYSTEM, barrier, client_endpoints, default_endpoint


def test_the_default_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_ENDPOINT", "ipc:///somewhere")
    with Client() as client:
        assert client.endpoints == ["ipc:///somewhere"]
    monkeypatch.delenv("EDGELLM_ENDPOINT")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr("os.geteuid", lambda: 7)
    assert default_endpoint() == "ipc:///run/user/7/edgellm/edgellm.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_endpoint() == "ipc:///run/user/7/edgellm/edgellm.sock"
    assert client_endpoints() == [default_endpoint(), SYSTEM]
    with Client(connect_timeout=0.05) as client, pytest.raises(errors.Unreachable) as raised:
        client.chat("hi")
    assert all(f"nothing serves at {each}" in str(raised.value) for each in client_endpoints())
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_endpoint() == SYSTEM
    assert client_endpoints() == [SYSTEM]


def test_the_first_ready_daemon_is_used(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    with Service(tmp_path / "b", ready=False) as loading, Service(tmp_path / "c") as third:
        third.engine.script = echo
        endpoints = [f"ipc://{tmp_path}/a/none.sock", loading.endpoint, third.endpoint]
        with Client(endpoints, timeout=5, connect_timeout=0.1) as client:
            assert client.generate("x").text == "x"
            assert len(third.engine.requests) == 1
            loading.engine.script = echo
            loading.attach()
            assert client.generate("y").text == "y"  # what works is kept
            third.server.drain()
            assert client.generate("z").text == "z"
            assert "".join(delta.text for delta in client.stream_generate("w")) == "w"
            assert len(loading.engine.requests) == 2
            loading.server.drain()
            with pytest.raises(errors.Unreachable, match="draining"):
                client.generate("nowhere")


def test_of_several_endpoints_the_absent_cost_no_time_and_the_only_one_speaks_for_itself(
    tmp_path: Path,
) -> None:
    with Service(tmp_path, ready=False) as service:
        endpoints = [f"ipc://{tmp_path}/none.sock", service.endpoint]
        with Client(endpoints, timeout=60, connect_timeout=60) as client:  # waiting once would show
            assert client.endpoint is None
            with pytest.raises(errors.Loading):
                client.chat("hi")
            assert client.endpoint == service.endpoint
            service.attach()
            service.engine.script = echo
            assert client.wait_ready(60).ready
            assert client.chat("hi").text
            service.server.drain()
            with pytest.raises(errors.ShuttingDown):
                client.chat("hi")


def test_a_daemon_that_appears_at_either_endpoint_is_waited_for(tmp_path: Path) -> None:
    started: list[Service] = []
    timer = threading.Timer(0.1, lambda: started.append(Service(tmp_path)))
    timer.start()
    endpoints = [f"ipc://{tmp_path}/none.sock", f"ipc://{tmp_path}/edgellm.sock"]
    with Client(endpoints, connect_timeout=5) as client:
        client.health()  # an answer; the engine may not be attached yet
        assert client.endpoint == endpoints[1]
        assert client.wait_ready(60).ready
    timer.join()
    started[0].close()


@contextmanager
def without_privileges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """root may do anything: let what the files' modes allow their owner count."""
    if os.geteuid() != 0:
        yield
        return

    def access(path: Path, mode: int, *, effective_ids: bool) -> bool:
        assert effective_ids
        return path.stat().st_mode >> 6 & mode == mode

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", access)
        yield


def test_who_is_not_in_the_group_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    group = grp.getgrgid(closed.stat().st_gid).gr_name
    endpoint = f"ipc://{closed}/none.sock"
    with Service(tmp_path) as service, without_privileges(monkeypatch):
        assert barrier(f"ipc://{tmp_path}/none.sock") is None
        assert barrier("tcp://127.0.0.1:1") is None
        (tmp_path / "edgellm.sock").chmod(0o400)
        assert "permission denied" in str(barrier(service.endpoint))
        closed.chmod(0o600)
        words = rf"permission denied: {closed} is closed to uid {os.geteuid()} \(group {group}, mode 0600\)"
        with Client(endpoint, connect_timeout=0.05) as client:
            with pytest.raises(errors.Unreachable, match=words):
                client.chat("hi")
            with pytest.raises(errors.RequestTimeout, match=words):
                client.wait_ready(0.05)
        with (
            Client([f"ipc://{tmp_path}/none.sock", endpoint], connect_timeout=0.05) as client,
            pytest.raises(errors.Unreachable, match=rf"nothing serves at .*none\.sock; {words}"),
        ):
            client.chat("hi")
        with subscribe(endpoint, silence=0.05) as events, pytest.raises(errors.RequestTimeout, match=words):
            next(events)
        monkeypatch.setattr("edgellm.endpoint._group_name", lambda gid: "edgellm")
        real = Path.stat

        def of_a_group(path: Path, **options: Any) -> os.stat_result:
            fields = list(real(path, **options))
            fields[5] = 990  # st_gid
            return os.stat_result(fields)

        closed.chmod(0o650)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", of_a_group)
            told = barrier(endpoint)
        assert told is not None
        assert f"{closed} is for group edgellm only; join it (sudo usermod -aG edgellm USER)" in told
        closed.chmod(0o700)

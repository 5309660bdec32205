"""`edgellm serve` under a played systemd, with the real model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from manager import NotifySocket, service

from edgellm import Client

pytestmark = pytest.mark.model

WATCHDOG_S = 4.0
EXIT_S = 60.0


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[NotifySocket]:
    with NotifySocket(f"@edgellm-test-{tmp_path}") as socket:
        yield socket


@pytest.fixture
def configuration(smollm2_engine: Path, tmp_path: Path) -> Path:
    file = tmp_path / "edgellm.toml"
    file.write_text(
        f'[engine]\npath = "{smollm2_engine}"\n[server]\nendpoint = "ipc://{tmp_path}/e.sock"\n'
        '[log]\nlevel = "info"\n[scheduler]\ndrain_timeout_s = 50\n'
    )
    return file


def command(configuration: Path) -> list[str]:
    return [sys.executable, "-m", "edgellm", "serve", "--config", str(configuration)]


def test_loading_ready_reload_drain(notify: NotifySocket, configuration: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with service(command(configuration), notify, watchdog_s=WATCHDOG_S, log=log) as child:
        loading = notify.wait_for("EXTEND_TIMEOUT_USEC")
        assert loading.fields["STATUS"].startswith("loading: ")
        ready = notify.wait_for("READY")
        assert ready.fields["STATUS"].startswith("NORMAL")
        assert {message.pid for message in notify.messages} == {child.pid}
        notify.wait_for("WATCHDOG", after=ready.at)

        with (
            Client(f"ipc://{tmp_path}/e.sock") as client,
            client.stream_chat("Count.", temperature=0, ignore_eos=True, max_tokens=60) as stream,
        ):
            next(stream)
            # What can change does, what cannot says so, and the open answer goes on.
            text = configuration.read_text().replace('level = "info"', 'level = "debug"')
            configuration.write_text(text + "max_step_ms = 77\n")
            child.send_signal(signal.SIGHUP)
            reloading = notify.wait_for("RELOADING")
            assert int(reloading.fields["MONOTONIC_USEC"]) > 0
            again = notify.wait_for("READY", after=reloading.at)
            child.send_signal(signal.SIGTERM)
            stopping = notify.wait_for("STOPPING", after=again.at)
            assert stopping.fields["STATUS"].startswith("draining")
            assert sum(len(delta.tokens) for delta in stream) >= 55
        assert child.wait(EXIT_S) == 0
    lines = log.read_text()
    assert "reload: log.level" in lines
    assert "scheduler.max_step_ms" in lines


def test_a_broken_configuration_leaves_all_as_it_was(
    notify: NotifySocket, configuration: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with service(command(configuration), notify, log=log) as child:
        notify.wait_for("READY")
        configuration.write_text("[engine]\npaht = 1\n")
        child.send_signal(signal.SIGHUP)
        reloading = notify.wait_for("RELOADING")
        notify.wait_for("READY", after=reloading.at)
        with Client(f"ipc://{tmp_path}/e.sock") as client:
            assert client.chat("Hello.", max_tokens=2, ignore_eos=True).finish_reason == "length"
        child.send_signal(signal.SIGTERM)
        assert child.wait(EXIT_S) == 0
    assert "did you mean engine.path" in log.read_text()

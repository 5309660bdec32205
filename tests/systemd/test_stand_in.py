"""The notify protocol and the watchdog between processes: a small daemon under a played systemd."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from manager import NotifySocket, service

STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_daemon.py"))]
WATCHDOG_S = 0.4


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[NotifySocket]:
    with NotifySocket(str(tmp_path / "notify")) as socket:
        yield socket


def test_life_from_loading_to_stopping(notify: NotifySocket, tmp_path: Path) -> None:
    with service(STAND_IN, notify, watchdog_s=WATCHDOG_S, log=tmp_path / "log") as child:
        loading = notify.wait_for("EXTEND_TIMEOUT_USEC")
        ready = notify.wait_for("READY")
        assert loading.at <= ready.at
        assert loading.fields["STATUS"] == "loading: weights, 50 %"
        assert ready.fields["STATUS"] == "serving"
        # NotifyAccess=main: messages count only from the main process.
        assert {message.pid for message in notify.messages} == {child.pid}
        child.send_signal(signal.SIGHUP)
        reloading = notify.wait_for("RELOADING", after=ready.at)
        assert int(reloading.fields["MONOTONIC_USEC"]) > 0
        again = notify.wait_for("READY", after=reloading.at)
        assert again.fields["STATUS"] == "serving, reloaded"
        notify.wait_for("WATCHDOG", after=again.at)
        child.send_signal(signal.SIGTERM)
        notify.wait_for("STOPPING")
        assert child.wait(10) == 0


@pytest.mark.parametrize("fault", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_stuck_loop_stops_the_petting(notify: NotifySocket, tmp_path: Path, fault: signal.Signals) -> None:
    with service(STAND_IN, notify, watchdog_s=WATCHDOG_S, log=tmp_path / "log") as child:
        notify.wait_for("WATCHDOG")
        child.send_signal(fault)
        child.send_signal(signal.SIGHUP)  # proves that the main thread still lives while it no longer pets
        last = notify.wait_for("RELOADING").at + 0.1
        with pytest.raises(AssertionError, match="no such message"):
            # One pet may have been under way; then none within the watchdog's time.
            notify.wait_for("WATCHDOG", after=last, timeout=WATCHDOG_S)
        assert child.poll() is None
    assert "no progress for" in (tmp_path / "log").read_text()

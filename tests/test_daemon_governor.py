"""The governor in the daemon, with the real model: a suspension holds and loses nothing, heat turns away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_daemon import READY_S, daemon, stop

from edgellm import Client
from edgellm.client import Events, StateChange, subscribe
from edgellm.errors import Overloaded

pytestmark = pytest.mark.model

PROMPT = "Once upon a time"


def next_change(events: Events) -> StateChange:
    return next(event for event in events if isinstance(event, StateChange))


def test_a_suspension_holds_at_once_and_nothing_is_computed_again(
    smollm2_engine: Path, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/e.sock"
    with (
        daemon(smollm2_engine, endpoint, "--set", "governor.enabled=false") as process,
        Client(endpoint) as client,
        Client(endpoint) as perception,
        subscribe(endpoint, silence=10) as events,
    ):
        client.wait_ready(READY_S)
        whole = client.generate(PROMPT, temperature=0, max_tokens=80, ignore_eos=True)
        assert next(events).state == "NORMAL"
        with client.stream_generate(PROMPT, temperature=0, max_tokens=80, ignore_eos=True) as stream:
            for _ in range(3):
                next(stream)
            assert perception.suspend().batch_cap == 0
            before = perception.status().completion_tokens
            change = next_change(events)
            assert (change.previous, change.reason, change.batch_cap) == ("NORMAL", "suspend", 0)
            time.sleep(0.5)  # some twenty steps, if it ran
            held = perception.status()
            assert held.completion_tokens - before <= 1  # the step in flight
            assert (held.running, held.batch_cap, held.duty) == (1, 0, 0.0)
            assert perception.resume().batch_cap == 4
            for _ in stream:
                pass
        assert stream.answer is not None
        assert stream.answer.tokens == whole.tokens
        after = perception.status()
        assert after.prompt_tokens == 2 * whole.usage.prompt_tokens
        assert after.completion_tokens == 2 * 80
        code, log = stop(process)
    assert code == 0
    assert "NORMAL → THROTTLED: suspend: suspended by uid" in log


def test_a_hot_board_takes_only_what_matters(smollm2_engine: Path, tmp_path: Path) -> None:
    zone = tmp_path / "board/sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    for name, text in (
        ("type", "tj-thermal"),
        ("temp", "60000"),
        ("trip_point_0_type", "passive"),
        ("trip_point_0_temp", "99000"),
    ):
        (zone / name).write_text(f"{text}\n")
    # The memory budget asks the same board.
    (tmp_path / "board/proc").mkdir()
    (tmp_path / "board/proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    endpoint = f"ipc://{tmp_path}/e.sock"
    flags = ["--set", f"sensors.root={tmp_path / 'board'}", "--set", "sensors.interval_s=0.5"]
    with (
        daemon(smollm2_engine, endpoint, *flags) as process,
        Client(endpoint) as client,
        subscribe(endpoint, topics=["state"], silence=10) as events,
    ):
        client.wait_ready(READY_S)
        assert client.status().state == "NORMAL"
        (zone / "temp").write_text("95000\n")
        change = next_change(events)
        assert (change.previous, change.state, change.reason) == ("NORMAL", "SHED", "heat")
        with pytest.raises(Overloaded, match=r"SHED, tj-thermal 95\.0 °C") as refused:
            client.generate(PROMPT, max_tokens=2)
        assert refused.value.retry_after_ms == 30_000
        assert len(client.generate(PROMPT, max_tokens=2, priority="high", ignore_eos=True).tokens) == 2
        status = client.status()
        assert (status.state, status.hottest_zone, status.hottest_c) == ("SHED", "tj-thermal", 95.0)
        (zone / "temp").write_text("99500\n")
        assert next_change(events).state == "CRITICAL"
        with pytest.raises(Overloaded, match="CRITICAL"):
            client.generate(PROMPT, max_tokens=2, priority="high")
        assert stop(process)[0] == 0

"""The shipped units against what the daemon and old versions of systemd need of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgellm.config import SchedulerConfig, load_config
from edgellm.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    EngineError,
    ExecutorFault,
    OperatorError,
    TemporaryShortage,
    UsageError,
)

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNIT = SYSTEMD / "edgellm.service"
RETRY = SYSTEMD / "edgellm-retry.service"

NEWER_THAN_249 = {
    "MemoryPressureWatch": 254,
    "RestartSteps": 254,
    "RestartMaxDelaySec": 254,
    "RestartMode": 254,
    "ExitType": 250,
    "ImportCredential": 254,
    "LoadCredentialEncrypted": 250,
    "MemoryZSwapMax": 253,
    "OpenFile": 253,
    "PrivatePIDs": 257,
    "ProtectHostnameEx": 257,
    "RestrictFileSystems": 250,
    "StartupMemoryMax": 252,
}
"""Directives that systemd 245 (Ubuntu 20.04) and 249 (22.04) lack, by the version that brought them."""


def directives(unit: Path) -> dict[str, list[str]]:
    """Every assignment of a unit in order; sections do not matter, as no two share a directive here."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    return directives(UNIT)


def seconds(unit: dict[str, list[str]], name: str) -> float:
    return float(unit[name][-1])


@pytest.mark.parametrize("file", sorted(SYSTEMD.rglob("*.service")) + sorted(SYSTEMD.rglob("*.conf")))
def test_nothing_that_jetpack_5_and_6_lack(file: Path) -> None:
    assert not NEWER_THAN_249.keys() & {line.partition("=")[0] for line in file.read_text().splitlines()}
    assert "notify-reload" not in file.read_text()


def test_what_can_heal_is_restarted_and_what_cannot_is_not(unit: dict[str, list[str]]) -> None:
    never = {int(code) for code in unit["RestartPreventExitStatus"][-1].split()}
    hopeless: tuple[type[OperatorError], ...] = (ConfigError, UsageError, CheckpointError, EngineError)
    assert never == {error.exit_code for error in hopeless}
    assert not never & {error.exit_code for error in (TemporaryShortage, ExecutorFault, DownloadError)}
    assert unit["Restart"] == ["on-failure"]


def test_the_retry_knows_the_same_hopeless_codes(unit: dict[str, list[str]]) -> None:
    found = re.search(r" in ([\d|]+)\)", directives(RETRY)["ExecCondition"][0])
    assert found is not None
    assert found[1].split("|") == unit["RestartPreventExitStatus"][-1].split()


def test_five_quick_failures_are_followed_by_slow_tries(unit: dict[str, list[str]]) -> None:
    assert unit["OnFailure"] == [RETRY.name]
    # The limit is reached by quick failures, so that OnFailure runs: burst x pause lies within the interval.
    assert seconds(unit, "StartLimitBurst") * seconds(unit, "RestartSec") < seconds(
        unit, "StartLimitIntervalSec"
    )
    # The slow tries themselves have no limit.
    assert directives(RETRY)["StartLimitIntervalSec"] == ["0"]
    assert "StartLimitAction" not in unit
    assert "FailureAction" not in unit


def test_times_fit_the_daemons_own(unit: dict[str, list[str]]) -> None:
    scheduler = SchedulerConfig()
    # The beats advance once a step, and the watchdog is petted every half of its time.
    assert seconds(unit, "WatchdogSec") / 2 > 2 * scheduler.max_step_ms / 1000
    assert seconds(unit, "TimeoutStopSec") > scheduler.drain_timeout_s + 1


def test_the_governor_and_the_gpu_see_what_they_need(unit: dict[str, list[str]]) -> None:
    for directive in (
        "PrivateDevices",
        "ProcSubset",
        "PrivateUsers",
        "MemoryDenyWriteExecute",
        "ProtectClock",
    ):
        assert directive not in unit


def test_type_notify_and_its_companions(unit: dict[str, list[str]]) -> None:
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert unit["LimitCORE"] == ["0"]
    assert int(unit["OOMScoreAdjust"][0]) > 0


def test_the_shipped_configuration_is_one(tmp_path: Path) -> None:
    config = load_config(SYSTEMD / "edgellm.toml", environment={})
    assert config.engine.path == "/var/lib/edgellm/engine"
    endpoint = config.server.endpoint
    assert endpoint is not None
    # RuntimeDirectory of the unit.
    assert endpoint.startswith(f"ipc:///run/{directives(UNIT)['RuntimeDirectory'][0]}/")


def test_the_tcp_drop_in_undoes_all_that_stands_in_the_way(unit: dict[str, list[str]]) -> None:
    drop_in = directives(SYSTEMD / "drop-ins" / "tcp.conf")
    assert unit["PrivateNetwork"] == ["yes"]
    assert drop_in["PrivateNetwork"] == ["no"]
    assert unit["RestrictAddressFamilies"] == ["AF_UNIX"]
    # What server/tcp_address.py looks for; a second assignment adds to the first.
    assert set(drop_in["RestrictAddressFamilies"][0].split()) == {"AF_INET", "AF_INET6", "AF_NETLINK"}
    assert drop_in["IPAddressDeny"] == ["any"]
    assert drop_in["IPAddressAllow"] == ["localhost"]


@pytest.mark.parametrize("file", sorted((SYSTEMD / "drop-ins").glob("*.conf")))
def test_drop_ins_are_complete_by_themselves(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "[Service]"
    assert directives(file)

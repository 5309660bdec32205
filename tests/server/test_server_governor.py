"""Whom the governor turns away, and who may limit what runs: with a fake governor, and with the real one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import SLOTS, Peer, Service, echo
from fake_governor import CRITICAL, NORMAL, SHED, THROTTLED, FakeGovernor

from edgellm.governor.causes import Settings
from edgellm.governor.config import GovernorConfig
from edgellm.governor.governor import Governor
from edgellm.governor.policy import Decision
from edgellm.governor.sensors import Memory, Readings, Zone
from edgellm.server import access
from edgellm.server_config import AccessRule, ServerConfig

OWN = f"uid {os.geteuid()}"
PRIORITIES = ("critical", "high", "normal", "background")
ANY_PRIORITY = ServerConfig(max_priority="critical")
STRANGER = 4242


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, ANY_PRIORITY) as service:
        service.engine.script = echo
        yield service


@pytest.fixture
def peer(service: Service) -> Iterator[Peer]:
    with Peer(service.endpoint) as peer:
        yield peer


@pytest.fixture
def governor(service: Service) -> FakeGovernor:
    governor = FakeGovernor()
    service.server.govern(governor)
    return governor


def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer is a user who is neither root nor the daemon's own."""
    monkeypatch.setattr(
        access.Peer, "from_address", classmethod(lambda cls, _address: cls(STRANGER, STRANGER, 1))
    )


def admitted(peer: Peer) -> set[str]:
    return {p for p in PRIORITIES if peer.ask(id=p, op="generate", prompt="x", priority=p)["ev"] == "done"}


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (None, set(PRIORITIES)),
        (NORMAL, set(PRIORITIES)),
        (THROTTLED, set(PRIORITIES)),
        (SHED, {"critical", "high"}),
        (CRITICAL, set()),
    ],
)
def test_the_state_admits_by_priority(
    governor: FakeGovernor, peer: Peer, decision: Decision | None, expected: set[str]
) -> None:
    governor.decision = decision
    assert admitted(peer) == expected


def test_without_a_governor_everything_is_admitted(peer: Peer) -> None:
    assert admitted(peer) == set(PRIORITIES)


def test_who_is_turned_away_hears_why_and_when_to_come_back(governor: FakeGovernor, peer: Peer) -> None:
    governor.decision = SHED
    reply = peer.ask(id=1, op="chat", messages=[{"role": "user", "content": "hi"}])
    assert (reply["code"], reply["field"], reply["retry_after_ms"]) == ("overloaded", None, 30_000)
    assert reply["message"].startswith("SHED, tj-thermal 95.0 °C")
    assert "high and critical" in reply["message"]
    governor.dwell_s = 0.0
    assert peer.ask(id=1, op="generate", prompt="x")["retry_after_ms"] == 1_000
    assert peer.ask(id=1, op="status")["requests"] == {"overloaded": 2}


def test_a_wish_is_capped_before_the_state_judges_it(tmp_path: Path) -> None:
    with Service(tmp_path, ServerConfig(max_priority="normal")) as service, Peer(service.endpoint) as peer:
        service.server.govern(FakeGovernor(SHED))
        assert peer.ask(id=1, op="generate", prompt="x", priority="critical")["code"] == "overloaded"


def test_what_was_admitted_before_goes_on(service: Service, governor: FakeGovernor, peer: Peer) -> None:
    service.engine.script = None
    peer.send(id=1, op="generate", prompt="x")
    service.engine.wait(lambda engine: len(engine.requests) == 1)
    governor.decision = CRITICAL
    assert peer.ask(id=2, op="generate", prompt="x")["code"] == "overloaded"
    service.engine.end(service.engine.requests[0].key, data=b"done")
    assert peer.receive()["text"] == "done"


def test_limit_reaches_the_governor(governor: FakeGovernor, peer: Peer) -> None:
    reply = peer.ask(id="l", op="limit", batch_cap=2)
    assert reply == {
        "ev": "limit", "v": 1, "id": "l", "state": "THROTTLED", "reason": "suspend",
        "detail": "suspended by uid 0", "batch_cap": 0, "duty": 0.0, "until": None,
    }  # fmt: skip
    assert peer.ask(id=1, op="limit", duty=0.25)["ev"] == "limit"
    assert peer.ask(id=1, op="limit", duty=1, batch_cap=0)["ev"] == "limit"
    asked = [(limit.by, limit.batch, limit.duty, limit.until) for limit in governor.limits]
    assert asked == [(OWN, 2, None, None), (OWN, None, 0.25, None), (OWN, 0, 1.0, None)]
    assert not governor.released


def test_suspend_is_a_limit_of_nothing(governor: FakeGovernor, peer: Peer) -> None:
    assert peer.ask(id=1, op="suspend")["ev"] == "suspend"
    (limit,) = governor.limits
    assert (limit.by, limit.until, limit.suspends) == (OWN, None, True)


def test_a_limit_with_a_time_to_live_says_when_it_ends(governor: FakeGovernor, peer: Peer) -> None:
    for op in ("suspend", "limit"):
        before, wall_before = time.monotonic(), time.time()
        reply = peer.ask(id=1, op=op, ttl_ms=60_000, **({"duty": 0.5} if op == "limit" else {}))
        after, wall_after = time.monotonic(), time.time()
        until = governor.limits[-1].until
        assert until is not None
        assert before + 60 <= until <= after + 60
        assert wall_before + 60 <= reply["until"] <= wall_after + 60


def test_resume_takes_back_one_s_own_limit_or_all(governor: FakeGovernor, peer: Peer) -> None:
    reply = peer.ask(id=1, op="resume")
    assert (reply["ev"], reply["state"], reply["until"]) == ("resume", "NORMAL", None)
    assert peer.ask(id=1, op="resume", all=True)["ev"] == "resume"
    assert governor.released == [OWN, None]


def test_a_limit_is_the_user_s_not_the_connection_s(service: Service, governor: FakeGovernor) -> None:
    for _ in range(2):
        with Peer(service.endpoint) as peer:
            assert peer.ask(id=1, op="suspend")["ev"] == "suspend"
    with Peer(service.endpoint) as peer:
        assert peer.ask(id=1, op="resume")["ev"] == "resume"
    assert {limit.by for limit in governor.limits} == set(governor.released) == {OWN}


@pytest.mark.parametrize("fields", [{"op": "limit", "duty": 0.5}, {"op": "suspend"}, {"op": "resume"}])
def test_others_need_may_limit(
    service: Service,
    governor: FakeGovernor,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    stranger(monkeypatch)
    with Peer(service.endpoint) as peer:
        reply = peer.ask(id=1, **fields)
        assert (reply["code"], reply["field"]) == ("forbidden", "op")
        assert "may_limit = true" in reply["message"]
        assert "server.rules" in reply["message"]
    assert not governor.limits
    assert not governor.released


def test_a_rule_may_give_may_limit_but_not_over_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger(monkeypatch)
    config = ServerConfig(rules=[AccessRule(uid=STRANGER, may_limit=True)])
    governor = FakeGovernor()
    with Service(tmp_path, config) as service, Peer(service.endpoint) as peer:
        service.server.govern(governor)
        assert peer.ask(id=1, op="suspend")["ev"] == "suspend"
        assert peer.ask(id=1, op="resume")["ev"] == "resume"
        reply = peer.ask(id=1, op="resume", all=True)
        assert (reply["code"], reply["field"]) == ("forbidden", "all")
    assert (governor.limits[0].by, governor.released) == (f"uid {STRANGER}", [f"uid {STRANGER}"])


def test_a_peer_that_the_kernel_does_not_name_may_not_limit() -> None:
    for rules in ([], [AccessRule()]):
        assert not access.Access(ServerConfig(rules=rules)).grant(access.Peer()).may_limit
    for uid in (0, os.geteuid()):
        grant = access.Access(ServerConfig(rules=[AccessRule()])).grant(access.Peer(uid, 1, 1))
        assert grant.may_limit
        assert grant.owns


def test_while_loading_there_is_nothing_to_limit(tmp_path: Path) -> None:
    with Service(tmp_path, ready=False) as service, Peer(service.endpoint) as peer:
        for op in ("suspend", "resume"):
            reply = peer.ask(id=1, op=op)
            assert (reply["code"], reply["retry_after_ms"]) == ("loading", 500)
        status = peer.ask(id=1, op="status")
        assert (status["state"], status["reason"], status["duty"], status["transitions"]) == (
            None, None, 0.0, {},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"op": "limit"}, "batch_cap"),
        ({"op": "limit", "ttl_ms": 5}, "batch_cap"),
        ({"op": "limit", "batch_cap": -1}, "batch_cap"),
        ({"op": "limit", "batch_cap": 1.5}, "batch_cap"),
        ({"op": "limit", "duty": 1.5}, "duty"),
        ({"op": "limit", "duty": -0.5}, "duty"),
        ({"op": "limit", "duty": float("nan")}, "duty"),
        ({"op": "limit", "duty": 0.5, "ttl_ms": 0}, "ttl_ms"),
        ({"op": "suspend", "ttl_ms": 10**9}, "ttl_ms"),
        ({"op": "suspend", "duty": 0.5}, "duty"),
        ({"op": "resume", "ttl_ms": 5}, "ttl_ms"),
        ({"op": "resume", "all": "yes"}, "all"),
    ],
)
def test_what_makes_no_sense_names_its_field(
    governor: FakeGovernor, peer: Peer, fields: dict[str, Any], field: str
) -> None:
    reply = peer.ask(id=1, **fields)
    assert (reply["code"], reply["field"]) == ("bad_request", field)
    assert not governor.limits


def test_status_tells_what_the_board_says(governor: FakeGovernor, peer: Peer) -> None:
    governor.decision = THROTTLED
    governor.readings = Readings(
        at=0.0,
        zones=(
            Zone("cpu-thermal", 90.0, passive=104.0),
            Zone("tj-thermal", 88.0, passive=99.0),
            Zone("housing", 95.0),
            Zone("gpu-thermal", None, passive=60.0),
        ),
        rails={"VDD_IN": 12.5, "VDD_CPU": 4.0},
        memory=Memory(available=1 << 30),
    )
    status = peer.ask(id=1, op="status")
    told = {name: status[name] for name in (
        "state", "reason", "detail", "duty", "transitions", "hottest_zone", "hottest_c", "watts",
        "available_bytes",
    )}  # fmt: skip
    assert told == {
        "state": "THROTTLED", "reason": "heat", "detail": THROTTLED.detail, "duty": 0.5,
        "transitions": {"NORMAL": 1, "SHED": 2}, "hottest_zone": "tj-thermal", "hottest_c": 88.0,
        "watts": 12.5, "available_bytes": 1 << 30,
    }  # fmt: skip


def test_where_no_zone_has_a_trip_the_warmest_is_told(governor: FakeGovernor, peer: Peer) -> None:
    governor.readings = Readings(at=0.0, zones=(Zone("acpitz", 40.0), Zone("pch", 55.0), Zone("x", None)))
    status = peer.ask(id=1, op="status")
    assert (status["hottest_zone"], status["hottest_c"], status["watts"]) == ("pch", 55.0, None)
    governor.readings = Readings(at=0.0, zones=(Zone("x", None),))
    status = peer.ask(id=1, op="status")
    assert (status["hottest_zone"], status["hottest_c"], status["available_bytes"]) == (None, None, None)


class Board:
    """The real governor over readings that a test sets."""

    def __init__(self, service: Service, config: GovernorConfig = GovernorConfig()) -> None:  # noqa: B008
        self.readings: Readings | None = None
        self.governor = Governor(
            Settings(SLOTS, config),
            lambda: self.readings,
            apply=lambda decision: service.engine.limit(decision.batch_cap, decision.duty),
            tell=service.server.publish_transition,
        )
        service.server.govern(self.governor)

    def read(self, celsius: float) -> Decision:
        """A new sweep, in which tj, whose trip is at 99 °C, has this temperature."""
        self.readings = Readings(
            time.monotonic(), (Zone("tj-thermal", celsius, passive=99.0),), memory=Memory(available=1 << 32)
        )
        return self.governor.tick()


def test_suspend_has_reached_the_engine_when_it_is_answered(service: Service, peer: Peer) -> None:
    board = Board(service)
    board.read(50.0)
    assert service.engine.limits == [(SLOTS, 1.0)]
    reply = peer.ask(id=1, op="suspend")
    assert service.engine.limits[-1] == (0, 0.0)
    assert (reply["state"], reply["reason"], reply["batch_cap"], reply["duty"]) == (
        "THROTTLED", "suspend", 0, 0.0,
    )  # fmt: skip
    assert admitted(peer) == set(PRIORITIES)  # who asks meanwhile waits in the queue
    assert peer.ask(id=1, op="status")["batch_cap"] == 0
    reply = peer.ask(id=1, op="resume")
    assert service.engine.limits[-1] == (SLOTS, 1.0)
    assert (reply["batch_cap"], reply["duty"]) == (SLOTS, 1.0)
    assert reply["detail"].startswith("recovering: suspended by")


def test_a_new_limit_replaces_the_old_one_whole(service: Service, peer: Peer) -> None:
    Board(service).read(50.0)
    assert peer.ask(id=1, op="limit", batch_cap=2, duty=0.5)["batch_cap"] == 2
    reply = peer.ask(id=1, op="limit", duty=0.75)
    assert (reply["batch_cap"], reply["duty"]) == (SLOTS, 0.75)
    assert reply["reason"] == "limit"
    assert service.engine.limits[-1] == (SLOTS, 0.75)


def test_a_limit_outlives_its_connection_and_ends_with_its_time(service: Service) -> None:
    board = Board(service)
    board.read(50.0)
    with Peer(service.endpoint) as peer:
        peer.ask(id=1, op="suspend")
    with Peer(service.endpoint) as peer:
        assert peer.silent()
        board.read(50.0)
        assert service.engine.limits[-1] == (0, 0.0)
        peer.ask(id=1, op="suspend", ttl_ms=1)
        time.sleep(0.002)
        board.read(50.0)
        assert service.engine.limits[-1] == (SLOTS, 1.0)


def test_heat_sheds_and_then_stops(service: Service, peer: Peer) -> None:
    board = Board(service)
    board.read(95.0)
    assert admitted(peer) == {"critical", "high"}
    board.read(100.0)
    assert admitted(peer) == set()
    status = peer.ask(id=1, op="status")
    assert (status["state"], status["reason"], status["hottest_c"]) == ("CRITICAL", "heat", 100.0)
    assert status["transitions"] == {"SHED": 1, "CRITICAL": 1}
    assert status["batch_cap"] == 0

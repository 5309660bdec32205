"""Peers and rules."""

from __future__ import annotations

import os
import pwd

import pytest

from edgellm.errors import Overloaded
from edgellm.scheduler.request import Priority
from edgellm.server.access import Access, Peer
from edgellm.server_config import AccessRule, ServerConfig


def test_a_peer_is_read_from_libzmq_s_words() -> None:
    assert Peer.from_address("localhost:1000:100:4321") == Peer(1000, 100, 4321)
    assert Peer.from_address("127.0.0.1") == Peer()
    assert Peer.from_address("") == Peer()


def test_the_first_rule_that_fits_counts() -> None:
    rules = [
        AccessRule(uid=1000, gid=5, max_priority="critical"),
        AccessRule(uid=1000, max_priority="background"),
        AccessRule(gid=7, max_priority="normal"),
    ]
    access = Access(ServerConfig(rules=rules, max_priority="high"))
    assert access.grant(Peer(1000, 5, 1)).ceiling is Priority.CRITICAL
    assert access.grant(Peer(1000, 6, 1)).ceiling is Priority.BACKGROUND
    assert access.grant(Peer(1001, 7, 1)).ceiling is Priority.NORMAL
    assert access.grant(Peer(1001, 8, 1)).ceiling is Priority.HIGH
    assert access.grant(Peer()).ceiling is Priority.HIGH


def test_membership_counts_as_much_as_the_primary_group() -> None:
    user = next(user for user in pwd.getpwall() if len(os.getgrouplist(user.pw_name, user.pw_gid)) >= 1)
    for group in os.getgrouplist(user.pw_name, user.pw_gid):
        access = Access(ServerConfig(rules=[AccessRule(gid=group, max_priority="critical")]))
        assert access.grant(Peer(user.pw_uid, user.pw_gid, 1)).ceiling is Priority.CRITICAL


@pytest.mark.parametrize(
    ("ceiling", "wish", "given"),
    [
        ("high", "critical", Priority.HIGH),
        ("high", "normal", Priority.NORMAL),
        ("background", "critical", Priority.BACKGROUND),
        ("critical", "critical", Priority.CRITICAL),
    ],
)
def test_a_wish_is_lowered_never_raised(ceiling: str, wish: str, given: Priority) -> None:
    access = Access(ServerConfig(max_priority=ceiling))  # type: ignore[arg-type]
    assert access.grant(Peer()).cap(wish) is given


def test_a_rule_s_quota_is_given_back() -> None:
    access = Access(ServerConfig(rules=[AccessRule(max_requests=1)]))
    grant = access.grant(Peer(1, 1, 1))
    access.check(grant, 0, 10)
    access.opened(grant)
    with pytest.raises(Overloaded, match=r"rules\[0\]"):
        access.check(grant, 0, 10)
    access.closed(grant)
    access.check(grant, 0, 10)

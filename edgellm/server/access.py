"""Who a peer is, by the kernel's word or by its key, and what the configuration lets it do."""

from __future__ import annotations

import os
import pwd
from collections import Counter
from dataclasses import dataclass

from edgellm.errors import Overloaded
from edgellm.scheduler.request import Priority
from edgellm.server_config import AccessRule, ServerConfig


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection.

    Attributes:
        uid, gid, pid: of the process, over ipc (SO_PEERCRED); else −1.
        key: the name of its key, over tcp; else None.
        host: its address, over tcp.
    """

    uid: int = -1
    gid: int = -1
    pid: int = -1
    key: str | None = None
    host: str = ""

    @property
    def party(self) -> str:
        """Whom limits belong to and refusals name: a user, or the holder of a key."""
        return f"uid {self.uid}" if self.key is None else f"key {self.key}"

    def __str__(self) -> str:
        return f"uid={self.uid} pid={self.pid}" if self.key is None else f"key={self.key} host={self.host}"

    @classmethod
    def from_address(cls, address: str) -> Peer:
        """Read libzmq's `Peer-Address` of an ipc connection, `localhost:UID:GID:PID`."""
        try:
            uid, gid, pid = (int(part) for part in address.split(":")[-3:])
        except ValueError:
            return cls()
        return cls(uid, gid, pid)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a connection may do.

    Attributes:
        ceiling: the best priority that it gets.
        rule: index of the rule that fits it, or None.
        max_requests: open requests of all under that rule, or None.
        may_limit: whether it may limit and suspend the model.
        owns: whether it is root or the daemon's own user.
    """

    ceiling: Priority
    rule: int | None = None
    max_requests: int | None = None
    may_limit: bool = False
    owns: bool = False

    def cap(self, wish: str) -> Priority:
        """The priority that a request gets which wishes for `wish`."""
        return max(self.ceiling, Priority[wish.upper()])


class Access:
    """The rules, and how many requests are open under each."""

    def __init__(self, config: ServerConfig) -> None:
        self._rules = config.rules
        self._by_group = any(rule.gid is not None for rule in config.rules)
        self._max_priority = Priority[config.max_priority.upper()]
        self._per_client = config.max_requests_per_client
        self._open: Counter[int] = Counter()

    def grant(self, peer: Peer) -> Grant:
        """What the rules give a peer."""
        owns = peer.uid in (0, os.geteuid())
        groups = _groups(peer) if self._by_group else frozenset[int]()
        for index, rule in enumerate(self._rules):
            if _fits(rule, peer, groups):
                ceiling = Priority[rule.max_priority.upper()]
                return Grant(ceiling, index, rule.max_requests, owns or rule.may_limit, owns)
        return Grant(self._max_priority, may_limit=owns, owns=owns)

    def check(self, grant: Grant, open_requests: int, retry_after_ms: int) -> None:
        """Refuse a request beyond the connection's or the rule's quota.

        Raises:
            Overloaded: naming the quota that is used up.
        """
        if open_requests >= self._per_client:
            raise Overloaded(
                f"this connection has {open_requests} open requests, as many as it may"
                " (server.max_requests_per_client)",
                retry_after_ms=retry_after_ms,
            )
        if grant.rule is not None and grant.max_requests is not None:
            used = self._open[grant.rule]
            if used >= grant.max_requests:
                raise Overloaded(
                    f"the processes under this access rule have {used} open requests, as many as they may"
                    f" (server.rules[{grant.rule}].max_requests)",
                    retry_after_ms=retry_after_ms,
                )

    def opened(self, grant: Grant) -> None:
        """Count a request in."""
        if grant.rule is not None:
            self._open[grant.rule] += 1

    def closed(self, grant: Grant) -> None:
        """Count a request out."""
        if grant.rule is not None:
            self._open[grant.rule] -= 1


def _fits(rule: AccessRule, peer: Peer, groups: frozenset[int]) -> bool:
    return (
        (rule.uid is None or rule.uid == peer.uid)
        and (rule.gid is None or rule.gid in groups)
        and (rule.key is None or rule.key == peer.key)
    )


def _groups(peer: Peer) -> frozenset[int]:
    """The peer's primary group and those its user is a member of."""
    try:
        name = pwd.getpwuid(peer.uid).pw_name
    except (KeyError, OverflowError):
        return frozenset((peer.gid,))
    return frozenset((peer.gid, *os.getgrouplist(name, peer.gid)))

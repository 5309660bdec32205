"""The governor as clients meet it: whom it turns away, and who may limit what runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgellm.errors import Forbidden, Loading, Overloaded
from edgellm.governor import causes
from edgellm.governor.causes import State
from edgellm.governor.governor import Transition
from edgellm.governor.policy import Decision
from edgellm.protocol import (
    Limit,
    LimitReply,
    Resume,
    ResumeReply,
    StateEvent,
    StateName,
    Suspend,
    SuspendReply,
)
from edgellm.scheduler.request import Priority
from edgellm.server.access import Grant, Peer
from edgellm.server.served import GovernorHandle

LEAST_RETRY_MS = 1_000
LOADING_RETRY_MS = 500

STATE_NAMES: dict[State, StateName] = {
    State.NORMAL: "NORMAL",
    State.THROTTLED: "THROTTLED",
    State.SHED: "SHED",
    State.CRITICAL: "CRITICAL",
}


class Gate:
    """Admission by the governor's state, and the ops limit, suspend and resume.

    A limit belongs to a uid or a key, not to a connection: whoever crashed while perception was busy must not
    thereby set the model free, and must be able to take it back after coming up again.

    Args:
        clock: seconds, the governor's.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.governor: GovernorHandle | None = None
        self._clock = clock

    @property
    def decision(self) -> Decision | None:
        """The governor's last decision; None before there is one."""
        return None if self.governor is None else self.governor.decision

    def check(self, priority: Priority) -> None:
        """Refuse a request that the state does not admit.

        Raises:
            Overloaded: naming state and cause; to be tried again when the state could be over.
        """
        decision = self.decision
        if self.governor is None or decision is None or decision.admits(priority):
            return
        admitted = "only high and critical requests are" if decision.state is State.SHED else "nothing is"
        raise Overloaded(
            f"{decision.state.name}, {decision.detail}: {admitted} admitted",
            retry_after_ms=max(LEAST_RETRY_MS, round(1000 * self.governor.dwell_s)),
        )

    def take(self, peer: Peer, grant: Grant, request: Limit | Suspend | Resume) -> LimitReply:
        """Limit, suspend or resume. It is in effect when this returns: for the next step.

        Raises:
            Forbidden: the peer may not do this; names the knob.
            Loading: nothing is governed yet.
        """
        _authorise(peer, grant, request)
        if self.governor is None:
            raise Loading("the engine is loading; there is nothing to limit", retry_after_ms=LOADING_RETRY_MS)
        by = peer.party
        match request:
            case Resume():
                decision = self.governor.release(None if request.all else by)
                return _reply(ResumeReply, request.id, decision, None)
            case Suspend():
                limit = causes.Limit(by, batch=0, duty=0.0, until=self._until(request.ttl_ms))
                decision = self.governor.limit(limit)
                return _reply(SuspendReply, request.id, decision, request.ttl_ms)
            case Limit():
                until = self._until(request.ttl_ms)
                limit = causes.Limit(by, batch=request.batch_cap, duty=request.duty, until=until)
                return _reply(LimitReply, request.id, self.governor.limit(limit), request.ttl_ms)

    def _until(self, ttl_ms: int | None) -> float | None:
        return None if ttl_ms is None else self._clock() + ttl_ms / 1000


def state_event(transition: Transition) -> StateEvent:
    """A transition that happens now, as it is published."""
    after = transition.after
    return StateEvent(
        id=None,
        state=STATE_NAMES[after.state],
        previous=STATE_NAMES[transition.before.state],
        reason=after.reason,
        detail=after.detail,
        batch_cap=after.batch_cap,
        duty=after.duty,
        at=time.time(),
    )


def _authorise(peer: Peer, grant: Grant, request: Limit | Suspend | Resume) -> None:
    if not grant.may_limit:
        raise Forbidden(
            f"{peer.party} may not limit what runs: set may_limit = true in a rule for it (server.rules)",
            field="op",
        )
    if isinstance(request, Resume) and request.all and not grant.owns:
        raise Forbidden(
            f"only root and the daemon's own user may take back the limits of others: {peer.party} may"
            " resume without all",
            field="all",
        )


def _reply(kind: type[LimitReply], id_: str | int, decision: Decision, ttl_ms: int | None) -> LimitReply:
    return kind(
        id=id_,
        state=STATE_NAMES[decision.state],
        reason=decision.reason,
        detail=decision.detail,
        batch_cap=decision.batch_cap,
        duty=decision.duty,
        until=None if ttl_ms is None else time.time() + ttl_ms / 1000,
    )

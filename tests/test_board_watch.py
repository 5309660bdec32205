"""Who hears of the governor's transitions, and how loudly."""

from __future__ import annotations

import logging
from typing import cast

import pytest
from fake_governor import CRITICAL, NORMAL, SHED, SUSPENDED, THROTTLED

from edgellm.board_watch import BoardWatch
from edgellm.config import load_config
from edgellm.engine import Engine
from edgellm.governor.governor import Transition
from edgellm.governor.policy import Decision
from edgellm.server import Server
from edgellm.systemd import Notifier


class Listener:
    """Stands for the engine and the server."""

    def __init__(self) -> None:
        self.published: list[Transition] = []

    def publish_transition(self, transition: Transition) -> None:
        self.published.append(transition)


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        (NORMAL, THROTTLED, logging.WARNING),
        (NORMAL, SUSPENDED, logging.WARNING),
        (THROTTLED, CRITICAL, logging.WARNING),
        (THROTTLED, SUSPENDED, logging.INFO),
        (SUSPENDED, THROTTLED, logging.INFO),
        (CRITICAL, SHED, logging.INFO),
        (THROTTLED, NORMAL, logging.INFO),
    ],
)
def test_only_a_turn_for_the_worse_is_a_warning(
    before: Decision, after: Decision, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()
    watch = BoardWatch(
        load_config(environment={}, flags={"governor.enabled": False}),
        slots=4,
        engine=cast(Engine, listener),
        server=cast(Server, listener),
        notifier=Notifier(environment={}),
    )
    transition = Transition(before, after, at=0.0)
    # The status line asks the engine; nobody listens to it here.
    watch.status = lambda: ""  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO, logger="edgellm.board_watch"):
        watch._tell(transition)
    (record,) = caplog.records
    assert record.levelno == level
    assert f"{before.state.name} → {after.state.name}" in record.getMessage()
    assert listener.published == [transition]

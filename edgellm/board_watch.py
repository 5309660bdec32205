"""The board watched while serving: sensor thread → governor → engine and clients, and who hears of it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from edgellm.config import Config
from edgellm.engine import Engine
from edgellm.governor.causes import Settings
from edgellm.governor.governor import Governor, Transition
from edgellm.governor.platform import identify_board
from edgellm.governor.policy import Decision
from edgellm.governor.sensor_thread import LateSensors, SensorThread
from edgellm.governor.sensors import Readings
from edgellm.server import Server
from edgellm.systemd import Notifier

log = logging.getLogger(__name__)

STATISTICS_S = 1.0
"""Between two statistics on the PUB socket."""


class BoardWatch:
    """Owns the governor and its sensor thread; the main thread calls `tick`.

    Every transition is a line in the journal, a warning if the state gets worse; an event on the PUB socket;
    and systemd's STATUS.
    """

    def __init__(
        self, config: Config, *, slots: int, engine: Engine, server: Server, notifier: Notifier
    ) -> None:
        self._slots = slots
        self._engine = engine
        self._server = server
        self._notifier = notifier
        root = Path(config.sensors.root)
        self._identified = identify_board(root)
        self._sensors: SensorThread | None = None
        if config.governor.enabled:
            reader = LateSensors(root, self._identified, config.sensors.rediscover_s)
            self._sensors = SensorThread(
                reader,
                interval_s=config.sensors.interval_s,
                on_error=lambda error: log.error("reading the sensors failed: %s", error),
            )
        self.governor = Governor(self._settings(config), self._latest, apply=self._apply, tell=self._tell)
        self._next_statistics = 0.0

    def start(self) -> None:
        """Start reading, and decide for the first time."""
        log.info("board: %s, %s", self._identified.name, self._identified.software)
        if self._sensors is not None:
            self._sensors.start()
            self._sensors.wait_first(timeout_s=1.0)
        decision = self.governor.tick()
        log.info(
            "governor: %s: %s", decision.state.name, decision.detail, extra={"STATE": decision.state.name}
        )
        self._server.govern(self.governor)

    def tick(self) -> None:
        """Decide by the newest readings, and publish statistics when it is time."""
        self.governor.tick()
        now = time.monotonic()
        if now >= self._next_statistics:
            self._next_statistics = now + STATISTICS_S
            self._server.publish_statistics()
            self._notifier.status(self.status())

    def reconfigure(self, config: Config) -> None:
        """Take reloaded thresholds and limits."""
        self.governor.reconfigure(self._settings(config))

    def status(self) -> str:
        """One line for `systemctl status`."""
        decision = self.governor.decision
        stats = self._engine.snapshot()
        draining = "draining, " if self._server.draining else ""
        load = f"{draining}{stats.running} running, {stats.queued} queued"
        if decision is None:
            return load
        why = "" if decision.reason == "none" else f" ({decision.detail})"
        return f"{decision.state.name}{why}: {load}; cap {decision.batch_cap}, duty {decision.duty:.2f}"

    def stop(self) -> None:
        """End the sensor thread; one that hangs in a read is left behind."""
        if self._sensors is not None:
            self._sensors.stop()

    def _settings(self, config: Config) -> Settings:
        return Settings.of(config.governor, config.limits, config.sensors, self._identified, self._slots)

    def _latest(self) -> Readings | None:
        return None if self._sensors is None else self._sensors.latest

    def _apply(self, decision: Decision) -> None:
        self._engine.limit(decision.batch_cap, decision.duty)

    def _tell(self, transition: Transition) -> None:
        after = transition.after
        log.log(
            # Going back, or a new reason or cap in the same state, is nothing that went wrong.
            logging.WARNING if after.state > transition.before.state else logging.INFO,
            "governor: %s → %s: %s: %s; cap %d, duty %.2f",
            transition.before.state.name,
            after.state.name,
            after.reason,
            after.detail,
            after.batch_cap,
            after.duty,
            extra={"STATE": after.state.name},
        )
        self._server.publish_transition(transition)
        self._notifier.status(self.status())

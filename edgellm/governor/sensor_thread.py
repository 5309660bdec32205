"""A thread of its own for sensor reads: one can hang in firmware, and nothing else may wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from edgellm.governor.platform import Board
from edgellm.governor.sensors import Readings, Sensors


class Reader(Protocol):
    """Whatever makes a sweep: `Sensors`, or a test's own."""

    def read(self) -> Readings:
        """One sweep; may take any time."""
        ...


class LateSensors:
    """Sensors that are discovered on the thread that reads them: discovery reads them too, and may hang.

    Args:
        root, board, rediscover_s: as `Sensors` takes them.
    """

    def __init__(self, root: Path, board: Board, rediscover_s: float = 60.0) -> None:
        self._root = root
        self._board = board
        self._rediscover_s = rediscover_s
        self._sensors: Sensors | None = None

    def read(self) -> Readings:
        """One sweep, after discovery the first time."""
        if self._sensors is None:
            self._sensors = Sensors(self._root, board=self._board, rediscover_s=self._rediscover_s)
        return self._sensors.read()


class SensorThread:
    """Sweeps once per interval and keeps the latest complete Readings.

    `latest` never blocks. While a read hangs, the latest Readings stay as they are and their `at` ages: the
    policy takes readings that are too old for unknown.

    Args:
        reader: its `read` runs on this thread only. An exception in it counts as a sweep that gave nothing.
        interval_s: from the start of a sweep to the start of the next.
        on_error: called on this thread with an exception that `read` raised.
    """

    def __init__(
        self, reader: Reader, *, interval_s: float = 1.0, on_error: Callable[[Exception], None] | None = None
    ) -> None:
        self._reader = reader
        self._interval_s = interval_s
        self._on_error = on_error
        self._latest: Readings | None = None
        self._swept = threading.Event()
        self._stop = threading.Event()
        # A daemon thread: one that hangs in firmware must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="edgellm-sensors", daemon=True)

    @property
    def latest(self) -> Readings | None:
        """The latest complete sweep, or None before the first."""
        return self._latest

    def start(self) -> None:
        """Begin sweeping."""
        self._thread.start()

    def wait_first(self, timeout_s: float) -> bool:
        """Wait for the first sweep; False if there was none in time."""
        return self._swept.wait(timeout_s)

    def stop(self, timeout_s: float = 1.0) -> bool:
        """Ask the thread to end; True if it did in time. One that hangs is left behind."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._latest = self._reader.read()
                self._swept.set()
            except Exception as error:
                if self._on_error is not None:
                    self._on_error(error)
            self._stop.wait(max(0.0, self._interval_s - (time.monotonic() - began)))

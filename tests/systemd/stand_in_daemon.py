"""A stand-in for the daemon in tests: two loops with beats, signals, Notifier and Watchdog, and nothing else.

Faults, by signal: SIGUSR1 hangs the "engine" loop. SIGUSR2 hangs the "I/O" loop.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time

from edgellm.journal import set_up_logging
from edgellm.systemd import Notifier, Watchdog

PERIOD_S = 0.02


class Loop:
    def __init__(self) -> None:
        self.beat = 0
        self.hang = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self.hang.is_set():
            self.beat += 1
            time.sleep(PERIOD_S)


def main() -> int:
    set_up_logging("info")
    wake, stop, reload = threading.Event(), threading.Event(), threading.Event()

    def on(number: int, *events: threading.Event) -> None:
        def handle(*_: object) -> None:
            for event in events:
                event.set()

        signal.signal(number, handle)

    on(signal.SIGTERM, stop, wake)
    on(signal.SIGHUP, reload, wake)
    engine, io = Loop(), Loop()
    on(signal.SIGUSR1, engine.hang)
    on(signal.SIGUSR2, io.hang)
    notifier = Notifier()
    notifier.extend_timeout(5.0, "loading: weights, 50 %")
    watchdog = Watchdog(notifier, {"engine": lambda: engine.beat, "I/O": lambda: io.beat})
    notifier.ready("serving")
    logging.info("ready", extra={"STATE": "NORMAL"})
    while not stop.is_set():
        wake.wait(min(0.05, watchdog.interval_s or 1.0))
        wake.clear()
        if reload.is_set():
            reload.clear()
            notifier.reloading()
            notifier.ready("serving, reloaded")
        watchdog.look()
    notifier.stopping("draining")
    return 0


if __name__ == "__main__":
    sys.exit(main())

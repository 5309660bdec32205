"""A read that hangs, fails or is slow disturbs nobody but its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgellm.governor.sensor_thread import SensorThread
from edgellm.governor.sensors import Readings


class Scripted:
    """Reads by a list of actions; then repeats the last."""

    def __init__(self, *actions: Callable[[], Readings]) -> None:
        self._actions = list(actions)
        self.calls = 0

    def read(self) -> Readings:
        action = self._actions[min(self.calls, len(self._actions) - 1)]
        self.calls += 1
        return action()


def test_a_hanging_read_leaves_the_latest_readings_and_does_not_keep_the_process() -> None:
    hangs, release = threading.Event(), threading.Event()

    def hang() -> Readings:
        hangs.set()
        release.wait()
        return Readings(at=2.0)

    thread = SensorThread(Scripted(lambda: Readings(at=1.0), hang), interval_s=0.001)
    thread.start()
    assert hangs.wait(5)
    assert thread.latest == Readings(at=1.0)  # and its age tells
    assert thread.stop(timeout_s=0.01) is False
    assert thread._thread.daemon
    release.set()
    assert thread.stop(timeout_s=5) is True


def test_an_exception_is_reported_and_the_next_sweep_goes_on() -> None:
    errors: list[Exception] = []
    swept = threading.Event()

    def fail() -> Readings:
        raise ValueError("a driver's whim")

    def work() -> Readings:
        swept.set()
        return Readings(at=7.0)

    thread = SensorThread(Scripted(fail, work), interval_s=0.001, on_error=errors.append)
    thread.start()
    assert swept.wait(5)
    assert thread.wait_first(5)
    assert thread.latest == Readings(at=7.0)
    assert [str(error) for error in errors] == ["a driver's whim"]
    assert thread.stop(timeout_s=5)


def test_before_the_first_sweep_there_is_nothing() -> None:
    thread = SensorThread(Scripted(lambda: Readings(at=1.0)))
    assert thread.latest is None
    assert thread.wait_first(0) is False
    assert thread.stop() is True

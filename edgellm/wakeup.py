"""What the main thread sleeps on: a pipe that signals and other threads write to."""

from __future__ import annotations

import contextlib
import os
import select
import signal


class Wakeup:
    """A doorbell. Ringing never blocks, so a signal handler may do it.

    threading.Event would not do: its lock may be held by the very thread that a handler interrupts.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ring_on_signals(self) -> None:
        """Let every signal that has a Python handler ring. Main thread only."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def ring(self) -> None:
        """End the current or the next wait. From any thread."""
        with contextlib.suppress(BlockingIOError):  # a full pipe has rung already
            os.write(self._write, b"\0")

    def wait(self, timeout: float) -> bool:
        """Sleep until it rings, or for `timeout` seconds; whether it rang."""
        ready, _, _ = select.select([self._read], [], [], max(0.0, timeout))
        if not ready:
            return False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass
        return True

    def close(self) -> None:
        """Give the pipe back."""
        if signal.set_wakeup_fd(-1) not in (-1, self._write):
            raise AssertionError("another wakeup descriptor was set meanwhile")
        os.close(self._read)
        os.close(self._write)

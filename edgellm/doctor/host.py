"""The machine that is examined: a root directory, and whether it is the one that runs now."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edgellm.config import Config, load_config
from edgellm.errors import ConfigError
from edgellm.governor.platform import Board, identify_board, read_text
from edgellm.governor.sensor_thread import LateSensors, Reader, SensorThread
from edgellm.governor.sensors import Readings, read_memory

CONFIGURATION = "etc/edgellm/edgellm.toml"

COMMAND_TIMEOUT_S = 5.0
SENSORS_TIMEOUT_S = 5.0
"""A sweep takes some 0.1 s, and a first one some more; a read that hangs in firmware takes for ever."""


def run_command(words: Sequence[str]) -> str | None:
    """A command's standard output whatever its exit code, or None if it cannot be started or hangs."""
    try:
        done = subprocess.run(
            list(words), check=False, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout


class Host:
    """What the checks look at. Files are read below `root`; commands are asked only on the live system.

    Args:
        root: where /sys, /proc, /etc … lie.
        run: runs a command and gives its output or None; None: it is another system than this one.
        sensors: what is read instead of the board's own sensors, for tests.
        sensors_timeout_s: when sensors that have not answered are given up.

    Attributes:
        board: which board it is.
        readings: one sweep of its sensors; if they did not answer, only what the kernel itself knows.
        sensors_answered: whether they did, in time.
        configured: whether the service has a configuration file, as far as this user can see.
        config_denied: the user may not read it.
        config_error: what is wrong with it.
        config: the service's configuration; the defaults where there is none that can be read and is valid.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        run: Callable[[Sequence[str]], str | None] | None = None,
        *,
        sensors: Reader | None = None,
        sensors_timeout_s: float = SENSORS_TIMEOUT_S,
    ) -> None:
        self.root = root
        self.run = run
        self.board: Board = identify_board(root)
        readings = _sweep(sensors or LateSensors(root, self.board), sensors_timeout_s)
        self.sensors_answered = readings is not None
        self.readings = readings or Readings(at=time.monotonic(), memory=read_memory(root))
        self.configured = True
        self.config_denied = False
        self.config_error: ConfigError | None = None
        self.config = self._config()

    @property
    def live(self) -> bool:
        """Whether it is the machine that we run on: commands can be asked and libraries loaded."""
        return self.run is not None

    @property
    def running(self) -> bool:
        """Whether it runs: live, or a running system's root with its /proc, as a container may see it."""
        return self.live or bool(self.glob("proc/*"))

    @property
    def tegra(self) -> bool:
        """Whether it is an NVIDIA SoC, with one memory for CPU and GPU."""
        return self.board.expects.thermal

    def path(self, name: str) -> Path:
        """A file of the machine by its absolute or relative name."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """A small file's content, stripped, or None if it cannot be read."""
        content = read_text(self.path(name))
        return None if content is None else content.strip()

    def exists(self, name: str) -> bool:
        """Whether there is such a file; what this user may not look for is not there."""
        try:
            return self.path(name).exists()
        except OSError:
            return False

    def _config(self) -> Config:
        file = self.path(CONFIGURATION)
        try:
            # Opened, not asked for: only the service's group may enter its directory.
            os.close(os.open(file, os.O_RDONLY))
            # The environment of whoever runs the doctor is not the service's.
            return load_config(file, environment={})
        except (FileNotFoundError, NotADirectoryError):
            self.configured = False
        except PermissionError:
            self.config_denied = True
        except OSError as error:
            self.config_error = ConfigError(f"{file}: cannot be read: {error.strerror}")
        except ConfigError as error:
            self.config_error = error
        return Config()

    def glob(self, pattern: str) -> list[Path]:
        """Files of the machine, sorted; what cannot be listed is not there."""
        try:
            return sorted(self.root.glob(pattern))
        except OSError:
            return []


def _sweep(reader: Reader, timeout_s: float) -> Readings | None:
    """One sweep on a thread of its own; None if it did not come in time."""
    thread = SensorThread(reader)
    thread.start()
    thread.wait_first(timeout_s)
    thread.stop(timeout_s=0.0)
    return thread.latest

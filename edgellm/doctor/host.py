"""The machine that is examined: a root directory, and whether it is the one that runs now."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from edgellm.config import Config, load_config
from edgellm.errors import ConfigError
from edgellm.governor.platform import Board, identify_board, read_text
from edgellm.governor.sensors import Readings, Sensors

CONFIGURATION = "etc/edgellm/edgellm.toml"

COMMAND_TIMEOUT_S = 5.0


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
        run: runs a command and gives its output or None; None: the machine does not run, it is an image.
    """

    def __init__(
        self, root: Path = Path("/"), run: Callable[[Sequence[str]], str | None] | None = None
    ) -> None:
        self.root = root
        self.run = run
        self.board: Board = identify_board(root)
        self.readings: Readings = Sensors(root, board=self.board).read()
        self.config_error: ConfigError | None = None
        self.config = self._config()

    @property
    def configured(self) -> bool:
        """Whether the service has a configuration file."""
        return self.path(CONFIGURATION).exists()

    @property
    def live(self) -> bool:
        """Whether this machine runs now: commands can be asked and libraries loaded."""
        return self.run is not None

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

    def _config(self) -> Config:
        """The service's configuration; the defaults where there is none, or none that is valid."""
        if self.configured:
            try:
                # The environment of whoever runs the doctor is not the service's.
                return load_config(self.path(CONFIGURATION), environment={})
            except ConfigError as error:
                self.config_error = error
        return Config()

    def glob(self, pattern: str) -> list[Path]:
        """Files of the machine, sorted; what cannot be listed is not there."""
        try:
            return sorted(self.root.glob(pattern))
        except OSError:
            return []

"""A daemon of its own for a measurement: started on a socket in a temporary directory, and told to end."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from edgellm.bench.prompts import PASSAGE, Prompts
from edgellm.client import Client
from edgellm.errors import ExecutorFault

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0

_READY: Final = re.compile(r"READY in (?P<total>[\d.]+) s \((?P<phases>[^)]*)\)")
_MEMORY: Final = re.compile(r"memory: (?P<part>\w+) (?P<size>[\d.]+) MiB, planned")


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon that is READY: what it said on the way there."""

    process: psutil.Process
    endpoint: str
    ready_s: float
    phases: dict[str, float]
    memory_mb: dict[str, float]

    def prompts(self, length: int) -> Prompts:
        """Prompts of so many tokens, in its model's."""
        with Client(self.endpoint) as client:
            return Prompts(client.tokenize(PASSAGE), length=length, seed=0)


@contextlib.contextmanager
def running_daemon(engine: Path, *flags: str, start_timeout_s: float = START_TIMEOUT_S) -> Iterator[Daemon]:
    """A daemon on a socket of its own; it must end with 0 when told to.

    Raises:
        ExecutorFault: it does not become ready, or ends with something else; with what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="edgellm-measure-") as folder:
        endpoint = f"ipc://{folder}/edgellm.sock"
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "edgellm", "serve", str(engine), "--endpoint", endpoint]
        command += ["--log-level", "debug", *flags]  # debug: what each part takes
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr)
        try:
            yield _wait_ready(process, endpoint, log, start_timeout_s)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        if code != 0:
            raise ExecutorFault(f"the daemon ended with {code}: {log.read_text().strip()}")


def _wait_ready(process: subprocess.Popen[bytes], endpoint: str, log: Path, timeout_s: float) -> Daemon:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and process.poll() is None:
        text = log.read_text()
        if ready := _READY.search(text):
            phases = (phase.rsplit(" ", 1) for phase in ready["phases"].split(", "))
            return Daemon(
                process=psutil.Process(process.pid),
                endpoint=endpoint,
                ready_s=float(ready["total"]),
                phases={name: float(seconds) for name, seconds in phases},
                memory_mb={
                    each["part"]: float(each["size"]) * (1 << 20) / 1e6 for each in _MEMORY.finditer(text)
                },
            )
        time.sleep(0.05)
    raise ExecutorFault(f"the daemon did not become ready: {log.read_text().strip()}")

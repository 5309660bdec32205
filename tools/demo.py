"""The main job, end to end, as a user does it: fetch a model, build an engine, serve it, ask, stop.

Every line starting with `$` is a command that works as it stands. Ends with 0 only if the daemon became
ready, an answer streamed through the socket, and the daemon drained and exited 0 on SIGTERM.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "smollm2-135m"
PROMPT = "What is the capital of France? Answer in one sentence."
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


def main() -> int:
    """Run the demo; gives the exit code."""
    with tempfile.TemporaryDirectory(prefix="edgellm-demo-") as folder:
        engine = Path(folder) / "engine"
        endpoint = f"ipc://{folder}/edgellm.sock"
        checkpoint = _run("edgellm", "fetch", MODEL, capture=True).strip()
        _run("edgellm", "build", checkpoint, "-o", str(engine))
        log = Path(folder) / "log"
        daemon = _start("edgellm", "serve", str(engine), "--endpoint", endpoint, log=log)
        shown = 0
        try:
            _wait_ready(daemon, endpoint)
            shown = _show(log)
            _run("edgellm", "chat", "--endpoint", endpoint, "-v", PROMPT)
        finally:
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(STOP_TIMEOUT_S)
            _show(log, shown)
        if code != 0:
            sys.exit(f"demo: the daemon ended with {code}")
    print("demo: done")
    return 0


def _command(*words: str, tail: str = "") -> list[str]:
    print(f"\n$ {shlex.join(words)}{tail}", flush=True)
    # The edgellm of this very interpreter, whether or not its directory is on PATH.
    return [sys.executable, "-m", "edgellm", *words[1:]]


def _run(*words: str, capture: bool = False) -> str:
    done = subprocess.run(
        _command(*words), check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode != 0:
        sys.exit(f"demo: {shlex.join(words)} ended with {done.returncode}")
    if capture:
        print(done.stdout, end="", flush=True)
    return done.stdout or ""


def _start(*words: str, log: Path) -> subprocess.Popen[bytes]:
    # Into a file: what the daemon logs while it answers would land in the middle of the answer.
    with log.open("wb") as file:
        return subprocess.Popen(_command(*words, tail=f" 2>{log} &"), stderr=file)


def _show(log: Path, start: int = 0) -> int:
    """Print a file from a byte on; gives its size."""
    data = log.read_bytes()
    print(f"\n$ tail -c +{start + 1} {log}\n{data[start:].decode()}", end="", flush=True)
    return len(data)


def _wait_ready(daemon: subprocess.Popen[bytes], endpoint: str) -> None:
    from edgellm import Client

    end = time.monotonic() + READY_TIMEOUT_S
    with Client(endpoint) as client:
        while daemon.poll() is None and time.monotonic() < end:
            try:
                client.wait_ready(timeout=1.0)
            except TimeoutError:
                continue
            return
    sys.exit("demo: the daemon did not become ready")


if __name__ == "__main__":
    sys.exit(main())

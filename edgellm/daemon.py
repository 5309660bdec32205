"""The daemon's life, in reading order: bind, load, serve, drain, close. The main thread lives here.

The main thread owns the lifecycle and the signals. It touches neither a socket (the I/O thread's) nor the
executor (the engine thread's, once it is loaded).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from edgellm.config import Config
from edgellm.engine import Engine
from edgellm.enginedir import EngineDir, open_engine, verify_engine
from edgellm.errors import ConfigError, ExecutorFault
from edgellm.executor.base import Executor, ExecutorInfo
from edgellm.executor.factory import make_executor
from edgellm.scheduler.scheduler import Scheduler
from edgellm.server import Server
from edgellm.text.chat import ChatTemplate
from edgellm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TICK_S = 0.5
"""How often the main thread looks whether the others live; signals wake it at once."""

LAST_WORDS_S = 1.0
"""How long the last final messages may take to leave after the drain."""

SWITCH_INTERVAL_S = 0.0005
"""CPython's default of 5 ms would let the I/O thread hold up the engine thread for a whole decode step."""


class _StoppedWhileLoading(Exception):
    """A signal came before READY: nothing is open, so there is nothing to drain."""


class Daemon:
    """One engine, served over one socket, until a signal ends it."""

    def __init__(self, config: Config) -> None:
        if config.engine.path is None:
            raise ConfigError("engine.path is not set: name the directory that `edgellm build` made")
        self._config = config
        self._path = Path(config.engine.path)
        self._server = Server(config.server)
        self._engine: Engine | None = None
        self._executor: Executor | None = None
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._phases: dict[str, float] = {}

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; gives the exit code.

        Raises:
            OperatorError: whatever kept the daemon from starting, or ended it.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._install_signals()
        self._phases["process"] = time.time() - psutil.Process().create_time()
        try:
            with self._phase("bind"):
                self._server.bind()
                self._server.start()
            self._load()
            self._serve()
            self._drain()
        except _StoppedWhileLoading:
            log.info("told to stop while loading")
        finally:
            self._close()
        log.info("stopped")
        return 0

    def _install_signals(self) -> None:
        def handle(_number: int, _frame: FrameType | None) -> None:
            if self._stop.is_set():
                self._hurry.set()
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handle)

    def _load(self) -> None:
        with self._phase("open"):
            directory = open_engine(self._path)
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="load") as pool:
            verified = pool.submit(verify_engine, directory)
            text = pool.submit(_load_text, directory)
            with self._phase("executor"):
                executor = make_executor(directory, self._config.engine)
                self._executor = executor
                report = executor.load(self._note_progress)
            with self._phase("verify"):
                verified.result()
            with self._phase("text"):
                tokenizer, template = text.result()
        with self._phase("engine"):
            scheduler = Scheduler(executor.info, max_queue=self._config.server.max_queue)
            self._engine = Engine(
                executor,
                scheduler,
                max_step_s=self._config.scheduler.max_step_ms / 1000,
                deliver=self._server.deliver,
            )
            self._engine.start()
            self._server.attach(
                engine=self._engine,
                tokenizer=tokenizer,
                template=template,
                directory=directory,
                info=executor.info,
            )
        for part, size in report.lines.items():
            log.info("memory: %s %.1f MB", part, size / 1e6)
        self._log_ready(directory, executor.info)

    def _note_progress(self, what: str, fraction: float) -> None:
        if self._stop.is_set():
            raise _StoppedWhileLoading
        self._server.set_progress(what, fraction)

    def _serve(self) -> None:
        while not self._stop.wait(TICK_S):
            self._check_threads()

    def _check_threads(self) -> None:
        assert self._engine is not None
        if not self._engine.alive:
            raise ExecutorFault(f"the engine thread ended: {self._engine.fault}")
        if not self._server.alive:
            raise ExecutorFault("the I/O thread ended; the log says why")

    def _drain(self) -> None:
        timeout = self._config.scheduler.drain_timeout_s
        log.info("draining: %d open requests, at most %.1f s", self._server.open_requests, timeout)
        self._server.drain()
        end = time.monotonic() + timeout
        while self._server.open_requests and time.monotonic() < end and not self._hurry.is_set():
            self._check_threads()
            time.sleep(0.01)

    def _close(self) -> None:
        ended = self._engine is None or self._engine.shut_down(timeout=self._step_bound())
        self._server.close(flush_s=LAST_WORDS_S)
        if not ended:
            # A step hangs in the driver or library: its memory cannot be taken back from under it.
            log.error("the engine thread did not stop; leaving without closing the executor")
            os._exit(ExecutorFault.exit_code)
        if self._executor is not None:
            self._executor.close()

    def _step_bound(self) -> float:
        """Seconds within which a step in flight must have ended: a generous multiple of its budget."""
        return 5.0 + 10 * self._config.scheduler.max_step_ms / 1000

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self._server.set_phase(name)
        log.debug("phase %s", name)
        yield
        self._phases[name] = time.monotonic() - started

    def _log_ready(self, directory: EngineDir, info: ExecutorInfo) -> None:
        total = time.time() - psutil.Process().create_time()
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self._phases.items())
        log.info(
            "READY in %.2f s (%s): %s on %s, %d slots of %d tokens, at %s",
            total,
            phases,
            directory.model_name,
            info.name,
            info.max_batch_size,
            info.max_seq_len,
            self._server.endpoint,
        )


def _load_text(directory: EngineDir) -> tuple[Tokenizer, ChatTemplate | None]:
    return directory.tokenizer(), directory.chat_template()

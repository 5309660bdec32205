"""The daemon's life, in reading order: bind, load, serve, drain, close. The main thread lives here.

The main thread owns the lifecycle, the signals and the governor's tick. It touches neither a socket (the I/O
thread's), nor the executor (the engine thread's, once it is loaded), nor a sensor (the sensor thread's).
"""

from __future__ import annotations

import collections
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from edgellm.board_watch import BoardWatch
from edgellm.config import Config
from edgellm.engine import Engine
from edgellm.enginedir import EngineDir, open_engine, verify_engine
from edgellm.errors import ConfigError, ExecutorFault, OperatorError
from edgellm.executor.base import Executor, ExecutorInfo
from edgellm.executor.factory import make_executor
from edgellm.journal import set_level
from edgellm.memory.promise import MemoryPromise
from edgellm.memory.resident import give_back_freed, keep_freed_small
from edgellm.reload import reloaded
from edgellm.scheduler.scheduler import Scheduler
from edgellm.server import Server
from edgellm.systemd import Notifier, Watchdog
from edgellm.text.chat import ChatTemplate
from edgellm.text.tokenizer import Tokenizer
from edgellm.wakeup import Wakeup

log = logging.getLogger(__name__)

TICK_S = 0.5
"""How often the main thread looks after the others; signals wake it at once."""

LAST_WORDS_S = 1.0
"""How long the last final messages may take to leave after the drain."""

LOAD_STEP_S = 60.0
"""Loading tells systemd again and again that it needs at most so much more time until it says so again."""

SWITCH_INTERVAL_S = 0.0005
"""CPython's default of 5 ms would let the I/O thread hold up the engine thread for a whole decode step."""


class _StoppedWhileLoading(Exception):
    """A signal came before READY: nothing is open, so there is nothing to drain."""


class Daemon:
    """One engine, served over one socket, until a signal ends it.

    Args:
        load_config: composes the configuration; called again on SIGHUP.

    Raises:
        ConfigError: nothing could be served with this configuration, or on this system.
    """

    def __init__(self, load_config: Callable[[], Config]) -> None:
        self._load_config = load_config
        self._config = load_config()
        set_level(self._config.log.level)
        if self._config.engine.path is None:
            raise ConfigError("engine.path is not set: name the directory that `edgellm build` made")
        _require_proc()
        self._path = Path(self._config.engine.path).absolute()
        self._server = Server(self._config.server)
        self._notifier = Notifier()
        self._engine: Engine | None = None
        self._executor: Executor | None = None
        self._board: BoardWatch | None = None
        self._wakeup = Wakeup()
        self._signals: collections.deque[int] = collections.deque()
        self._stopping = False
        self._hurry = False
        self._phases: dict[str, float] = {}

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; gives the exit code.

        Raises:
            OperatorError: whatever kept the daemon from starting, or ended it.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        keep_freed_small()
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

    # Signals: handlers only note the number, and the pipe wakes whoever sleeps.

    def _install_signals(self) -> None:
        def note(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, note)
        self._wakeup.ring_on_signals()

    def _take_signals(self) -> None:
        reload = False
        while self._signals:
            if self._signals.popleft() == signal.SIGHUP:
                reload = True
            else:
                self._hurry = self._stopping
                self._stopping = True
        if reload and not self._stopping:
            self._reload()

    def _reload(self) -> None:
        """Read the configuration again; what cannot change while running is named and left as it is."""
        self._notifier.reloading()
        try:
            config = self._load_config()
            self._server.reload_clients()
            self._config = reloaded(self._config, config)
        except OperatorError as error:
            log.error("reload: %s; everything stays as it was", error)  # the daemon must not end of a typo
        else:
            set_level(self._config.log.level)
            assert self._board is not None
            self._board.reconfigure(self._config)
            log.info("reloaded")
        self._notifier.ready(self._status())

    # Load.

    def _load(self) -> None:
        with self._phase("open"):
            directory = open_engine(self._path)
            promise = MemoryPromise(directory, self._config)
            promise.require()
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="load") as pool:
            verified = pool.submit(verify_engine, directory, loading=True)
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
            self._engine = Engine(
                executor,
                Scheduler(executor.info, max_queue=self._config.server.max_queue),
                max_step_s=self._config.scheduler.max_step_ms / 1000,
                deliver=self._server.deliver,
            )
            self._engine.start()
        with self._phase("governor"):
            self._board = BoardWatch(
                self._config,
                slots=executor.info.max_batch_size,
                engine=self._engine,
                server=self._server,
                notifier=self._notifier,
            )
            self._board.start()
        with self._phase("memory"):
            promise.keep(report)
        self._server.attach(
            engine=self._engine,
            tokenizer=tokenizer,
            template=template,
            directory=directory,
            info=executor.info,
        )
        self._log_ready(directory, executor.info)
        self._notifier.ready(self._status())

    def _note_progress(self, what: str, fraction: float) -> None:
        self._take_signals()
        if self._stopping:
            raise _StoppedWhileLoading
        self._server.set_progress(what, fraction)
        self._notifier.extend_timeout(LOAD_STEP_S, f"loading: {what} {fraction:.0%}")

    # Serve.

    def _serve(self) -> None:
        assert self._engine is not None
        assert self._board is not None
        engine, server = self._engine, self._server
        watchdog = Watchdog(self._notifier, {"engine": lambda: engine.beat, "io": lambda: server.beat})
        while True:
            self._take_signals()
            if self._stopping:
                return
            self._check_threads()
            self._board.tick()
            watchdog.look()
            self._wakeup.wait(TICK_S)

    def _check_threads(self) -> None:
        assert self._engine is not None
        if not self._engine.alive:
            raise ExecutorFault(f"the engine thread ended: {self._engine.fault}")
        if not self._server.alive:
            raise ExecutorFault("the I/O thread ended; the log says why")

    def _status(self) -> str:
        return "" if self._board is None else self._board.status()

    # Drain and close.

    def _drain(self) -> None:
        timeout = self._config.scheduler.drain_timeout_s
        log.info("draining: %d open requests, at most %.1f s", self._server.open_requests, timeout)
        self._notifier.stopping(f"draining {self._server.open_requests} requests")
        # The unit's TimeoutStopSec bounds silence, not the drain.
        self._notifier.extend_timeout(timeout + LAST_WORDS_S + self._step_bound())
        self._server.drain()
        assert self._board is not None
        end = time.monotonic() + timeout
        while self._server.open_requests and time.monotonic() < end and not self._hurry:
            self._check_threads()
            self._board.tick()
            self._wakeup.wait(0.01)
            self._take_signals()

    def _close(self) -> None:
        if self._board is not None:
            self._board.stop()
        ended = self._engine is None or self._engine.shut_down(timeout=self._step_bound())
        self._server.close(flush_s=LAST_WORDS_S)
        if not ended:
            # A step hangs in the driver or library: its memory cannot be taken back from under it.
            log.error("the engine thread did not stop; leaving without closing the executor")
            os._exit(ExecutorFault.exit_code)
        if self._executor is not None:
            self._executor.close()
        self._wakeup.close()

    def _step_bound(self) -> float:
        """Seconds within which a step in flight must have ended: a generous multiple of its budget."""
        return 5.0 + 10 * self._config.scheduler.max_step_ms / 1000

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self._server.set_phase(name)
        self._notifier.extend_timeout(LOAD_STEP_S, f"loading: {name}")
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


def _require_proc() -> None:
    try:
        psutil.Process()
    except psutil.Error:
        raise ConfigError(
            f"{psutil.PROCFS_PATH} is not mounted, and memory cannot be watched without: mount -t proc proc"
            f" {psutil.PROCFS_PATH}"
        ) from None


def _load_text(directory: EngineDir) -> tuple[Tokenizer, ChatTemplate | None]:
    text = directory.tokenizer(), directory.chat_template()
    give_back_freed()  # half of what parsing took; the executor's thread would not find it
    return text

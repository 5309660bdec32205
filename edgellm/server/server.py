"""The I/O thread: take what the engine did, take what clients sent, send what is due; wait for nobody."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from edgellm.endpoint import default_endpoint, events_endpoint
from edgellm.enginedir import EngineDir
from edgellm.errors import ConfigError
from edgellm.executor.base import ExecutorInfo
from edgellm.governor.governor import Transition
from edgellm.protocol import StatsEvent
from edgellm.scheduler.request import Finish, Update
from edgellm.server.exchange import Exchange, log_failure
from edgellm.server.gate import state_event
from edgellm.server.publisher import Publisher
from edgellm.server.router import Router
from edgellm.server.served import EngineHandle, GovernorHandle, ServedModel, Template, Tokenizer
from edgellm.server.zap import Authenticator
from edgellm.server_config import ServerConfig

TICK_S = 0.5
"""Longest sleep: the beat must go on, so that the watchdog sees a live loop."""

RETRY_S = 0.01
"""How soon a send to a client that does not read is tried again. A ROUTER cannot be polled for one peer."""

MESSAGES_PER_TURN = 64
"""Requests taken before answers get their turn again."""


class Server:
    """Serves an engine over a ROUTER socket, on a thread of its own.

    `bind` and `start` come first, so that clients hear `loading` rather than nothing; `attach` makes it
    serve, `drain` stops new work, `close` ends it. Every request that is accepted gets exactly one final
    message, whatever happens to the engine; nothing that a client sends ends the loop.

    Methods may be called from any thread. What needs the sockets or the open requests leaves a note for the
    I/O thread.

    Attributes:
        beat: turns of the loop: what a watchdog looks at.

    Raises:
        ConfigError: in the constructor and in `bind`, naming the key of the configuration at fault.
        TemporaryShortage: in `bind`: no interface has a tcp endpoint's address yet.
    """

    def __init__(self, config: ServerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        endpoint = config.endpoint or default_endpoint()
        published = config.events_endpoint or events_endpoint(endpoint)
        named = {"endpoint": endpoint, "events_endpoint": published}
        tcp = [f"server.{key}: {each}" for key, each in named.items() if each.startswith("tcp:")]
        self._authenticator = Authenticator(config, tcp[0], clock) if tcp else None
        self._router = Router(config, endpoint, self._authenticator)
        self._publisher = Publisher(config, published, self._authenticator)
        if self._publisher.endpoint == self._router.endpoint:
            raise ConfigError(
                f"server.events_endpoint: {published} is server.endpoint: it needs its own path"
            )
        self._context = zmq.Context()
        self._context.set(zmq.BLOCKY, 0)
        self._exchange = Exchange(config, self._router, clock)
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)
        self._notes: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._wake)  # no sooner: the engine may still call deliver
        self._leaving = threading.Event()
        self._flush_s = 0.0
        self.beat = 0

    @property
    def endpoint(self) -> str:
        """Where clients connect to."""
        return self._router.endpoint

    @property
    def events_endpoint(self) -> str:
        """Where subscribers connect to."""
        return self._publisher.endpoint

    @property
    def alive(self) -> bool:
        """Whether the I/O thread runs."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new work is refused, for good."""
        return self._exchange.draining

    @property
    def open_requests(self) -> int:
        """Requests that the engine has not ended yet."""
        return len(self._exchange.open)

    def bind(self) -> None:
        """Take the locks beside the sockets and bind. A socket of a living daemon is never taken over."""
        try:
            if self._authenticator is not None:
                self._authenticator.bind(self._context)
            self._router.bind(self._context)
            self._publisher.bind(self._context)
        except BaseException:
            self._close_sockets()
            raise

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def set_phase(self, phase: str) -> None:
        """Name the start-up phase that `health` reports while loading."""
        self._exchange.phase, self._exchange.progress = phase, 0.0

    def set_progress(self, what: str, fraction: float) -> None:
        """Name what the phase is doing and how far it is, 0…1; an `executor.base.Progress`."""
        self._exchange.phase, self._exchange.progress = what, fraction

    def attach(
        self,
        *,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        template: Template | None,
        directory: EngineDir,
        info: ExecutorInfo,
    ) -> None:
        """Serve: from now on, at once, requests reach the engine."""
        model = ServedModel.of(tokenizer=tokenizer, template=template, directory=directory, info=info)
        self._exchange.serve(model, engine)

    def govern(self, governor: GovernorHandle) -> None:
        """From now on, at once, the governor's last decision says whose requests are admitted."""
        self._exchange.govern(governor)

    def publish_transition(self, transition: Transition) -> None:
        """Tell subscribers, at once, that state or reason changed; never waits."""
        event = state_event(transition)
        self._note(lambda: self._publisher.publish(event))

    def publish_statistics(self) -> None:
        """Tell subscribers how things are; never waits."""
        self._note(self._publish_statistics)

    def deliver(self, updates: list[Update]) -> None:
        """Take what a step gave; called by the engine thread, never waits."""
        self._note(lambda: self._exchange.take(updates))

    def reload_clients(self) -> None:
        """Read again whose keys may connect over tcp; who is connected stays.

        Raises:
            ConfigError: a file is bad; nothing has changed then.
        """
        if (authenticator := self._authenticator) is not None:
            clients = authenticator.read_clients()
            self._note(lambda: authenticator.allow(clients))

    def drain(self) -> None:
        """Refuse new work with `shutting_down`, at once; what is open goes on."""
        self._exchange.draining = True

    def end_all(self, finish: Finish) -> None:
        """End every open request with `finish`, without asking the engine: it may be dead."""
        self._note(lambda: self._exchange.end_all(finish))

    def close(self, *, flush_s: float = 1.0) -> None:
        """End what is still open with `shutting_down`, give answers `flush_s` to leave, stop; idempotent."""
        self._flush_s = flush_s
        self._leaving.set()
        if self._thread.ident is not None:
            self._ring()
            self._thread.join()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._router.close()
        self._publisher.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()  # libzmq removes socket files while it ends: no other daemon may bind before
        self._router.release()
        self._publisher.release()

    def _note(self, note: Callable[[], None]) -> None:
        self._notes.append(note)
        self._ring()

    def _ring(self) -> None:
        os.eventfd_write(self._wake, 1)

    # On the I/O thread.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._router.monitor, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        if self._authenticator is not None:
            poller.register(self._authenticator.socket, zmq.POLLIN)
        while not self._leaving.is_set():
            self.beat += 1
            poller.poll(int(1000 * (RETRY_S if self._exchange.unsent else TICK_S)))
            _guarded(self._turn)
        _guarded(self._take_notes)
        _guarded(lambda: self._exchange.end_all(Finish.SHUTDOWN))
        _guarded(self._flush)

    def _turn(self) -> None:
        self._take_notes()
        if self._authenticator is not None:
            self._authenticator.answer()
        self._exchange.bury()
        for _ in range(MESSAGES_PER_TURN):
            incoming = self._router.receive()
            if incoming is None:
                break
            self._exchange.bury()
            self._exchange.hear(incoming)
        self._exchange.send()
        self._exchange.submit()

    def _take_notes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._notes:
            _guarded(self._notes.popleft())

    def _publish_statistics(self) -> None:
        self._publisher.publish(StatsEvent(**msgspec.structs.asdict(self._exchange.status())))

    def _flush(self) -> None:
        end = self._clock() + self._flush_s
        self._exchange.send()
        while self._exchange.unsent and self._clock() < end:
            time.sleep(RETRY_S)
            self._exchange.bury()
            self._exchange.send()


def _guarded(work: Callable[[], None]) -> None:
    """A mistake of ours must not end the loop."""
    try:
        work()
    except Exception as error:
        log_failure("the I/O loop", error)
        time.sleep(RETRY_S)  # should it fail every time, then not at full speed

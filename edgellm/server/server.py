"""The loop: take what the engine did, take what clients sent, send what is due, and wait for none of them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal

import psutil
import zmq

from edgellm.endpoint import default_endpoint
from edgellm.enginedir import EngineDir
from edgellm.errors import (
    BadRequest,
    InternalError,
    Loading,
    NotFound,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from edgellm.executor.base import ExecutorInfo
from edgellm.protocol import (
    Cancel,
    CancelReply,
    Chat,
    Error,
    Generate,
    Health,
    HealthReply,
    Model,
    ModelReply,
    PriorityName,
    Reply,
    Request,
    Status,
    StatusReply,
    Tokenize,
    TokenizeReply,
    decode_request,
    error_reply,
    peek_id,
)
from edgellm.scheduler import request as engine_side
from edgellm.scheduler.request import Finish, Priority, Update
from edgellm.server.access import Access
from edgellm.server.admission import admit, tokenize
from edgellm.server.connection import Connection
from edgellm.server.router import Incoming, Router, Sent
from edgellm.server.served import EngineHandle, ServedModel, Template, Tokenizer
from edgellm.server.stream import Stream
from edgellm.server_config import ServerConfig

log = logging.getLogger(__name__)

TICK_S = 0.5
"""Longest sleep: the beat must go on, so that the watchdog sees a live loop."""

RETRY_S = 0.01
"""How soon a send to a client that does not read is tried again. A ROUTER cannot be polled for one peer."""

MESSAGES_PER_TURN = 64
"""Requests taken before answers get their turn again."""

LOADING_RETRY_MS = 500
QUEUE_FULL_RETRY_MS = 1_000
"""What an overloaded client is told before any request has ended to go by."""

PRIORITY_NAMES: dict[Priority, PriorityName] = {
    Priority.CRITICAL: "critical",
    Priority.HIGH: "high",
    Priority.NORMAL: "normal",
    Priority.BACKGROUND: "background",
}

State = Literal["loading", "ready", "draining"]


class Server:
    """Serves an engine over a ROUTER socket, on a thread of its own.

    `bind` and `start` come first, so that clients hear `loading` rather than nothing; `attach` makes it
    serve, `drain` stops new work, `close` ends it. Every request that is accepted gets exactly one final
    message, whatever happens to the engine; nothing that a client sends ends the loop.

    Methods may be called from any thread; those that change something only leave a note for the I/O thread.

    Raises:
        ConfigError: in the constructor and in `bind`, naming `server.endpoint`.
    """

    def __init__(self, config: ServerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._router = Router(config, config.endpoint or default_endpoint())
        self._access = Access(config)
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)
        self._notes: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._leaving = threading.Event()
        self._flush_s = 0.0
        self._started = clock()
        self.beat = 0

        self._state: State = "loading"
        self._phase = "start"
        self._progress = 0.0
        self._engine: EngineHandle | None = None
        self._model: ServedModel | None = None

        self._connections: dict[bytes, Connection] = {}
        self._routes: dict[int, bytes] = {}  # descriptor → route
        self._open: dict[int, tuple[Stream, Connection]] = {}  # engine key → whose it is
        self._keys = itertools.count(1)
        self._unsent: dict[bytes, Connection] = {}
        self._counts: Counter[str] = Counter()
        self._mean_s: float | None = None  # of a request, arrival to end; moving

    # From other threads.

    @property
    def endpoint(self) -> str:
        """Where clients connect to."""
        return self._router.endpoint

    @property
    def alive(self) -> bool:
        """Whether the I/O thread runs."""
        return self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Requests that the engine has not ended yet."""
        return len(self._open)

    def bind(self) -> None:
        """Take the lock beside the socket and bind. A socket of a living daemon is never taken over."""
        self._router.bind()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def set_phase(self, phase: str) -> None:
        """Name the start-up phase that `health` reports while loading."""
        self._phase, self._progress = phase, 0.0

    def set_progress(self, what: str, fraction: float) -> None:
        """Name what the phase is doing and how far it is, 0…1; an `executor.base.Progress`."""
        self._phase, self._progress = what, fraction

    def attach(
        self,
        *,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        template: Template | None,
        directory: EngineDir,
        info: ExecutorInfo,
    ) -> None:
        """Serve: from now on requests reach the engine."""
        model = ServedModel.of(tokenizer=tokenizer, template=template, directory=directory, info=info)

        def note() -> None:
            self._engine, self._model = engine, model
            if self._state == "loading":
                self._state, self._phase, self._progress = "ready", "ready", 1.0

        self._note(note)

    def deliver(self, updates: list[Update]) -> None:
        """Take what a step gave; called by the engine thread, never waits."""
        self._note(lambda: self._take(updates))

    def drain(self) -> None:
        """Refuse new work with `shutting_down`; what is open goes on."""

        def note() -> None:
            self._state, self._phase = "draining", "draining"

        self._note(note)

    def end_all(self, finish: Finish) -> None:
        """End every open request with `finish`, without asking the engine: it may be dead."""
        self._note(lambda: self._end_all(finish))

    def close(self, *, flush_s: float = 1.0) -> None:
        """End what is still open with `shutting_down`, give answers `flush_s` to leave, stop; idempotent."""
        self._flush_s = flush_s
        self._leaving.set()
        if self._thread.ident is not None:
            self._ring()
            self._thread.join()
        self._router.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _note(self, note: Callable[[], None]) -> None:
        self._notes.append(note)
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # closed, or rung 2⁶⁴ − 2 times
            os.eventfd_write(self._wake, 1)

    # The I/O thread.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._router.monitor, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._leaving.is_set():
            self.beat += 1
            poller.poll(int(1000 * (RETRY_S if self._unsent else TICK_S)))
            self._guarded(self._turn)
        self._guarded(self._take_notes)
        self._guarded(lambda: self._end_all(Finish.SHUTDOWN))
        self._guarded(self._flush_at_end)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A mistake of ours must not end the loop."""
        try:
            work()
        except Exception as error:
            _log_failure("the I/O loop", error)
            time.sleep(RETRY_S)  # should it fail every time, then not at full speed

    def _turn(self) -> None:
        self._take_notes()
        self._bury()
        for _ in range(MESSAGES_PER_TURN):
            incoming = self._router.receive()
            if incoming is None:
                break
            self._bury()
            self._hear(incoming)
        self._send()

    def _take_notes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._notes:
            self._notes.popleft()()

    # What clients send.

    def _hear(self, incoming: Incoming) -> None:
        connection = self._connection(incoming)
        if connection is None:
            return
        try:
            reply = self._handle(connection, incoming)
        except RequestError as error:
            reply = self._refusal(incoming, error)
        except Exception as error:
            _log_failure(f"a request of uid {connection.peer.uid}", error)
            reply = self._refusal(
                incoming, InternalError("the daemon failed on this request; its log says why")
            )
        if reply is not None:
            connection.reply(reply, incoming.delimited)
        self._unsent[connection.route] = connection

    def _connection(self, incoming: Incoming) -> Connection | None:
        known = self._connections.get(incoming.route)
        if known is not None and known.descriptor == incoming.descriptor:
            return known
        if known is not None:  # a client that names itself has come back
            self._lose(known)
        if not self._router.alive(incoming.descriptor):
            return None  # sent its last words and vanished
        if (previous := self._routes.get(incoming.descriptor)) is not None:
            self._lose(self._connections[previous])
        grant = self._access.grant(incoming.peer)
        connection = Connection(incoming.route, incoming.descriptor, incoming.peer, grant)
        self._connections[incoming.route] = connection
        self._routes[incoming.descriptor] = incoming.route
        log.debug("client %s: uid %d, pid %d", incoming.route.hex(), incoming.peer.uid, incoming.peer.pid)
        return connection

    def _refusal(self, incoming: Incoming, error: RequestError) -> Error:
        self._counts[error.code] += 1
        return error_reply(peek_id(incoming.payload), error)

    def _handle(self, connection: Connection, incoming: Incoming) -> Reply | None:
        """Answer a message, or open a request and answer later."""
        if incoming.problem is not None:
            raise incoming.problem
        request: Request = decode_request(incoming.payload)
        match request:
            case Chat() | Generate():
                self._open_request(connection, request, incoming.delimited)
                return None
            case Cancel():
                return self._cancel(connection, request)
            case Tokenize():
                return TokenizeReply(id=request.id, tokens=tokenize(self._ready()[0], request).tolist())
            case Status():
                return self._status(request)
            case Health():
                return HealthReply(
                    id=request.id, status=self._state, phase=self._phase, progress=self._progress
                )
            case Model():
                return self._describe(request)

    def _ready(self) -> tuple[ServedModel, EngineHandle]:
        if self._model is None or self._engine is None:
            raise Loading(
                f"the engine is loading ({self._phase}, {self._progress:.0%})",
                retry_after_ms=LOADING_RETRY_MS,
            )
        return self._model, self._engine

    def _open_request(self, connection: Connection, request: Chat | Generate, delimited: bool) -> None:
        arrival = self._clock()
        if request.id in connection.streams:
            raise BadRequest("a request with this id is open on this connection", field="id")
        if self._state == "draining":
            raise ShuttingDown("the daemon is stopping and takes no new requests")
        model, engine = self._ready()
        capacity = model.max_batch_size + self._config.max_queue
        if len(self._open) >= capacity:
            raise Overloaded(
                f"{len(self._open)} requests are open: {model.max_batch_size} slots and a queue of"
                f" {self._config.max_queue} (server.max_queue)",
                retry_after_ms=self._retry_after_ms(model.max_batch_size),
            )
        self._access.check(
            connection.grant, len(connection.streams), self._retry_after_ms(model.max_batch_size)
        )
        admitted = admit(model, request, self._config.default_max_tokens)
        priority = connection.grant.cap(request.priority)
        stream = Stream(
            id=request.id,
            key=next(self._keys),
            streaming=request.stream,
            delimited=delimited,
            logprobs=request.logprobs,
            prompt_tokens=len(admitted.prompt),
            priority=PRIORITY_NAMES[priority],
            stop=request.stop,
            min_tokens=request.min_tokens,
            arrival=arrival,
            token_bytes=model.tokenizer.token_bytes,
        )
        engine.submit(
            engine_side.Request(
                key=stream.key,
                prompt=admitted.prompt,
                sampling=admitted.sampling,
                max_tokens=admitted.max_tokens,
                stop_ids=admitted.stop_ids,
                priority=priority,
                deadline=None if request.deadline_ms is None else arrival + request.deadline_ms / 1000,
                arrival=arrival,
            )
        )
        self._open[stream.key] = stream, connection
        self._access.opened(connection.grant)
        self._counts["accepted"] += 1
        connection.streams[request.id] = stream
        connection.wake(stream)

    def _cancel(self, connection: Connection, request: Cancel) -> CancelReply:
        stream = connection.streams.get(request.target)
        if stream is None or stream.ended:
            raise NotFound(
                "no request with this id is open on this connection; it may just have ended", field="target"
            )
        self._stop(stream.key, Finish.CANCELLED)
        return CancelReply(id=request.id, target=request.target)

    def _status(self, request: Status) -> StatusReply:
        stats = None if self._engine is None else self._engine.snapshot()
        return StatusReply(
            id=request.id,
            status=self._state,
            uptime_s=self._clock() - self._started,
            running=stats.running if stats else 0,
            queued=stats.queued if stats else 0,
            slots=self._model.max_batch_size if self._model else 0,
            batch_cap=stats.batch_cap if stats else 0,
            clients=len(self._connections),
            requests=dict(self._counts),
            prompt_tokens=stats.prompt_tokens if stats else 0,
            cached_tokens=stats.cached_tokens if stats else 0,
            completion_tokens=stats.completion_tokens if stats else 0,
            steps=stats.steps if stats else 0,
            rss_bytes=psutil.Process().memory_info().rss,
        )

    def _describe(self, request: Model) -> ModelReply:
        model, _ = self._ready()
        return ModelReply(
            id=request.id,
            name=model.name,
            architecture=model.architecture,
            executor=model.executor,
            quantization=model.quantization,
            vocab_size=model.vocab_size,
            max_batch_size=model.max_batch_size,
            max_seq_len=model.max_seq_len,
            max_num_tokens=model.max_num_tokens,
            eos_ids=list(model.eos_ids),
            chat_template=model.template is not None,
        )

    def _retry_after_ms(self, slots: int) -> int:
        """When a place should be free: how long a request takes, over the slots that end theirs in turn."""
        if self._mean_s is None:
            return QUEUE_FULL_RETRY_MS
        return int(min(max(1000 * self._mean_s / max(slots, 1), 10), 60_000))

    # What the engine does.

    def _take(self, updates: list[Update]) -> None:
        now = self._clock()
        for update in updates:
            opened = self._open.get(update.key)
            if opened is None:  # ended by end_all
                continue
            stream, connection = opened
            matched = stream.matched
            stream.take(update, now)
            if stream.matched is not matched and not stream.ended:
                self._stop(stream.key, Finish.STOP)
            if stream.ended:
                self._settle(stream, connection, now)
            if self._connections.get(connection.route) is connection:
                connection.wake(stream)
                self._unsent[connection.route] = connection

    def _settle(self, stream: Stream, connection: Connection, now: float) -> None:
        """The engine is done with a request."""
        del self._open[stream.key]
        self._access.closed(connection.grant)
        self._counts[stream.outcome] += 1
        took = now - stream.arrival
        self._mean_s = took if self._mean_s is None else 0.9 * self._mean_s + 0.1 * took

    def _stop(self, key: int, finish: Finish) -> None:
        if self._engine is not None:
            self._engine.stop(key, finish)

    def _end_all(self, finish: Finish) -> None:
        self._take([Update(key=key, finish=finish) for key in list(self._open)])

    # What clients are sent, and who is gone.

    def _send(self) -> None:
        for connection in list(self._unsent.values()):
            if self._connections.get(connection.route) is not connection or self._send_to(connection):
                del self._unsent[connection.route]

    def _send_to(self, connection: Connection) -> bool:
        """Send what is due until nothing is left (true) or no room is left (false)."""
        while (due := connection.next()) is not None:
            sent = self._router.send(connection.route, *due)
            if sent is Sent.GONE:
                self._lose(connection)
                return True
            if sent is Sent.FULL:
                return self._give_up_on(connection)
            connection.advance()
            connection.blocked_since = None
        return True

    def _give_up_on(self, connection: Connection) -> bool:
        """Drop a client that has not read for too long, or asks on without reading; whether it was."""
        now = self._clock()
        if connection.blocked_since is None:
            connection.blocked_since = now
        if not connection.overrun and now - connection.blocked_since < self._config.send_timeout_s:
            return False
        log.warning(
            "client of uid %d, pid %d does not read its answers: dropped",
            connection.peer.uid,
            connection.peer.pid,
        )
        self._lose(connection)
        self._router.hang_up(connection.descriptor, connection.peer)
        return True

    def _bury(self) -> None:
        for descriptor in self._router.vanished():
            if (route := self._routes.get(descriptor)) is not None:
                self._lose(self._connections[route])

    def _lose(self, connection: Connection) -> None:
        """A connection is gone: nobody waits for its requests."""
        del self._connections[connection.route]
        del self._routes[connection.descriptor]
        for stream in connection.streams.values():
            if not stream.ended:
                self._stop(stream.key, Finish.CANCELLED)
        connection.streams.clear()

    def _flush_at_end(self) -> None:
        end = self._clock() + self._flush_s
        self._send()
        while self._unsent and self._clock() < end:
            time.sleep(RETRY_S)
            self._bury()
            self._send()


def _log_failure(where: str, error: Exception) -> None:
    """Log where something failed, but not the exception's own words: they may quote a prompt."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", where, type(error).__name__, trace)

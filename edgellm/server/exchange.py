"""Who is connected, which requests are open, what each client is owed: the I/O thread's state.

hear    what a client sent → a reply, or a request for the engine
take    what the engine did → what clients are to be sent
send    what is due, as far as there is room
submit  what was heard → the engine, once its `accepted` is on its way
bury    who has vanished → their requests are stopped
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections import Counter
from collections.abc import Callable

from edgellm.errors import (
    BadRequest,
    InternalError,
    Loading,
    NotFound,
    Overloaded,
    RequestError,
    ShuttingDown,
)
from edgellm.protocol import (
    Cancel,
    CancelReply,
    Chat,
    Error,
    Generate,
    Health,
    HealthReply,
    Limit,
    Model,
    Phase,
    PriorityName,
    Reply,
    Request,
    Resume,
    Status,
    StatusReply,
    Suspend,
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
from edgellm.server.gate import LOADING_RETRY_MS, Gate
from edgellm.server.router import Incoming, Router, Sent
from edgellm.server.served import EngineHandle, GovernorHandle, ServedModel
from edgellm.server.statistics import Statistics
from edgellm.server.stream import Stream
from edgellm.server_config import ServerConfig

log = logging.getLogger(__name__)

QUEUE_FULL_RETRY_MS = 1_000
"""What an overloaded client is told before any request has ended to go by."""

PRIORITY_NAMES: dict[Priority, PriorityName] = {
    Priority.CRITICAL: "critical",
    Priority.HIGH: "high",
    Priority.NORMAL: "normal",
    Priority.BACKGROUND: "background",
}


class Exchange:
    """The traffic between clients and the engine. Used by the I/O thread alone, but for what is said below.

    Attributes:
        phase, progress, draining: may be set from any thread.
        open: requests that the engine has not ended, by key; its length may be read from any thread.
        unsent: connections that something is due to.
    """

    def __init__(self, config: ServerConfig, router: Router, clock: Callable[[], float]) -> None:
        self.phase = "start"
        self.progress = 0.0
        self.draining = False
        self.open: dict[int, tuple[Stream, Connection]] = {}
        self.unsent: dict[bytes, Connection] = {}
        self._config = config
        self._router = router
        self._clock = clock
        self._statistics = Statistics(clock)
        self._access = Access(config)
        self._gate = Gate(clock)
        self._served: tuple[ServedModel, EngineHandle] | None = None
        self._connections: dict[bytes, Connection] = {}
        self._routes: dict[int, bytes] = {}  # descriptor → route
        self._keys = itertools.count(1)
        self._admitted: list[engine_side.Request] = []
        self._counts: Counter[str] = Counter()
        self._mean_s: float | None = None  # of a request, arrival to end; moving

    def serve(self, model: ServedModel, engine: EngineHandle) -> None:
        """The engine is ready. May be called from any thread."""
        self.phase, self.progress = "ready", 1.0
        self._served = model, engine

    def govern(self, governor: GovernorHandle) -> None:
        """From now on the governor's decision admits requests. May be called from any thread."""
        self._gate.governor = governor

    @property
    def state(self) -> Phase:
        """What `health` says."""
        if self.draining:
            return "draining"
        return "loading" if self._served is None else "ready"

    # What clients send.

    def hear(self, incoming: Incoming) -> None:
        """Take a message: it is answered, or it opens a request that will be."""
        connection = self._connection(incoming)
        if connection is None:
            return
        try:
            reply = self._handle(connection, incoming)
        except RequestError as error:
            reply = self._refusal(incoming, error)
        except Exception as error:
            log_failure(f"a request of {connection.peer.party}", error)
            reply = self._refusal(
                incoming, InternalError("the daemon failed on this request; its log says why")
            )
        if reply is not None:
            connection.reply(reply, incoming.delimited)
        self.unsent[connection.route] = connection

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
        log.debug("client %s: %s", incoming.route.hex(), incoming.peer)
        return connection

    def _refusal(self, incoming: Incoming, error: RequestError) -> Error:
        self._counts[error.code] += 1
        return error_reply(peek_id(incoming.payload), error)

    def _handle(self, connection: Connection, incoming: Incoming) -> Reply | None:
        """Answer a message, or open a request and answer later."""
        if incoming.problem is not None:
            # Not raised: its traceback would lead back to the message, and both would stay until the
            # collector comes, megabytes each.
            return self._refusal(incoming, incoming.problem)
        request: Request = decode_request(incoming.payload)
        match request:
            case Chat() | Generate():
                self._open_request(connection, request, incoming.delimited)
                return None
            case Cancel():
                return self._cancel(connection, request)
            case Limit() | Suspend() | Resume():
                return self._gate.take(connection.peer, connection.grant, request)
            case Tokenize() | Status() | Health() | Model():
                return self._inform(request)

    def _inform(self, request: Tokenize | Status | Health | Model) -> Reply:
        match request:
            case Tokenize():
                return TokenizeReply(id=request.id, tokens=tokenize(self._ready()[0], request).tolist())
            case Status():
                return self.status(request.id)
            case Health():
                return HealthReply(id=request.id, status=self.state, phase=self.phase, progress=self.progress)
            case Model():
                return self._ready()[0].describe(request.id)

    def _ready(self) -> tuple[ServedModel, EngineHandle]:
        if self._served is None:
            raise Loading(
                f"the engine is loading ({self.phase}, {self.progress:.0%})", retry_after_ms=LOADING_RETRY_MS
            )
        return self._served

    def _open_request(self, connection: Connection, request: Chat | Generate, delimited: bool) -> None:
        arrival = self._clock()
        if request.id in connection.streams:
            raise BadRequest("a request with this id is open on this connection", field="id")
        if self.draining:
            raise ShuttingDown("the daemon is stopping and takes no new requests")
        model, _ = self._ready()
        priority = connection.grant.cap(request.priority)
        self._gate.check(priority)
        self._check_room(connection, model.max_batch_size)
        admitted = admit(model, request, self._config.default_max_tokens)
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
            # What `generate` gives continues the prompt.
            strip_space=isinstance(request, Chat) and model.tokenizer.strips_space,
        )
        self._admitted.append(
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
        self.open[stream.key] = stream, connection
        self._access.opened(connection.grant)
        self._counts["accepted"] += 1
        connection.streams[request.id] = stream
        connection.wake(stream)

    def _check_room(self, connection: Connection, slots: int) -> None:
        retry_after_ms = QUEUE_FULL_RETRY_MS
        if self._mean_s is not None:  # of the slots, one ends its request about every mean / slots
            retry_after_ms = int(min(max(1000 * self._mean_s / slots, 10), 60_000))
        if len(self.open) >= slots + self._config.max_queue:
            raise Overloaded(
                f"{len(self.open)} requests are open: {slots} slots and a queue of {self._config.max_queue}"
                " (server.max_queue)",
                retry_after_ms=retry_after_ms,
            )
        self._access.check(connection.grant, len(connection.streams), retry_after_ms)

    def _cancel(self, connection: Connection, request: Cancel) -> CancelReply:
        stream = connection.streams.get(request.target)
        if stream is None or stream.ended:
            raise NotFound(
                "no request with this id is open on this connection; it may just have ended", field="target"
            )
        self.submit()  # the target may be among them
        self._stop(stream, Finish.CANCELLED)
        return CancelReply(id=request.id, target=request.target)

    def status(self, id_: str | int | None = None) -> StatusReply:
        """Counters, and how things are."""
        return self._statistics.gather(
            id_,
            status=self.state,
            clients=len(self._connections),
            requests=self._counts,
            served=self._served,
            governor=self._gate.governor,
        )

    # What the engine is asked, and what it does.

    def submit(self) -> None:
        """Hand what was heard to the engine.

        After `send`: the engine begins at once, and then takes the cores that `accepted` needs to leave.
        """
        admitted, self._admitted = self._admitted, []
        for request in admitted:
            connection = self.open[request.key][1]
            if self._connections.get(connection.route) is not connection:  # vanished meanwhile
                self.take([Update(request.key, finish=Finish.CANCELLED)])
                continue
            try:
                self._ready()[1].submit(request)
            except Exception as error:
                log_failure("handing a request to the engine", error)
                self.take([Update(request.key, finish=Finish.FAULT)])

    def take(self, updates: list[Update]) -> None:
        """Take what a step gave."""
        now = self._clock()
        for update in updates:
            opened = self.open.get(update.key)
            if opened is None:  # ended by end_all
                continue
            stream, connection = opened
            going_on = stream.matched is None
            stream.take(update, now)
            if stream.ended:
                self._settle(stream, connection, now)
            elif going_on and stream.matched is not None:
                self._stop(stream, Finish.STOP)
            if self._connections.get(connection.route) is connection:
                connection.wake(stream)
                self.unsent[connection.route] = connection

    def end_all(self, finish: Finish) -> None:
        """End every open request without asking the engine."""
        self.take([Update(key=key, finish=finish) for key in list(self.open)])

    def _settle(self, stream: Stream, connection: Connection, now: float) -> None:
        """The engine is done with a request."""
        del self.open[stream.key]
        self._access.closed(connection.grant)
        self._counts[stream.outcome] += 1
        took = now - stream.arrival
        log.info(
            "a request ended: %s after %.2f s",
            stream.outcome,
            took,
            extra={"REQUEST_ID": stream.id, "CLIENT": str(connection.peer)},
        )
        self._mean_s = took if self._mean_s is None else 0.9 * self._mean_s + 0.1 * took

    def _stop(self, stream: Stream, finish: Finish) -> None:
        if self._served is not None:
            self._served[1].stop(stream.key, finish)

    # What clients are sent, and who is gone.

    def send(self) -> None:
        """Send what is due. Who has no room is tried again next time."""
        for connection in list(self.unsent.values()):
            if self._connections.get(connection.route) is not connection or self._send_to(connection):
                del self.unsent[connection.route]

    def bury(self) -> None:
        """Stop the requests of clients that have vanished."""
        for descriptor in self._router.vanished():
            if (route := self._routes.get(descriptor)) is not None:
                self._lose(self._connections[route])

    def _send_to(self, connection: Connection) -> bool:
        """Send until nothing is left, or nobody to send it to (true), or no room (false)."""
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
        peer = connection.peer
        log.warning("a client does not read its answers and is dropped: %s", peer)
        self._lose(connection)
        self.bury()  # so that the descriptor is known to be this connection's still
        self._router.hang_up(connection.descriptor, peer)
        return True

    def _lose(self, connection: Connection) -> None:
        """A connection is gone: nobody waits for its requests."""
        del self._connections[connection.route]
        del self._routes[connection.descriptor]
        for stream in connection.streams.values():
            if not stream.ended:
                self._stop(stream, Finish.CANCELLED)
        connection.streams.clear()


def log_failure(where: str, error: Exception) -> None:
    """Log where something failed, but not the exception's own words: they may quote a prompt."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", where, type(error).__name__, trace)

"""The blocking client."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import zmq

from edgellm.client import requests
from edgellm.client.answers import Answer, Delta, Health, Model, Status, read, read_answer, read_delta
from edgellm.client.requests import Messages, Options
from edgellm.client.session import Reply, Session
from edgellm.endpoint import default_endpoint
from edgellm.errors import (
    ClientError,
    ConnectionLost,
    EdgellmError,
    Loading,
    RequestTimeout,
    ShuttingDown,
    Unreachable,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

LINGER_MS = 200
"""How long closing waits for a last cancel to leave."""

READY_POLL_S = 0.05

INTERRUPT_S = 0.25
"""Longest sleep in libzmq: a Ctrl-C that arrives on the way into it is only seen when it returns."""

WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
"""What a client wants to be told of its connection."""


class Client:
    """Asks an edgellm daemon. For one thread at a time; several streams may be open and read in turn.

    Connects when first used, and again after the daemon was gone. With several endpoints the first whose
    daemon is ready is used until it goes away or stops; a request that it then refuses goes to the next.

    Args:
        endpoints: where to look, in order; by default `edgellm.endpoint.default_endpoint()`.
        timeout: seconds to wait for the next message of an answer: all of it, where it is not streamed.
        connect_timeout: seconds for a daemon to take a request.

    Raises:
        RequestError: the daemon refused or ended the request; one subclass for each code of the protocol.
        RequestTimeout, Unreachable, ConnectionLost, ProtocolError: there was no answer. All methods that
            ask something raise these.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        timeout: float = 120.0,
        connect_timeout: float = 2.0,
    ) -> None:
        self.endpoints = listed(endpoints)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._context = zmq.Context()
        self._link: _Link | None = None

    def chat(self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]) -> Answer:
        """Answer a conversation, or a single question."""
        return read_answer(self._ask(requests.chat(messages, False, options), timeout))

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Continue a text, or token ids as they are."""
        return read_answer(self._ask(requests.generate(prompt, False, options), timeout))

    def stream_chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Stream:
        """Like `chat`, piece by piece."""
        return Stream(self, requests.chat(messages, True, options), self._wait(timeout))

    def stream_generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Stream:
        """Like `generate`, piece by piece."""
        return Stream(self, requests.generate(prompt, True, options), self._wait(timeout))

    def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None, timeout: float | None = None
    ) -> list[int]:
        """Token ids of a text, or of a conversation as the chat template writes it."""
        tokens: list[int] = self._ask(requests.tokenize(text, messages), timeout)["tokens"]
        return tokens

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether the daemon serves, or how far it is. With several endpoints: of the first that answers."""
        link = self._connected(any_phase=True)
        return read(Health, link.ask({"op": "health"}, self._wait(timeout)))

    def status(self, *, timeout: float | None = None) -> Status:
        """Counters, queue and slots."""
        return read(Status, self._ask({"op": "status"}, timeout))

    def model(self, *, timeout: float | None = None) -> Model:
        """What is being served."""
        return read(Model, self._ask({"op": "model"}, timeout))

    def wait_ready(self, timeout: float) -> Health:
        """Wait until a daemon is ready; it need not even have been started.

        Raises:
            RequestTimeout: none was in time; says what was heard last.
        """
        end = time.monotonic() + timeout
        heard = "nothing answered"
        while (left := end - time.monotonic()) > 0:
            for endpoint in self.endpoints:
                try:
                    with contextlib.closing(_Link(self._context, endpoint, min(left, 1.0))) as link:
                        health = read(Health, link.ask({"op": "health"}, min(left, 1.0)))
                except ClientError:
                    continue
                if health.ready:
                    return health
                heard = f"{health.status}, {health.phase} {health.progress:.0%}"
            time.sleep(min(READY_POLL_S, max(0.0, end - time.monotonic())))
        raise RequestTimeout(
            f"no daemon is ready at {', '.join(self.endpoints)} after {timeout:g} s: {heard}"
        )

    def close(self) -> None:
        """Close the connection: what is still open ends at the daemon. Idempotent."""
        self._disconnect()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout

    def _ask(self, fields: dict[str, Any], timeout: float | None) -> Reply:
        """One request, one reply; where a daemon refuses because it comes or goes, the next one is asked."""
        try:
            return self._connected().ask(fields, self._wait(timeout))
        except (Loading, ShuttingDown):
            if len(self.endpoints) == 1:
                raise
            self._disconnect()
            return self._connected().ask(fields, self._wait(timeout))

    def _connected(self, *, any_phase: bool = False) -> _Link:
        if self._link is not None and self._link.lost():
            self._disconnect()
        if self._link is None:
            self._link = self._choose(any_phase)
        return self._link

    def _choose(self, any_phase: bool) -> _Link:
        if len(self.endpoints) == 1:
            return _Link(self._context, self.endpoints[0], self._connect_timeout)
        heard = []
        for endpoint in self.endpoints:
            link = _Link(self._context, endpoint, self._connect_timeout)
            try:
                health = read(Health, link.ask({"op": "health"}, self._connect_timeout))
                if health.ready or any_phase:
                    return link
                heard.append(f"{endpoint} is {health.status}")
            except EdgellmError as error:
                heard.append(str(error))
            link.close()
        raise Unreachable("no daemon is ready: " + "; ".join(heard))

    def _disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class Stream:
    """An answer as it is made: iterate for `Delta`s, then `answer` has the whole. Leaving early cancels it.

    Use it in a `with` block, so that leaving the block ends the request at the daemon too.
    """

    def __init__(self, client: Client, fields: dict[str, Any], timeout: float) -> None:
        self._client = client
        self._fields = fields
        self._timeout = timeout
        self._link = client._connected()
        self._id: int | None = self._link.send(fields)
        self._begun = False
        self.answer: Answer | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while self._id is not None:
            reply = self._next_reply(self._id)
            if reply["ev"] == "delta":
                self._begun = True
                return read_delta(reply)
            if reply["ev"] == "done":
                self._link.forget(self._id)
                self._id, self.answer = None, read_answer(reply)
        raise StopIteration

    def _next_reply(self, id_: int) -> Reply:
        try:
            return self._link.receive(id_, self._timeout)
        except (Loading, ShuttingDown):
            if len(self._client.endpoints) == 1 or self._begun:
                self._id = None
                raise
            self._client._disconnect()
            self._link = self._client._connected()
            self._id = id_ = self._link.send(self._fields)
            return self._next_reply(id_)
        except EdgellmError:
            self._id = None
            raise

    def close(self) -> None:
        """Cancel what is not finished; idempotent."""
        if self._id is not None:
            self._link.cancel(self._id)
            self._id = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_id", None) is not None:
            self.close()


class _Link:
    """A DEALER to one endpoint, and what is open on it."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, connect_timeout: float
    ) -> None:
        self.endpoint = endpoint
        self._connect_timeout = connect_timeout
        self._session = Session()
        self._greeted = False
        self._gone = False
        self._socket = dealer(context)
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        connect(self._socket, endpoint, self.close)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def ask(self, fields: dict[str, Any], timeout: float) -> Reply:
        id_ = self.send(fields)
        try:
            reply = self.receive(id_, timeout)
        except BaseException as error:
            if not isinstance(error, EdgellmError):  # KeyboardInterrupt: nobody waits for the answer any more
                self.cancel(id_)
            raise
        self.forget(id_)
        return reply

    def send(self, fields: dict[str, Any]) -> int:
        end = time.monotonic() + self._connect_timeout
        while not self._greeted:
            self._monitor.poll(max(0, int(1000 * (end - time.monotonic()))))
            self._read()
            if not self._greeted and time.monotonic() >= end:
                raise Unreachable(f"nothing serves at {self.endpoint}")
        if not self._socket.poll(max(0, int(1000 * (end - time.monotonic()))), zmq.POLLOUT):
            raise Unreachable(f"the daemon at {self.endpoint} takes no requests")
        id_, payload = self._session.open(fields)
        self._socket.send(payload)
        return id_

    def receive(self, id_: int, timeout: float) -> Reply:
        """The next reply to a request; the request is over when this raises."""
        end = time.monotonic() + timeout
        while True:
            if (reply := self._session.take(id_)) is not None:
                return reply
            left = end - time.monotonic()
            if left <= 0:
                self.cancel(id_)
                raise RequestTimeout(f"{self.endpoint} did not answer within {timeout:g} s")
            self._poller.poll(int(1000 * min(left, INTERRUPT_S)) + 1)
            self._read()

    def cancel(self, id_: int) -> None:
        """Give a request up. Does not wait for the daemon to hear it."""
        if not self._socket.closed:
            with contextlib.suppress(zmq.Again):
                self._socket.send(self._session.cancellation(id_), zmq.NOBLOCK)

    def forget(self, id_: int) -> None:
        self._session.close(id_)

    def lost(self) -> bool:
        """Whether the daemon is gone, as far as is known without asking it."""
        if not self._gone:
            self._read()
        return self._gone

    def _read(self) -> None:
        # What happened is asked first and what arrived second: a daemon's last words come before its end.
        gone = False
        with contextlib.suppress(zmq.Again):
            while True:
                self._greeted, lost = heard(self._monitor.recv_multipart(zmq.NOBLOCK), self._greeted)
                gone = gone or lost
        with contextlib.suppress(zmq.Again):
            while True:
                self._session.feed(self._socket.recv(zmq.NOBLOCK))
        if gone and not self._gone:
            self._gone = True
            self._session.fail(ConnectionLost(f"the daemon at {self.endpoint} went away"))

    def close(self) -> None:
        gone, self._gone = self._gone, True
        self._session.fail(ConnectionLost(f"the connection to {self.endpoint} was closed"))
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._socket.close(linger=0 if gone else LINGER_MS)
            self._monitor.close(linger=0)


def listed(endpoints: str | Sequence[str] | None) -> list[str]:
    """The endpoints to try, in order."""
    if endpoints is None:
        return [default_endpoint()]
    return [endpoints] if isinstance(endpoints, str) else list(endpoints)


def dealer(context: zmq.Context[Any]) -> Any:
    """A DEALER as both clients use it.

    IMMEDIATE stays off: with it libzmq loses what a daemon said last before it left.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
    return socket


def heard(event: list[bytes], greeted: bool) -> tuple[bool, bool]:
    """What a monitor's event means: whether the daemon has been met, and whether it is gone again."""
    (number,) = struct.unpack_from("=H", event[0])  # zmq_socket_monitor(3)
    return greeted or number == zmq.EVENT_HANDSHAKE_SUCCEEDED, greeted and number == zmq.EVENT_DISCONNECTED


def connect(socket: Any, endpoint: str, close: Any) -> None:
    """Connect, which only a malformed endpoint can fail.

    Raises:
        Unreachable: saying how an endpoint is written.
    """
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        close()
        raise Unreachable(f"{endpoint!r} is not an endpoint ({error.strerror}): use ipc://PATH") from None

"""The asyncio client: many requests at once over one connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from edgellm.client import requests
from edgellm.client.answers import Answer, Delta, Health, Model, Status, read, read_answer, read_delta
from edgellm.client.client import LINGER_MS, READY_POLL_S, WATCHED, connect, dealer, heard, listed
from edgellm.client.requests import Messages, Options
from edgellm.client.session import Reply, Session
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


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited, any number at a time. Belongs to one event loop.

    A task that is cancelled while it waits for an answer cancels the request at the daemon.

    Args, Raises: as `Client`.
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
        self._context = zmq.asyncio.Context()
        self._link: _AsyncLink | None = None
        self._choosing = asyncio.Lock()

    async def chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Answer a conversation, or a single question."""
        return read_answer(await self._ask(requests.chat(messages, False, options), timeout))

    async def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Continue a text, or token ids as they are."""
        return read_answer(await self._ask(requests.generate(prompt, False, options), timeout))

    def stream_chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Like `chat`, piece by piece."""
        return AsyncStream(self, requests.chat(messages, True, options), self._wait(timeout))

    def stream_generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Like `generate`, piece by piece."""
        return AsyncStream(self, requests.generate(prompt, True, options), self._wait(timeout))

    async def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None, timeout: float | None = None
    ) -> list[int]:
        """Token ids of a text, or of a conversation as the chat template writes it."""
        tokens: list[int] = (await self._ask(requests.tokenize(text, messages), timeout))["tokens"]
        return tokens

    async def health(self, *, timeout: float | None = None) -> Health:
        """Whether the daemon serves, or how far it is. With several endpoints: of the first that answers."""
        link = await self._connected(any_phase=True)
        return read(Health, await link.ask({"op": "health"}, self._wait(timeout)))

    async def status(self, *, timeout: float | None = None) -> Status:
        """Counters, queue and slots."""
        return read(Status, await self._ask({"op": "status"}, timeout))

    async def model(self, *, timeout: float | None = None) -> Model:
        """What is being served."""
        return read(Model, await self._ask({"op": "model"}, timeout))

    async def wait_ready(self, timeout: float) -> Health:
        """Wait until a daemon is ready; it need not even have been started.

        Raises:
            RequestTimeout: none was in time; says what was heard last.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        heard = "nothing answered"
        while (left := end - loop.time()) > 0:
            for endpoint in self.endpoints:
                link = _AsyncLink(self._context, endpoint, min(left, 1.0))
                try:
                    health = read(Health, await link.ask({"op": "health"}, min(left, 1.0)))
                except ClientError:
                    continue
                finally:
                    await link.close()
                if health.ready:
                    return health
                heard = f"{health.status}, {health.phase} {health.progress:.0%}"
            await asyncio.sleep(min(READY_POLL_S, max(0.0, end - loop.time())))
        raise RequestTimeout(
            f"no daemon is ready at {', '.join(self.endpoints)} after {timeout:g} s: {heard}"
        )

    async def close(self) -> None:
        """Close the connection: what is still open ends at the daemon. Idempotent."""
        if self._link is not None:
            await self._link.close()
            self._link = None
        self._context.term()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _wait(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout

    async def _ask(self, fields: dict[str, Any], timeout: float | None) -> Reply:
        """One request, one reply; where a daemon refuses because it comes or goes, the next one is asked."""
        link = await self._connected()
        try:
            return await link.ask(fields, self._wait(timeout))
        except (Loading, ShuttingDown):
            if len(self.endpoints) == 1:
                raise
            link = await self._connected(instead_of=link)
            return await link.ask(fields, self._wait(timeout))

    async def _connected(
        self, *, any_phase: bool = False, instead_of: _AsyncLink | None = None
    ) -> _AsyncLink:
        """The connection in use; a new one if it is lost, or is `instead_of`.

        One that is given up for another stays open for the requests that are still on it.
        """
        async with self._choosing:
            if self._link is not None and (self._link.gone or self._link is instead_of):
                self._link.retire()
                self._link = None
            if self._link is None:
                self._link = await self._choose(any_phase)
            return self._link

    async def _choose(self, any_phase: bool) -> _AsyncLink:
        if len(self.endpoints) == 1:
            return _AsyncLink(self._context, self.endpoints[0], self._connect_timeout)
        heard = []
        for endpoint in self.endpoints:
            link = _AsyncLink(self._context, endpoint, self._connect_timeout)
            try:
                health = read(Health, await link.ask({"op": "health"}, self._connect_timeout))
                if health.ready or any_phase:
                    return link
                heard.append(f"{endpoint} is {health.status}")
            except EdgellmError as error:
                heard.append(str(error))
            await link.close()
        raise Unreachable("no daemon is ready: " + "; ".join(heard))


class AsyncStream:
    """An answer as it is made: iterate for `Delta`s, then `answer` has the whole. Leaving early cancels it.

    Use it in an `async with` block, so that leaving the block ends the request at the daemon too.
    """

    def __init__(self, client: AsyncClient, fields: dict[str, Any], timeout: float) -> None:
        self._client = client
        self._fields = fields
        self._timeout = timeout
        self._link: _AsyncLink | None = None
        self._id: int | None = None
        self._begun = False
        self._over = False
        self.answer: Answer | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._over:
            reply = await self._next_reply()
            if reply["ev"] == "delta":
                self._begun = True
                return read_delta(reply)
            if reply["ev"] == "done":
                self._end()
                self.answer = read_answer(reply)
        raise StopAsyncIteration

    async def _next_reply(self) -> Reply:
        try:
            if self._link is None or self._id is None:
                self._link = await self._client._connected()
                self._id = await self._link.send(self._fields)
            return await self._link.receive(self._id, self._timeout)
        except (Loading, ShuttingDown):
            if len(self._client.endpoints) == 1 or self._begun:
                self._over = True
                raise
            self._link = await self._client._connected(instead_of=self._link)
            self._id = None
            return await self._next_reply()
        except EdgellmError:
            self._over = True
            raise

    def _end(self) -> None:
        self._over = True
        if self._link is not None and self._id is not None:
            self._link.forget(self._id)

    async def close(self) -> None:
        """Cancel what is not finished; idempotent."""
        if not self._over and self._link is not None and self._id is not None:
            self._link.cancel(self._id)
        self._over = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _AsyncLink:
    """A DEALER to one endpoint, what is open on it, and the tasks that read it."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, connect_timeout: float) -> None:
        self.endpoint = endpoint
        self.gone = False
        self._connect_timeout = connect_timeout
        self._session = Session()
        self._news: dict[int, asyncio.Event] = {}
        self._retired = False
        self._socket: zmq.asyncio.Socket = dealer(context)
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        self._greeted = asyncio.Event()
        connect(self._socket, endpoint, self._close_sockets)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    async def ask(self, fields: dict[str, Any], timeout: float) -> Reply:
        id_ = await self.send(fields)
        try:
            reply = await self.receive(id_, timeout)
        except asyncio.CancelledError:  # nobody waits for the answer any more
            self.cancel(id_)
            raise
        self.forget(id_)
        return reply

    async def send(self, fields: dict[str, Any]) -> int:
        if self.gone:
            raise ConnectionLost(f"the daemon at {self.endpoint} went away")
        try:
            await asyncio.wait_for(self._greeted.wait(), self._connect_timeout)
        except asyncio.TimeoutError:
            raise Unreachable(f"nothing serves at {self.endpoint}") from None
        id_, payload = self._session.open(fields)
        self._news[id_] = asyncio.Event()
        try:
            await asyncio.wait_for(self._socket.send(payload), self._connect_timeout)
        except asyncio.TimeoutError:
            self.forget(id_)
            raise Unreachable(f"the daemon at {self.endpoint} takes no requests") from None
        except BaseException:
            self.cancel(id_)
            raise
        return id_

    async def receive(self, id_: int, timeout: float) -> Reply:
        """The next reply to a request; the request is over when this raises anything of edgellm's."""
        news = self._news[id_]
        while True:
            try:
                reply = self._session.take(id_)
            except EdgellmError:
                self.forget(id_)
                raise
            if reply is not None:
                return reply
            news.clear()
            try:
                await asyncio.wait_for(news.wait(), timeout)
            except asyncio.TimeoutError:
                self.cancel(id_)
                raise RequestTimeout(f"{self.endpoint} did not answer within {timeout:g} s") from None

    def cancel(self, id_: int) -> None:
        """Give a request up. Does not wait for the daemon to hear it."""
        if not self._socket.closed:
            # An asyncio socket sends at once what there is room for; if there is none, the daemon is stuck.
            sent = self._socket.send(self._session.cancellation(id_), zmq.NOBLOCK)
            asyncio.ensure_future(sent).add_done_callback(_ignore)
        self.forget(id_)

    def forget(self, id_: int) -> None:
        self._session.close(id_)
        self._news.pop(id_, None)
        if self._retired and not self._news:
            self._stop()

    def retire(self) -> None:
        """Close as soon as nothing is open."""
        self._retired = True
        if not self._news:
            self._stop()

    async def close(self) -> None:
        """Close now; what is open ends with ConnectionLost."""
        tasks = list(self._tasks)
        self._stop()
        self._fail(ConnectionLost(f"the connection to {self.endpoint} was closed"))
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                self._tell(self._session.feed(await self._socket.recv()))
        except EdgellmError as error:
            self._fail(error)

    async def _watch(self) -> None:
        gone = False
        while not gone:
            greeted, gone = heard(await self._monitor.recv_multipart(), self._greeted.is_set())
            if greeted:
                self._greeted.set()
        # The daemon's last words may have arrived and not been read yet.
        while await self._socket.poll(0):
            await asyncio.sleep(0)
        self._fail(ConnectionLost(f"the daemon at {self.endpoint} went away"))

    def _tell(self, id_: int | None) -> None:
        if id_ is not None and (news := self._news.get(id_)) is not None:
            news.set()

    def _fail(self, error: EdgellmError) -> None:
        self.gone = True
        for id_ in self._session.fail(error):
            self._tell(id_)

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self._close_sockets()

    def _close_sockets(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._socket.close(linger=0 if self.gone else LINGER_MS)
            self._monitor.close(linger=0)


def _ignore(sent: asyncio.Future[Any]) -> None:
    with contextlib.suppress(zmq.ZMQError, asyncio.CancelledError):
        sent.result()

"""A connection to one daemon, for asyncio: a DEALER, what is open on it, and the tasks that read it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import zmq
import zmq.asyncio

from edgellm.client.link import LINGER_MS, WATCHED, connect, dealer, heard, obstacle, unknown_key
from edgellm.client.session import Reply, Session
from edgellm.curve import CurveKeys
from edgellm.errors import ConnectionLost, EdgellmError, RequestTimeout, Unreachable


class AsyncLink:
    """A DEALER to one endpoint, what is open on it, and the tasks that read it."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        connect_timeout: float,
        curve: CurveKeys | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.gone = False
        self._connect_timeout = connect_timeout
        self._session = Session()
        self._news: dict[int, asyncio.Event] = {}
        self._retired = False
        self._refused = False
        self._socket: zmq.asyncio.Socket = dealer(context)
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        self._greeted = asyncio.Event()
        connect(self._socket, endpoint, self._close_sockets, curve)
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
            raise Unreachable(obstacle(self.endpoint)) from None
        if self._refused:
            raise Unreachable(unknown_key(self.endpoint))
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
        if not self._greeted.is_set():
            self._refused = self.gone = True
            self._greeted.set()  # so that nobody waits for it
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

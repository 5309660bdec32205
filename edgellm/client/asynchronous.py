"""The asyncio client: many requests at once over one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import zmq.asyncio

from edgellm.client import requests
from edgellm.client.answers import (
    Answer,
    Decision,
    Delta,
    Health,
    Model,
    Status,
    read,
    read_answer,
    read_delta,
)
from edgellm.client.asynchronous_link import AsyncLink
from edgellm.client.client import READY_POLL_S, not_ready
from edgellm.client.link import listed, obstacle, worth_trying
from edgellm.client.requests import Messages, Options
from edgellm.client.session import Reply
from edgellm.curve import CurveKeys
from edgellm.errors import (
    ClientError,
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
        curve: CurveKeys | None = None,
    ) -> None:
        self.endpoints = listed(endpoints)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._curve = curve
        self._context = zmq.asyncio.Context()
        self._link: AsyncLink | None = None
        self._choosing = asyncio.Lock()

    @property
    def endpoint(self) -> str | None:
        """The one of `endpoints` that is in use; None before anything was asked."""
        return None if self._link is None else self._link.endpoint

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

    async def limit(
        self,
        *,
        batch_cap: int | None = None,
        duty: float | None = None,
        ttl_ms: int | None = None,
        timeout: float | None = None,
    ) -> Decision:
        """Put a ceiling on what the model takes, in place of this user's earlier one.

        It outlives the connection: it holds until `resume`, or for `ttl_ms`. Needs `may_limit` in a rule.

        Args:
            batch_cap: requests that advance at once; 0: none.
            duty: share of the time in which the model runs, 0…1.
        """
        return read(Decision, await self._ask(requests.limit(batch_cap, duty, ttl_ms), timeout))

    async def suspend(self, *, ttl_ms: int | None = None, timeout: float | None = None) -> Decision:
        """Let nothing run from the next step on, until `resume` or for `ttl_ms`: a `limit` of 0."""
        return read(Decision, await self._ask(requests.suspend(ttl_ms), timeout))

    async def resume(self, *, everyone: bool = False, timeout: float | None = None) -> Decision:
        """Take back what this user asked for with `limit` and `suspend`, or what everyone did."""
        return read(Decision, await self._ask(requests.resume(everyone), timeout))

    async def wait_ready(self, timeout: float) -> Health:
        """Wait until a daemon is ready; it need not even have been started.

        Raises:
            RequestTimeout: none was in time; says what was heard last.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        heard = "nothing answered"
        while (left := end - loop.time()) > 0:
            for endpoint in worth_trying(self.endpoints):
                link = AsyncLink(self._context, endpoint, min(left, 1.0), self._curve)
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
        raise RequestTimeout(not_ready(self.endpoints, timeout, heard))

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

    def _check_open(self) -> None:
        if self._context.closed:
            raise ClientError("this client has been closed: make another one")

    async def _connected(self, *, any_phase: bool = False, instead_of: AsyncLink | None = None) -> AsyncLink:
        """The connection in use; a new one if it is lost, or is `instead_of`.

        One that is given up for another stays open for the requests that are still on it.
        """
        self._check_open()
        async with self._choosing:
            if self._link is not None and (self._link.gone or self._link is instead_of):
                self._link.retire()
                self._link = None
            if self._link is None:
                self._link = await self._choose(any_phase)
            return self._link

    async def _choose(self, any_phase: bool) -> AsyncLink:
        if len(self.endpoints) == 1:
            return AsyncLink(self._context, self.endpoints[0], self._connect_timeout, self._curve)
        loop = asyncio.get_running_loop()
        end = loop.time() + self._connect_timeout
        while not (present := worth_trying(self.endpoints)) and loop.time() < end:
            await asyncio.sleep(READY_POLL_S)
        heard, answered = [], []
        for endpoint in self.endpoints:
            if endpoint not in present:
                heard.append(obstacle(endpoint))
                continue
            link = AsyncLink(self._context, endpoint, self._connect_timeout, self._curve)
            try:
                health = read(Health, await link.ask({"op": "health"}, self._connect_timeout))
            except EdgellmError as error:
                heard.append(str(error))
                await link.close()
                continue
            answered.append(link)
            if health.ready or any_phase:
                break
            heard.append(f"{endpoint} is {health.status}")
        else:
            if len(answered) != 1:
                for link in answered:
                    await link.close()
                raise Unreachable("no daemon is ready: " + "; ".join(heard))
        *others, chosen = answered
        for link in others:
            await link.close()
        return chosen


class AsyncStream:
    """An answer as it is made: iterate for `Delta`s, then `answer` has the whole. Leaving early cancels it.

    Use it in an `async with` block, so that leaving the block ends the request at the daemon too.
    """

    def __init__(self, client: AsyncClient, fields: dict[str, Any], timeout: float) -> None:
        self._client = client
        self._fields = fields
        self._timeout = timeout
        self._link: AsyncLink | None = None
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

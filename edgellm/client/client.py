"""The blocking client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import zmq

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
from edgellm.client.link import Link, listed, obstacle, worth_trying
from edgellm.client.requests import Messages, Options
from edgellm.client.session import Reply
from edgellm.curve import CurveKeys
from edgellm.endpoint import barrier
from edgellm.errors import (
    BadKeys,
    ClientError,
    EdgellmError,
    Loading,
    RequestTimeout,
    ShuttingDown,
    Unreachable,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

READY_POLL_S = 0.05


class Client:
    """Asks an edgellm daemon. For one thread at a time; several streams may be open and read in turn.

    Connects when first used, and again after the daemon was gone. With several endpoints the first whose
    daemon is ready is used until it goes away or stops; a request that it then refuses goes to the next. If
    only one answers, it is asked whether it is ready or not, and its own refusal is the error.

    Args:
        endpoints: where to look, in order; by default `edgellm.endpoint.client_endpoints()`.
        timeout: seconds to wait for the next message of an answer: all of it, where it is not streamed.
        connect_timeout: seconds for a daemon to take a request.
        curve: keys for tcp; by default those that $EDGELLM_CURVE_SECRET_KEY and $EDGELLM_CURVE_SERVER_KEY
            name.

    Raises:
        RequestError: the daemon refused or ended the request; one subclass for each code of the protocol.
        RequestTimeout, Unreachable, ConnectionLost, BadKeys, ProtocolError: there was no answer. All
            methods that ask something raise these.
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
        self._context = zmq.Context()
        self._link: Link | None = None

    @property
    def endpoint(self) -> str | None:
        """The one of `endpoints` that is in use; None before anything was asked."""
        return None if self._link is None else self._link.endpoint

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

    def limit(
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
        return read(Decision, self._ask(requests.limit(batch_cap, duty, ttl_ms), timeout))

    def suspend(self, *, ttl_ms: int | None = None, timeout: float | None = None) -> Decision:
        """Let nothing run from the next step on, until `resume` or for `ttl_ms`: a `limit` of 0."""
        return read(Decision, self._ask(requests.suspend(ttl_ms), timeout))

    def resume(self, *, everyone: bool = False, timeout: float | None = None) -> Decision:
        """Take back what this user asked for with `limit` and `suspend`, or what everyone did."""
        return read(Decision, self._ask(requests.resume(everyone), timeout))

    def wait_ready(self, timeout: float) -> Health:
        """Wait until a daemon is ready; it need not even have been started.

        Raises:
            RequestTimeout: none was in time; says what was heard last.
        """
        self._check_open()
        end = time.monotonic() + timeout
        heard = "nothing answered"
        while (left := end - time.monotonic()) > 0:
            for endpoint in worth_trying(self.endpoints):
                try:
                    with contextlib.closing(
                        Link(self._context, endpoint, min(left, 1.0), self._curve)
                    ) as link:
                        health = read(Health, link.ask({"op": "health"}, min(left, 1.0)))
                except BadKeys:
                    raise
                except ClientError:
                    continue
                if health.ready:
                    return health
                heard = f"{health.status}, {health.phase} {health.progress:.0%}"
            time.sleep(min(READY_POLL_S, max(0.0, end - time.monotonic())))
        raise RequestTimeout(not_ready(self.endpoints, timeout, heard))

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

    def _check_open(self) -> None:
        if self._context.closed:
            raise ClientError("this client has been closed: make another one")

    def _connected(self, *, any_phase: bool = False) -> Link:
        self._check_open()
        if self._link is not None and self._link.lost():
            self._disconnect()
        if self._link is None:
            self._link = self._choose(any_phase)
        return self._link

    def _choose(self, any_phase: bool) -> Link:
        if len(self.endpoints) == 1:
            return Link(self._context, self.endpoints[0], self._connect_timeout, self._curve)
        end = time.monotonic() + self._connect_timeout
        while not (present := worth_trying(self.endpoints)) and time.monotonic() < end:
            time.sleep(READY_POLL_S)
        heard, answered = [], []
        for endpoint in self.endpoints:
            if endpoint not in present:
                heard.append(obstacle(endpoint))
                continue
            link = Link(self._context, endpoint, self._connect_timeout, self._curve)
            try:
                health = read(Health, link.ask({"op": "health"}, self._connect_timeout))
            except EdgellmError as error:
                heard.append(str(error))
                link.close()
                continue
            answered.append(link)
            if health.ready or any_phase:
                break
            heard.append(f"{endpoint} is {health.status}")
        else:
            if len(answered) != 1:
                for link in answered:
                    link.close()
                raise Unreachable("no daemon is ready: " + "; ".join(heard))
        *others, chosen = answered
        for link in others:
            link.close()
        return chosen

    def _disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


def not_ready(endpoints: Sequence[str], timeout: float, heard: str) -> str:
    """What to say when waiting was in vain."""
    barred = "".join(f"; {reason}" for each in endpoints if (reason := barrier(each)))
    return f"no daemon is ready at {', '.join(endpoints)} after {timeout:g} s: {heard}{barred}"


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

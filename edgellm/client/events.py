"""What a daemon publishes: changes of state as they happen, and statistics once a second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import msgpack
import zmq

from edgellm.client.answers import StateChange, Statistics, read
from edgellm.client.link import INTERRUPT_S, connect, listed, worth_trying
from edgellm.client.session import VERSION
from edgellm.curve import CurveKeys
from edgellm.endpoint import barrier, events_endpoint
from edgellm.errors import ClientError, ProtocolError, RequestTimeout

if TYPE_CHECKING:
    from typing_extensions import Self

Event = StateChange | Statistics

KINDS: dict[str, type[StateChange] | type[Statistics]] = {"state": StateChange, "stats": Statistics}

HIGH_WATER = 64
"""Events that wait for a reader; one that is later misses what comes after."""


def subscribe(
    endpoint: str | None = None,
    *,
    at: str | None = None,
    topics: Sequence[str] = tuple(KINDS),
    silence: float | None = None,
    curve: CurveKeys | None = None,
) -> Events:
    """Listen to a daemon; iterate over what this returns. The daemon need not run yet, and may come and go.

    The first `stats` tells the current state, a second after connecting at the latest.

    Args:
        endpoint: the daemon's; by default the first of `edgellm.endpoint.client_endpoints()` that is there,
            and as long as none is, whichever comes.
        at: where it publishes, if `server.events_endpoint` is configured.
        topics: `state`, `stats` or both.
        silence: seconds without an event that end the iteration with RequestTimeout; None: never.
        curve: keys for tcp, as `Client`'s.

    Raises:
        Unreachable: an endpoint that is none.
        BadKeys: tcp without keys, or with files that hold none.
    """
    places = [at] if at else [events_endpoint(each) for each in listed(endpoint)]
    if len(places) > 1:
        places = worth_trying(places)[:1] or places
    return Events(places, topics=topics, silence=silence, curve=curve)


class Events:
    """An endless iterator of `StateChange`s and `Statistics`; close it, or use `with`. For one thread.

    Whoever reads too slowly misses events: the daemon waits for nobody.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        topics: Sequence[str],
        silence: float | None,
        curve: CurveKeys | None = None,
    ) -> None:
        self.endpoint = ", ".join(endpoints)
        self._endpoints = endpoints
        self._silence = silence
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        for topic in topics:
            self._socket.subscribe(topic)
        for endpoint in endpoints:
            connect(self._socket, endpoint, self.close, curve)

    def receive(self, timeout: float | None = None) -> Event:
        """Wait for the next event.

        Raises:
            RequestTimeout: none came for `timeout` seconds.
            ProtocolError: what publishes there is not an edgellm of this version.
            ClientError: this has been closed.
        """
        if self._socket.closed:
            raise ClientError("this subscription has been closed: make another one")
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = INTERRUPT_S if end is None else min(INTERRUPT_S, end - time.monotonic())
            if self._socket.poll(max(0, int(1000 * left))):
                if (event := _read(self._socket.recv_multipart())) is not None:
                    return event
            elif end is not None and time.monotonic() >= end:
                barred = "".join(f"; {reason}" for each in self._endpoints if (reason := barrier(each)))
                raise RequestTimeout(f"nothing was published at {self.endpoint} within {timeout:g} s{barred}")

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._socket.close()
        self._context.term()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return self.receive(self._silence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(frames: list[bytes]) -> Event | None:
    """A message's event; None for one that a newer daemon has added."""
    try:
        message = msgpack.unpackb(frames[1], strict_map_key=False)
        if message["v"] != VERSION:
            raise ProtocolError(
                f"the daemon publishes in protocol version {message['v']}, this client knows {VERSION}"
            )
        kind = KINDS.get(message["ev"])
        return None if kind is None else read(kind, message)
    except (ValueError, KeyError, IndexError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"what publishes does not speak edgellm's protocol: {error!r}") from error

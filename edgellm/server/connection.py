"""One client's connection: its open requests, and what waits to be sent to it."""

from __future__ import annotations

from collections import deque

from edgellm.protocol import Reply, encode
from edgellm.server.access import Grant, Peer
from edgellm.server.stream import Stream

MAX_WAITING_BYTES = 8 << 20
"""Replies that may wait for a client that does not read; one that asks on beyond it is dropped."""


class Connection:
    """What the server knows of a client. An id belongs to its connection.

    Attributes:
        streams: open requests by the client's id; a request leaves when its final message is sent.
        blocked_since: clock seconds of the first send that found no room, or None while sends go through.
    """

    def __init__(self, route: bytes, descriptor: int, peer: Peer, grant: Grant) -> None:
        self.route = route
        self.descriptor = descriptor
        self.peer = peer
        self.grant = grant
        self.streams: dict[str | int, Stream] = {}
        self.blocked_since: float | None = None
        self._waiting_bytes = 0
        self._replies: deque[tuple[bytes, bool]] = deque()
        self._due: dict[int, Stream] = {}  # by key, in the order in which they had something to say

    @property
    def overrun(self) -> bool:
        """Whether more waits for the client than is kept."""
        return self._waiting_bytes > MAX_WAITING_BYTES

    def reply(self, reply: Reply, delimited: bool) -> None:
        """Queue a reply that is whole by itself."""
        payload = encode(reply)
        self._waiting_bytes += len(payload)
        self._replies.append((payload, delimited))

    def wake(self, stream: Stream) -> None:
        """One of the connection's requests may have something to send."""
        self._due[stream.key] = stream

    def next(self) -> tuple[bytes, bool] | None:
        """The payload that is due and whether it needs a delimiter; the same one until `advance`."""
        if self._replies:
            return self._replies[0]
        while self._due:
            stream = next(iter(self._due.values()))
            if (reply := stream.next()) is not None:
                return encode(reply), stream.delimited
            del self._due[stream.key]
        return None

    def advance(self) -> None:
        """`next`'s payload was sent."""
        if self._replies:
            self._waiting_bytes -= len(self._replies.popleft()[0])
            return
        stream = next(iter(self._due.values()))
        stream.advance()
        if stream.closed:
            del self._due[stream.key]
            if self.streams.get(stream.id) is stream:
                del self.streams[stream.id]

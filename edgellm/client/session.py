"""One connection's protocol state, without a socket: ids, encoding, and which reply is whose."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgpack

from edgellm.errors import REQUEST_ERRORS, BadRequest, EdgellmError, ProtocolError, RequestError

VERSION = 1

Reply = dict[str, Any]


class Session:
    """The requests that are open on a connection, and their replies as they come in.

    `open` gives the bytes to send; `feed` takes bytes received; `take` gives a request's next reply.
    """

    def __init__(self) -> None:
        self._last_id = 0
        self._replies: dict[int, deque[Reply | EdgellmError]] = {}

    def open(self, fields: dict[str, Any]) -> tuple[int, bytes]:
        """Begin a request: its id, and the message to send.

        Raises:
            BadRequest: a field holds what no message can.
        """
        self._last_id += 1
        payload = self._encode(self._last_id, fields)
        self._replies[self._last_id] = deque()
        return self._last_id, payload

    def cancellation(self, target: int) -> bytes:
        """Forget a request: the message that ends it at the daemon, whose answers are then ignored."""
        self.close(target)
        self._last_id += 1
        return self._encode(self._last_id, {"op": "cancel", "target": target})

    def close(self, id_: int) -> None:
        """Forget a request that has ended."""
        self._replies.pop(id_, None)

    def feed(self, payload: bytes) -> int | None:
        """Take a message; the id of the request that it belongs to, or None if nobody waits for it.

        Raises:
            ProtocolError: it is not a reply of this protocol.
        """
        try:
            reply = msgpack.unpackb(payload, strict_map_key=False)
            id_, version = reply["id"], reply["v"]
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"what answers does not speak edgellm's protocol: {error!r}") from error
        if version != VERSION:
            raise ProtocolError(
                f"the daemon answers in protocol version {version}, this client knows {VERSION}"
            )
        if id_ not in self._replies:
            return None
        self._replies[id_].append(_as_error(reply) if reply.get("ev") == "error" else reply)
        return int(id_)

    def take(self, id_: int) -> Reply | None:
        """The request's next reply, or None if there is none yet.

        Raises:
            RequestError: the daemon ended the request with an error.
            ClientError: the connection failed.
        """
        if not (waiting := self._replies[id_]):
            return None
        reply = waiting.popleft()
        if isinstance(reply, EdgellmError):
            self.close(id_)
            raise reply
        return reply

    def fail(self, error: EdgellmError) -> list[int]:
        """The connection is gone: every open request ends with `error`. Gives their ids."""
        for waiting in self._replies.values():
            waiting.append(error)
        return list(self._replies)

    def _encode(self, id_: int, fields: dict[str, Any]) -> bytes:
        try:
            payload: bytes = msgpack.packb({"v": VERSION, "id": id_, **fields})
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"the request cannot be written as MessagePack: {error}") from error
        return payload


def _as_error(reply: Reply) -> RequestError:
    """An `error` message as the exception that the daemon raised; an unknown code as RequestError itself."""
    kind = REQUEST_ERRORS.get(reply.get("code", ""), RequestError)
    return kind(
        str(reply.get("message", "")), field=reply.get("field"), retry_after_ms=reply.get("retry_after_ms")
    )

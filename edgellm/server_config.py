"""The [server] section of the configuration: where to listen, for whom, and how much at once."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from edgellm.protocol import PriorityName


class AccessRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the peers that uid, gid and key name may do. The first rule that fits a peer counts.

    Attributes:
        uid: the peer's user id, or None for any; no peer over tcp has one.
        gid: a group that the peer's user is in, or None for any; no peer over tcp has one.
        key: the name of the peer's key, NAME of NAME.key in curve_clients, or None for any; only peers over
            tcp have one.
        max_priority: requests that wish for more are lowered to this.
        max_requests: open requests of all peers under this rule together, or None for no bound of its own.
        may_limit: whether these peers may limit and suspend the model; root and the daemon's own user
            always may.
    """

    uid: Annotated[int, Meta(ge=0)] | None = None
    gid: Annotated[int, Meta(ge=0)] | None = None
    key: Annotated[str, Meta(min_length=1)] | None = None
    max_priority: PriorityName = "high"
    max_requests: Annotated[int, Meta(ge=0)] | None = None
    may_limit: bool = False


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the socket is offered.

    Attributes:
        endpoint: `ipc://PATH`, or `tcp://ADDRESS:PORT` for clients on other machines, with both curve keys;
            None is `edgellm.endpoint.default_endpoint()`.
        events_endpoint: `ipc://PATH` or `tcp://ADDRESS:PORT` where state changes and statistics are
            published; None: endpoint's path with `.pub` in place of `.sock`, for tcp its port + 1.
        curve_secret_key: the daemon's own NAME.key_secret, readable for its user alone; for tcp.
        curve_clients: directory of the NAME.key of every client that may connect over tcp; read again on
            SIGHUP.
        socket_mode: octal permissions of the socket files.
        socket_group: name or number of the group that owns the socket files, or None to leave it.
        max_message_bytes: a larger request is refused with bad_request.
        max_queue: requests that may wait beside those that hold a slot.
        max_requests_per_client: open requests of one connection.
        default_max_tokens: where a request says nothing; less if the slot has less left.
        send_timeout_s: a client that takes nothing for so long, while something waits for it, is dropped.
        max_priority: for peers that no rule fits.
        rules: by uid, gid and key, first match counts.
    """

    endpoint: str | None = None
    events_endpoint: str | None = None
    curve_secret_key: str | None = None
    curve_clients: str | None = None
    socket_mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$")] = "0660"
    socket_group: str | None = None
    max_message_bytes: Annotated[int, Meta(ge=1024, le=64 << 20)] = 1 << 20
    max_queue: Annotated[int, Meta(ge=0, le=65536)] = 64
    max_requests_per_client: Annotated[int, Meta(ge=1, le=65536)] = 64
    default_max_tokens: Annotated[int, Meta(ge=1)] = 512
    send_timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    max_priority: PriorityName = "high"
    rules: list[AccessRule] = []

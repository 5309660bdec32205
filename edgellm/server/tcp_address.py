"""A tcp endpoint: what of it can be checked before it is bound, and why binding failed."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket

import zmq

from edgellm.errors import ConfigError, OperatorError, TemporaryShortage
from edgellm.server.address import Address

_ENDPOINT = re.compile(r"tcp://(\*|\[[^\[\]]+\]|[^\[\]:/*]+):([1-9]\d{0,4})")


class TcpAddress:
    """A `tcp://ADDRESS:PORT` endpoint. Like `Address`, but the kernel guards it: there is nothing to lock.

    Raises:
        ConfigError: it is none, naming `field` and what would work.
    """

    def __init__(self, endpoint: str, field: str) -> None:
        self.endpoint = endpoint
        self.field = field
        found = _ENDPOINT.fullmatch(endpoint)
        if found is None or int(found[2]) > 65535 or not _is_host(found[1]):
            raise ConfigError(
                f"{field}: {endpoint!r} is not an endpoint: use tcp://ADDRESS:PORT, such as"
                " tcp://192.168.1.10:5570, tcp://[fd00::10]:5570 or, for every interface, tcp://*:5570"
            )
        self.ipv6 = found[1].startswith("[")

    def acquire(self) -> None:
        """See whether this process may have such sockets.

        libzmq looks interfaces up through netlink and aborts the process where that is forbidden (4.3).
        """
        for family in (socket.AF_INET6 if self.ipv6 else socket.AF_INET, socket.AF_NETLINK):
            if (problem := _forbidden(family)) is not None:
                raise ConfigError(
                    f"{self.field}: {self.endpoint} needs {family.name} sockets, which this process may not"
                    f" have ({problem}): switch systemd/drop-ins/tcp.conf on"
                )

    def prepare(self, router: zmq.Socket[bytes]) -> None:
        """Set what the address needs, before it is bound."""
        if self.ipv6:
            router.setsockopt(zmq.IPV6, 1)

    def open_to(self, mode: int, group: str | None) -> None:
        """Keys decide who may connect; modes and groups are for files."""

    def release(self) -> None:
        """There is nothing to let go of."""


def address_of(endpoint: str, field: str) -> Address | TcpAddress:
    """An endpoint of either kind.

    Raises:
        ConfigError: it is neither.
    """
    return (TcpAddress if endpoint.startswith("tcp:") else Address)(endpoint, field)


def bind_error(address: Address | TcpAddress, error: zmq.ZMQError) -> OperatorError:
    """Why binding failed, as whoever runs the daemon should take it."""
    what = f"{address.field}: {address.endpoint} cannot be bound: {error.strerror}"
    if isinstance(address, TcpAddress) and error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        # While booting, the network may still be on its way.
        return TemporaryShortage(f"{what}: no interface has this address now")
    if error.errno == errno.EADDRINUSE:
        what += ": stop what listens there, or name another port"
    return ConfigError(what)


def _forbidden(family: socket.AddressFamily) -> str | None:
    """Why the process may not have sockets of a family; None if it may."""
    try:
        socket.socket(family, socket.SOCK_RAW if family == socket.AF_NETLINK else socket.SOCK_STREAM).close()
    except OSError as error:
        return error.strerror
    return None


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return not any(character.isspace() for character in host)
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True

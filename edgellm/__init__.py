"""edgellm: a language model on an NVIDIA Orin, served to the other processes on the board."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.client import AsyncClient as AsyncClient
    from edgellm.client import Client as Client

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Only who asks for a client imports it: the daemon and its tools have no use for one.
    if name in ("Client", "AsyncClient"):
        import edgellm.client

        return getattr(edgellm.client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a Python vehicle app imports. Needs pyzmq and msgpack, and nothing else of edgellm's dependencies.

from edgellm import Client

with Client() as client:
    print(client.chat("Where is the next charging station?").text)
    with client.stream_chat("Tell me a story.", max_tokens=200) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)

with subscribe() as events:
    for event in events:
        if isinstance(event, StateChange):
            print(event.state, event.detail)

answers.py        what comes back
requests.py       what can be asked: fields and their names
session.py        ids, encoding, which reply is whose; no socket (sans-IO)
link.py           one connection
client.py         Client
asynchronous.py   AsyncClient; asynchronous_link.py, its connection
events.py         Events: what the daemon publishes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgellm.client.answers import (
    Answer,
    Decision,
    Delta,
    Health,
    Logprob,
    Model,
    StateChange,
    Statistics,
    Status,
    Timings,
    Usage,
)
from edgellm.client.client import Client, Stream
from edgellm.client.events import Events, subscribe
from edgellm.curve import CurveKeys

if TYPE_CHECKING:
    from edgellm.client.asynchronous import AsyncClient, AsyncStream

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "CurveKeys",
    "Decision",
    "Delta",
    "Events",
    "Health",
    "Logprob",
    "Model",
    "StateChange",
    "Statistics",
    "Status",
    "Stream",
    "Timings",
    "Usage",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "AsyncStream"):  # brings asyncio
        import edgellm.client.asynchronous

        return getattr(edgellm.client.asynchronous, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

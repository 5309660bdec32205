"""The load generator: one connection, many requests in flight, and when each message came back.

It speaks the wire protocol over a socket of its own rather than through a client class, so that what is
measured is the daemon and the socket, and the generator takes little of a processor that the daemon may need.

Two ways of arriving:
    closed loop   so many requests are always in flight; one that ends is followed by the next
    open loop     requests leave at given times, whatever is still unanswered (a Poisson process)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from edgellm import protocol
from edgellm.curve import secure_client
from edgellm.errors import ConnectionLost, ProtocolError, RequestTimeout
from edgellm.protocol import Accepted, Delta, Done, Error

_decoder = msgspec.msgpack.Decoder(Accepted | Delta | Done | Error)

BUSY_WAIT_S = 0.1
"""Between two looks at whether it is over."""


@dataclass(slots=True)
class Trace:
    """One request's life as its client saw it: clock seconds, None for what never happened.

    Attributes:
        prompt_tokens: tokens sent.
        sent: when the request was handed to the socket.
        accepted: when `accepted` arrived.
        deltas: when each delta arrived, and how many tokens it held.
        ended: when the final message arrived.
        error: the code that it ended with, or None if it is done.
        completion_tokens, cached_tokens: as its usage says.
    """

    prompt_tokens: int
    sent: float
    accepted: float | None = None
    deltas: list[tuple[float, int]] = field(default_factory=list)
    ended: float | None = None
    error: str | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return self.ended is not None and self.error is None


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests leave, `rate` a second on average; the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(count - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


class Load:
    """A connection that requests are sent over.

    Args:
        endpoint: the daemon's; over tcp with the keys that the environment names.
        clock: seconds, monotonic.
        stall_s: how long nothing at all may arrive while requests are open.
    """

    def __init__(
        self, endpoint: str, *, clock: Callable[[], float] = time.perf_counter, stall_s: float = 60.0
    ) -> None:
        self._clock = clock
        self._stall_s = stall_s
        self._endpoint = endpoint
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # Nothing is dropped or held back on this side: the daemon's bounds are what is measured.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A daemon that comes back knows nothing of our requests: connecting again would only hide its end.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        secure_client(self._socket, endpoint, None)
        self._socket.connect(endpoint)
        self._last_id = 0
        self._open: dict[int, Trace] = {}

    def close(self) -> None:
        """Hang up; the daemon ends what is still open. Idempotent."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def closed(self, prompts: Sequence[NDArray[np.int32]], max_tokens: int, concurrency: int) -> list[Trace]:
        """Keep `concurrency` requests in flight until all prompts are answered.

        Raises:
            RequestTimeout: nothing was heard for `stall_s`.
            ConnectionLost: the daemon went away.
        """
        traces: list[Trace] = []
        waiting = iter(prompts)
        while True:
            while len(self._open) < concurrency and (prompt := next(waiting, None)) is not None:
                traces.append(self._send(prompt, max_tokens))
            if not self._open:
                return traces
            self._receive(self._stall_s)

    def open(
        self, prompts: Sequence[NDArray[np.int32]], max_tokens: int, arrivals: Sequence[float]
    ) -> list[Trace]:
        """Send each prompt at its time, in seconds from now, ascending.

        Raises:
            RequestTimeout: nothing was heard for `stall_s` while something was open.
            ConnectionLost: the daemon went away.
        """
        traces: list[Trace] = []
        started = self._clock()
        for prompt, arrival in zip(prompts, arrivals, strict=True):
            while (left := started + arrival - self._clock()) > 0:
                self._receive(min(left, self._stall_s), stalls=left > self._stall_s)
            traces.append(self._send(prompt, max_tokens))
        while self._open:
            self._receive(self._stall_s)
        return traces

    def busy(
        self,
        prompts: Iterator[NDArray[np.int32]],
        max_tokens: int,
        concurrency: int,
        *,
        until: Callable[[], bool],
        into: list[Trace],
    ) -> None:
        """Keep `concurrency` requests in flight until told, however long nothing comes; then leave them open.

        Args:
            prompts: without an end.
            until: whether it is over, asked several times a second.
            into: gets each request's trace when it is sent, so that another thread can look.

        Raises:
            ConnectionLost: the daemon went away.
        """
        while not until():
            while len(self._open) < concurrency:
                into.append(self._send(next(prompts), max_tokens))
            self._receive(BUSY_WAIT_S, stalls=False)

    def _send(self, prompt: NDArray[np.int32], max_tokens: int) -> Trace:
        self._last_id += 1
        request = protocol.Generate(
            v=protocol.VERSION,
            id=self._last_id,
            prompt=prompt.tolist(),
            stream=True,
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
        )
        payload = protocol.encode(request)
        trace = Trace(len(prompt), self._clock())
        self._open[self._last_id] = trace
        self._socket.send(payload)
        return trace

    def _receive(self, wait_s: float, *, stalls: bool = True) -> None:
        """Wait for a message, then take all that are there.

        Args:
            wait_s: how long to wait.
            stalls: whether hearing nothing for so long is a failure.
        """
        ready = dict(self._poller.poll(max(1, round(1000 * wait_s))))
        if not ready:
            if stalls and self._open:
                raise RequestTimeout(
                    f"{self._endpoint}: {len(self._open)} requests are open"
                    f" and nothing was heard for {wait_s:g} s"
                )
            return
        while True:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            now = self._clock()
            try:
                reply = _decoder.decode(payload)
            except msgspec.DecodeError as error:
                raise ProtocolError(f"{self._endpoint} does not speak edgellm's protocol: {error}") from None
            self._take(reply, now)
        if self._monitor in ready:
            # The last messages are taken first: a daemon that stops properly has answered everything.
            raise ConnectionLost(f"{self._endpoint} went away with {len(self._open)} requests open")

    def _take(self, reply: Accepted | Delta | Done | Error, now: float) -> None:
        if not isinstance(reply.id, int) or reply.id not in self._open:
            raise ProtocolError(f"{self._endpoint} answers {reply.id!r}, which is not open")
        trace = self._open[reply.id]
        match reply:
            case Accepted():
                trace.accepted = now
            case Delta():
                trace.deltas.append((now, len(reply.tokens)))
            case Done():
                trace.ended = now
                trace.completion_tokens = reply.usage.completion_tokens
                trace.cached_tokens = reply.usage.cached_tokens
            case Error():
                trace.ended = now
                trace.error = reply.code
        if trace.ended is not None:
            del self._open[reply.id]

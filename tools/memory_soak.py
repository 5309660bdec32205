"""Whether the daemon's memory stays as it is: thousands of mixed requests, and the slope of its resident set.

    python tools/memory_soak.py ENGINE --requests 10000

A daemon is started and driven with requests of all kinds over several connections at once: short and long
prompts, every sampling option, streams and single replies, cancels in mid-stream, deadlines that pass, input
that makes no sense, clients that vanish. After a warm-up, which uses every slot to its end and each row of
the embedding, the resident set is sampled and regressed on the number of requests. Ends with 1 if it may grow
by more than --limit MB in 10,000 requests (the upper end of the 95 % interval), or if the daemon ends badly.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import zmq
from numpy.typing import NDArray
from running_daemon import Daemon, running_daemon
from soak_mix import Mix, Wish

from edgellm.client import Client
from edgellm.enginedir import EngineDir, open_engine
from edgellm.errors import EdgellmError, ExecutorFault
from edgellm.memory.sizes import show_size

PER = 10_000
IN_FLIGHT = 10
CONNECTIONS = 4
SAMPLES = 200
SETTLE_S = 0.02
"""After the last answer: the daemon has let go of it."""
STALL_S = 60.0
SMAPS = {"Rss": "rss", "Pss": "pss", "Anonymous": "anonymous"}


def main(argv: Sequence[str] | None = None) -> int:
    """Drive, measure, print."""
    args = _parse(argv)
    try:
        engine = open_engine(args.engine)
        with running_daemon(args.engine, *args.flags) as daemon:
            soak = Soak(daemon, engine, seed=args.seed)
            soak.warm_up()
            soak.run(args.requests, every=max(1, args.requests // SAMPLES))
    except EdgellmError as error:
        print(f"memory_soak: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return _report(soak, warm=args.requests // 10, limit=args.limit * 1e6)


@dataclass(slots=True)
class Sample:
    """The daemon's memory after so many requests, in bytes."""

    requests: int
    rss: int
    pss: int
    anonymous: int


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth in bytes per PER requests, with its 95 % interval."""

    value: float
    low: float
    high: float


class Soak:
    """The load and what it measured.

    Attributes:
        samples: of the daemon's memory.
        kinds: requests by kind.
        outcomes: by finish reason or error code.
        peak: VmHWM in bytes at the end.
    """

    def __init__(self, daemon: Daemon, engine: EngineDir, *, seed: int) -> None:
        self.samples: list[Sample] = []
        self.kinds: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.peak = 0
        self.seconds = 0.0
        self._daemon = daemon
        with Client(daemon.endpoint) as client:
            model = client.model()
        self._slots = model.max_batch_size
        self._mix = Mix(seed=seed, slot=model.max_seq_len, vocabulary=engine.spec.vocab_size)

    def warm_up(self) -> None:
        """Use every row of the embedding, and every slot to its end at the same time."""
        self._drive([*self._mix.every_row(), *(self._mix.full_slot() for _ in range(4 * self._slots))])

    def run(self, requests: int, *, every: int) -> None:
        """Drive so many requests, looking at the daemon's memory every so often."""
        started = time.monotonic()
        self.kinds.clear()
        self.outcomes.clear()
        self._sample(0)
        for start in range(0, requests, every):
            wishes = [self._mix.wish() for _ in range(min(every, requests - start))]
            self._drive(wishes)
            self._sample(start + len(wishes))
        self.seconds = time.monotonic() - started
        status = Path(f"/proc/{self._daemon.process.pid}/status").read_text()
        self.peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    # The load.

    def _drive(self, wishes: Sequence[Wish]) -> None:
        """Have IN_FLIGHT of them open until all have ended."""
        self.kinds.update(wish.kind for wish in wishes)
        waiting = list(reversed(wishes))
        with zmq.Context() as context, contextlib.ExitStack() as stack:
            poller = zmq.Poller()

            def connect() -> zmq.Socket[bytes]:
                socket = context.socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(self._daemon.endpoint)
                poller.register(socket, zmq.POLLIN)
                return socket

            lasting = [stack.enter_context(connect()) for _ in range(CONNECTIONS)]
            open_: dict[tuple[zmq.Socket[bytes], int], Wish] = {}
            number = 0
            while waiting or open_:
                while waiting and len(open_) < IN_FLIGHT:
                    wish, number = waiting.pop(), number + 1
                    socket = connect() if wish.vanish else lasting[number % CONNECTIONS]
                    if wish.fields is None:
                        # Nothing names it, so nothing is waited for: its error has no id.
                        socket.send(wish.raw)
                        continue
                    socket.send(msgpack.packb({"v": 1, "id": number, **wish.fields}))
                    open_[socket, number] = wish
                ready = poller.poll(int(STALL_S * 1000))
                if not ready and open_:
                    raise ExecutorFault(f"nothing came for {STALL_S:.0f} s; {len(open_)} requests are open")
                for ready_socket, _ in ready:
                    self._take(ready_socket, open_, poller)

    def _take(
        self,
        socket: zmq.Socket[bytes],
        open_: dict[tuple[zmq.Socket[bytes], int], Wish],
        poller: zmq.Poller,
    ) -> None:
        reply = msgpack.unpackb(socket.recv())
        wish = open_.get((socket, reply["id"]))
        if reply["ev"] == "error" and wish is None:
            self.outcomes[reply["code"]] += 1  # of raw bytes
        if wish is None:
            return
        if wish.vanish:
            del open_[socket, reply["id"]]
            poller.unregister(socket)
            socket.close()
            self.outcomes["vanished"] += 1
        elif reply["ev"] in ("accepted", "delta"):
            if wish.cancel and reply["ev"] == "delta":
                socket.send(msgpack.packb({"v": 1, "id": "c", "op": "cancel", "target": reply["id"]}))
                wish.cancel = False
        else:
            del open_[socket, reply["id"]]
            self.outcomes[reply.get("finish_reason") or reply.get("code") or reply["ev"]] += 1

    def _sample(self, requests: int) -> None:
        time.sleep(SETTLE_S)
        text = Path(f"/proc/{self._daemon.process.pid}/smaps_rollup").read_text()
        found = {SMAPS[name]: int(size) << 10 for name, size in _rollup(text) if name in SMAPS}
        self.samples.append(Sample(requests, **found))


def slope(requests: NDArray[np.float64], sizes: NDArray[np.float64]) -> Slope:
    """Least squares: bytes per PER requests, with its 95 % interval.

    Neighbouring samples resemble each other, so the interval counts only as many as would be independent:
    n · (1 − ρ) / (1 + ρ), ρ being the residuals' correlation at lag 1 where that is positive (Bartlett 1935).
    """
    x, y = requests - requests.mean(), sizes - sizes.mean()
    value = float(x @ y / (x @ x))
    residuals = y - value * x
    n, power = len(x), float(residuals @ residuals)
    rho = max(0.0, float(residuals[1:] @ residuals[:-1]) / power) if power else 0.0
    free = max(1.0, n * (1 - rho) / (1 + rho) - 2)
    error = math.sqrt(power / free / float(x @ x))
    width = _student(free) * error
    return Slope(value * PER, (value - width) * PER, (value + width) * PER)


def _student(free: float) -> float:
    """The 97.5 % point of Student's t with so many degrees of freedom (Cornish and Fisher's expansion)."""
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * free)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    )


def _rollup(text: str) -> Iterator[tuple[str, int]]:
    for match in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE):
        yield match[1], int(match[2])


def _report(soak: Soak, *, warm: int, limit: float) -> int:
    counted = [sample for sample in soak.samples if sample.requests >= warm]
    requests = np.array([sample.requests for sample in counted], np.float64)
    done = soak.samples[-1].requests
    print(f"{done} requests in {soak.seconds:.0f} s, {len(counted)} samples after the first {warm} requests")
    for title, counter in (("requests", soak.kinds), ("outcomes", soak.outcomes)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counter.most_common()))
    print(f"{'':12} {'first':>11} {'warm':>11} {'last':>11}   growth per {PER} requests, 95 % interval")
    slopes = {}
    for name in SMAPS.values():
        sizes = np.array([getattr(sample, name) for sample in counted], np.float64)
        found = slopes[name] = slope(requests, sizes)
        ends = (getattr(soak.samples[0], name), int(sizes[0]), int(sizes[-1]))
        shown = " ".join(f"{show_size(size):>11}" for size in ends)
        growth = f"{found.value / 1e6:+.3f} MB [{found.low / 1e6:+.3f}, {found.high / 1e6:+.3f}]"
        print(f"{name:12} {shown}   {growth}")
    print(f"{'peak':12} {show_size(soak.peak):>11}")
    grown = slopes["rss"].high > limit
    print(
        f"{'FAIL' if grown else 'ok'}: the resident set may grow by {slopes['rss'].high / 1e6:.3f} MB, "
        f"the limit is {limit / 1e6:g} MB"
    )
    return int(grown)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--requests", type=int, default=PER, help="after the warm-up (default %(default)s)")
    parser.add_argument("--limit", type=float, default=1.0, metavar="MB", help="of growth (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.epilog = "What follows -- goes to `edgellm serve`."
    # argparse itself would take what follows -- only right behind ENGINE.
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:end])
    args.flags = arguments[end + 1 :]
    if args.requests < 100:
        parser.error(f"--requests {args.requests}: a slope needs at least 100")
    return args


if __name__ == "__main__":
    sys.exit(main())

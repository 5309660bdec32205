"""A second process on the GPU, as perception is one: a chain of kernels, so many times a second.

python tools/gpu/neighbour.py --hz 50 --megabytes 100

It speaks lines. `{"ready": …}` says that it is; each line `SECONDS` is answered, after so many seconds, by
`{"response_ms": […], "dropped": n}`. A frame's response is from when it was due until its last kernel had
run. A frame that became due while another one was still running is dropped, as a camera's is. It ends when
its input does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from ctypes import c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TextIO

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Kernel
from edgellm.cuda.nvrtc import Compiler
from edgellm.errors import OperatorError

LAUNCHES: Final = 8
"""Of a frame, one after the other, each over its part of the memory."""
ROUNDS: Final = 64
"""Multiply-adds for each number."""
THREADS: Final = 256
MPS_ENABLED: Final = 133
"""cuda.h, CU_DEVICE_ATTRIBUTE_MPS_ENABLED; drivers before CUDA 12.4 do not know it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Frames of a while.

    Attributes:
        response_ms: of each frame that ran.
        dropped: frames that did not.
    """

    response_ms: list[float]
    dropped: int


class Frames:
    """The chain of kernels, on a device.

    Args:
        megabytes: read, and as many written, by a frame.
    """

    def __init__(self, driver: Driver, image: bytes, megabytes: int) -> None:
        self._driver = driver
        self._stream = driver.stream()
        self._bytes = megabytes * 1_000_000 // (16 * LAUNCHES) * 16
        self._memory = [driver.allocate(self._bytes * LAUNCHES) for _ in "io"]
        function = driver.load(image, read_resources(image)[0].name, 0)
        grid = (4 * driver.facts.device.multiprocessors, 1, 1)
        for memory in self._memory:
            driver.call("cuMemsetD8Async", memory, 0, self._bytes * LAUNCHES, self._stream)

        def launch() -> None:
            for number in range(LAUNCHES):
                places = [c_void_p(memory + number * self._bytes) for memory in self._memory]
                driver.launch(
                    function,
                    grid,
                    threads=THREADS,
                    shared=0,
                    arguments=[*places, self._bytes // 16],
                    stream=self._stream,
                )

        self._graph = driver.capture(self._stream, launch)

    def run(self) -> None:
        """One frame; returns when its last kernel has run."""
        self._driver.call("cuGraphLaunch", self._graph, self._stream)
        self._driver.call("cuStreamSynchronize", self._stream)


def record(
    frame: Callable[[], None],
    *,
    seconds: float,
    hz: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Recording:
    """Run a frame whenever one is due.

    Args:
        frame: runs one, and returns when it is done.
        seconds: that frames become due for.
        hz: frames a second.
    """
    responses: list[float] = []
    dropped = number = 0
    count = max(1, round(seconds * hz))
    started = clock()
    while number < count:
        due = started + number / hz
        if (left := due - clock()) > 0:
            sleep(left)
        frame()
        ended = clock()
        responses.append(1000 * (ended - due))
        # Those that became due meanwhile.
        following = max(number + 1, min(count, int((ended - started) * hz) + 1))
        dropped += following - number - 1
        number = following
    return Recording(responses, dropped)


def serve(frame: Callable[[], None], hz: float, lines: TextIO, out: TextIO, facts: dict[str, object]) -> None:
    """Answer each line with a recording of so many seconds."""
    print(json.dumps({"ready": facts}), file=out, flush=True)
    for line in lines:
        recording = record(frame, seconds=float(line), hz=hz)
        print(json.dumps(asdict(recording)), file=out, flush=True)


def shares_contexts(driver: Driver) -> bool | None:
    """Whether MPS is on, so that kernels of several processes run at the same time; None: it does not say."""
    with suppress(OperatorError, ValueError):
        attribute = driver._api.CUdevice_attribute(MPS_ENABLED)
        return bool(driver.call("cuDeviceGetAttribute", attribute, 0))
    return None


def main() -> int:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hz", type=float, default=50.0, help="frames a second (default %(default)s)")
    parser.add_argument(
        "--megabytes", type=int, default=100, help="read and written by a frame (default %(default)s)"
    )
    args = parser.parse_args()
    try:
        return _serve(args.hz, args.megabytes)
    except OperatorError as error:
        print(f"neighbour: {error}", file=sys.stderr)
        return error.exit_code


def _serve(hz: float, megabytes: int) -> int:
    driver = Driver()
    kernel = Kernel("perceive.cu", f"perceive<{ROUNDS}>", THREADS)
    compiler = Compiler(sources=Path(__file__).parent)
    (image,) = compiler.cubins([kernel], driver.facts.device.sm).values()
    frames = Frames(driver, image, megabytes)
    for _ in range(10):
        frames.run()
    facts: dict[str, object] = {
        "device": driver.facts.described,
        "integrated": driver.facts.integrated,
        "mps": shares_contexts(driver),
    }
    serve(frames.run, hz, sys.stdin, sys.stdout, facts)
    driver.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The co-run test without a GPU: frames on a clock, the two processes' protocol, a real daemon beside it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_driver import FakeDriver
from tiny_llama import TINY

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import corun
import neighbour
from corun import WITHOUT, Case, Neighbour, heading, measure, row, tokens_between
from neighbour import LAUNCHES, Frames, Recording, record, serve, shares_contexts

from edgellm.bench.load import Trace
from edgellm.cli import main
from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Kernel
from edgellm.cuda.nvrtc import Compiler
from edgellm.errors import ExecutorFault


class Clock:
    """Time that goes on where somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def frames(self, *seconds: float) -> Callable[[], None]:
        """Take so long, one after the other; the last one for ever."""
        left = list(seconds)

        def frame() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return frame


def recorded(hz: float, seconds: float, *frames: float) -> tuple[list[float], int]:
    clock = Clock()
    found = record(clock.frames(*frames), seconds=seconds, hz=hz, clock=lambda: clock.now, sleep=clock.sleep)
    return [round(each, 6) for each in found.response_ms], found.dropped


def test_frames_in_time_are_all_there() -> None:
    assert recorded(4, 2, 0.125) == ([125.0] * 8, 0)


def test_a_frame_that_is_late_drops_those_that_became_due() -> None:
    # The second one takes from 0.25 to 1.125: those of 0.5, 0.75 and 1.0 are dropped.
    assert recorded(4, 2, 0.125, 0.875, 0.125) == ([125.0, 875.0, 125.0, 125.0, 125.0], 3)


def test_a_frame_that_ends_when_another_becomes_due_drops_it() -> None:
    assert recorded(4, 1, 0.25) == ([250.0, 250.0], 2)


@pytest.mark.parametrize("slow", [0.1, 0.3, 2.6, 100.0])
def test_every_frame_ran_or_was_dropped(slow: float) -> None:
    responses, dropped = recorded(4, 3, slow)
    assert len(responses) + dropped == 12
    assert responses


def test_the_protocol() -> None:
    out = io.StringIO()
    clock = iter(n / 1000 for n in range(100_000))
    ran = []

    def frame() -> None:
        ran.append(next(clock))

    serve(frame, 1e9, io.StringIO("1e-9\n2e-9\n"), out, {"device": "x"})
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines[0] == {"ready": {"device": "x"}}
    assert [set(line) for line in lines[1:]] == [{"response_ms", "dropped"}] * 2
    assert len(ran) >= 2


def test_a_frame_reads_and_writes_all_of_its_memory() -> None:
    api = FakeDriver()
    driver = Driver(api=api)
    kernel = Kernel("perceive.cu", f"perceive<{neighbour.ROUNDS}>", neighbour.THREADS)
    compiler = Compiler(sources=Path(neighbour.__file__).parent)
    (image,) = compiler.cubins([kernel], 87).values()
    frames = Frames(driver, image, 7)
    launched = [arguments for name, arguments in api.calls if name == "cuLaunchKernelEx"]
    sizes = {address: len(memory) for address, memory in api.live.items()}
    assert len(launched) == LAUNCHES
    for place in (0, 1):
        parts = sorted((values[place], 16 * values[2]) for _, _, (values, _), _ in launched)
        base, _ = parts[0]
        assert [begin for begin, _ in parts] == [base + n * parts[0][1] for n in range(LAUNCHES)]
        assert sum(size for _, size in parts) == sizes[base]
        assert 6.99e6 < sizes[base] <= 7e6
    before = len(api.calls)
    frames.run()
    assert [name for name, _ in api.calls[before:]] == ["cuGraphLaunch", "cuStreamSynchronize"]


def test_whether_contexts_take_turns_is_asked() -> None:
    api = FakeDriver()
    for value, expected in ((0, False), (1, True)):
        api._attributes[neighbour.MPS_ENABLED] = value
        assert shares_contexts(Driver(api=api)) is expected
    assert "may run at the same time" in heading({"device": "x", "mps": True}, 50, 100)
    assert "take turns" in heading({"device": "x", "mps": False}, 50, 100)
    assert "does not say" in heading({"device": "x", "mps": None}, 50, 100)


def test_tokens_are_counted_between_two_times() -> None:
    traces = [
        Trace(1, 0.0, deltas=[(1.0, 1), (2.0, 2), (3.0, 4)]),
        Trace(1, 0.0, deltas=[(2.5, 8), (3.5, 16)]),
        Trace(1, 0.0),
    ]
    assert tokens_between(traces, 1.0, 3.0) == 2 + 4 + 8


def test_a_line_of_the_table() -> None:
    recording = Recording([1.0, 1.0, 1.0, 5.0], 3)
    cells = row(Case("at duty 1", recording, 812.4), 2.44).split(" | ")
    assert cells[:4] == ["| at duty 1", "4", "3", "1.00"]
    assert cells[6:] == ["2.00", "812 |"]
    assert math.isclose(float(cells[4]), 4.88)


STAND_IN = """
import json, sys, time
print(json.dumps({"ready": {"device": "none"}}), flush=True)
for line in sys.stdin:
    time.sleep(float(line))
    print(json.dumps({"response_ms": [1.0, 2.0], "dropped": 0}), flush=True)
"""


@pytest.fixture
def stand_in() -> Iterator[Neighbour]:
    with contextlib.closing(Neighbour([sys.executable, "-c", STAND_IN])) as started:
        yield started


def test_every_case_is_measured_beside_a_daemon(
    tmp_path: Path, stand_in: Neighbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corun, "SETTLING_S", 0.3)
    checkpoint = TINY["3/1 heads of 64, tied"].write_gguf(tmp_path / "tiny.gguf")
    engine = tmp_path / "engine"
    assert main(["build", str(checkpoint), "-o", str(engine), "--max-seq-len", "128"]) == 0
    cases = {case.name: case for case in measure(engine, stand_in, 0.3, flags=["--threads", "1"], rows=2)}
    assert list(cases) == [
        WITHOUT,
        "beside an idle one",
        "at duty 1",
        "at duty 0.5",
        "suspended",
        f"{WITHOUT}, again",
    ]
    rates = {name: case.tokens_per_s for name, case in cases.items()}
    assert rates[WITHOUT] is rates[f"{WITHOUT}, again"] is None
    assert rates["beside an idle one"] == rates["suspended"] == 0
    assert (rates["at duty 1"] or 0) > 0 < (rates["at duty 0.5"] or 0)
    assert all(case.recording == Recording([1.0, 2.0], 0) for case in cases.values())


def test_a_neighbour_that_ends_is_told() -> None:
    with pytest.raises(ExecutorFault, match="the neighbour ended with 3"):
        Neighbour([sys.executable, "-c", "raise SystemExit(3)"])

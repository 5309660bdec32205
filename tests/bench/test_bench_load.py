"""The load generator and `edgellm bench` against a real server on a socket, before a scripted engine."""

from __future__ import annotations

import csv
import io
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from fake_engine import FakeEngine, Service
from numpy.typing import NDArray

from edgellm.bench.load import Load
from edgellm.cli import main
from edgellm.errors import ConnectionLost, Overloaded, RequestTimeout
from edgellm.scheduler.request import Finish, Request
from edgellm.server import access
from edgellm.server_config import ServerConfig


class Worker:
    """Answers as an engine does: on a thread of its own, a token an update, and counts what is open.

    Attributes:
        gather: how many requests must be open before any is answered.
        until: what must have happened before any is answered.
        fault_every: of so many requests the last ends with a fault; 0: none does.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._arrived: queue.Queue[Request | None] = queue.Queue()
        self._lock = threading.Lock()
        self._open = 0
        self.most_open = 0
        self.gather = 1
        self.until: threading.Event | None = None
        self.fault_every = 0
        engine.script = self._arrive
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._arrived.put(None)
        self._thread.join()

    def _arrive(self, engine: FakeEngine, request: Request) -> None:
        with self._lock:
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        self._arrived.put(request)

    def _run(self) -> None:
        held: list[Request] = []
        served = 0
        while (request := self._arrived.get()) is not None:
            held.append(request)
            if len(held) < self.gather and served == 0:
                continue
            if self.until is not None:
                assert self.until.wait(30)
            for each in held:
                served += 1
                self._answer(each, fault=bool(self.fault_every) and served % self.fault_every == 0)
            held.clear()

    def _answer(self, request: Request, *, fault: bool) -> None:
        with self._lock:
            self._open -= 1
        if fault:
            self._engine.end(request.key, Finish.FAULT)
            return
        for _ in range(request.max_tokens - 1):
            self._engine.say(request.key, b"x")
        self._engine.end(request.key, Finish.LENGTH, b"x")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.close()


@pytest.fixture
def worker(service: Service) -> Iterator[Worker]:
    worker = Worker(service.engine)
    yield worker
    worker.close()


def prompts(count: int, length: int = 8) -> list[NDArray[np.int32]]:
    return [np.full(length, 65 + index % 26, np.int32) for index in range(count)]


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_keeps_so_many_in_flight(service: Service, worker: Worker, concurrency: int) -> None:
    worker.gather = concurrency
    with Load(service.endpoint) as load:
        traces = load.closed(prompts(12), 5, concurrency)
    assert worker.most_open == concurrency
    assert len(traces) == 12
    for trace in traces:
        assert trace.ok
        assert trace.completion_tokens == 5
        assert sum(tokens for _, tokens in trace.deltas) == 5
        assert trace.accepted is not None
        assert trace.ended is not None
        assert trace.sent <= trace.accepted <= trace.deltas[0][0] <= trace.deltas[-1][0] <= trace.ended


def test_an_open_loop_does_not_wait_for_answers(service: Service, worker: Worker) -> None:
    worker.gather = 6
    with Load(service.endpoint) as load:
        traces = load.open(prompts(6), 2, [0.0, 0.0, 0.01, 0.01, 0.02, 0.02])
    assert worker.most_open == 6
    assert all(trace.ok for trace in traces)
    sent = [trace.sent for trace in traces]
    assert sent == sorted(sent)
    assert sent[-1] - sent[0] >= 0.0195


def test_requests_are_greedy_and_of_exact_length(service: Service, worker: Worker) -> None:
    with Load(service.endpoint) as load:
        load.closed(prompts(1, length=11), 4, 1)
    (request,) = service.engine.requests
    assert len(request.prompt) == 11
    assert request.max_tokens == 4
    assert request.sampling.plain
    assert request.stop_ids == frozenset(), "the end-of-turn token does not shorten an answer"


def test_failures_are_kept_with_their_code(service: Service, worker: Worker) -> None:
    worker.fault_every = 3
    with Load(service.endpoint) as load:
        traces = load.closed(prompts(9), 2, 1)
    assert [trace.error for trace in traces] == [None, None, "internal"] * 3
    assert [trace.ok for trace in traces] == [True, True, False] * 3


def test_refusals_do_not_stop_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()

    class Told(Overloaded):
        def __init__(self, *args: Any, **fields: Any) -> None:
            super().__init__(*args, **fields)
            refused.set()

    monkeypatch.setattr(access, "Overloaded", Told)
    service = Service(tmp_path, ServerConfig(max_requests_per_client=2))
    worker = Worker(service.engine)
    worker.until = refused
    try:
        with Load(service.endpoint) as load:
            traces = load.closed(prompts(10), 2, 3)
    finally:
        worker.close()
        service.close()
    assert len(traces) == 10
    assert {trace.error for trace in traces} == {None, "overloaded"}


def test_an_engine_that_says_nothing_is_given_up_on(service: Service) -> None:
    with (
        Load(service.endpoint, stall_s=0.1) as load,
        pytest.raises(RequestTimeout, match="2 requests are open"),
    ):
        load.closed(prompts(2), 2, 2)
    # The connection is gone, and with it the requests.
    service.engine.wait(lambda engine: len(engine.stopped) == 2)


def test_a_daemon_that_is_killed_is_noticed_at_once(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/killed.sock"
    bound = threading.Event()

    def take_two_and_die() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.LINGER, 0)
            router.bind(endpoint)
            bound.set()
            for _ in range(2):
                router.recv_multipart()

    daemon = threading.Thread(target=take_two_and_die)
    daemon.start()
    assert bound.wait(5)
    with Load(endpoint, stall_s=60) as load, pytest.raises(ConnectionLost, match="2 requests open"):
        load.closed(prompts(2), 2, 2)
    daemon.join()


BENCH = ["--prompt-tokens", "16", "--max-tokens", "4", "--requests", "4", "--concurrency", "1,2"]


def test_the_command_measures_each_level(
    service: Service, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--endpoint", service.endpoint, *BENCH, "--seed", "5", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    facts = document["facts"]
    assert (facts["model"], facts["slots"], facts["seed"]) == ("fake-model", 4, 5)
    assert {"edgellm", "cpu", "cores", "executor", "quantization"} <= set(facts)
    assert [row["concurrency"] for row in document["rows"]] == [1, 2]
    for row in document["rows"]:
        assert (row["requests"], row["errors"]) == (4, 0)
        assert len(row["samples"]) == 4
        assert row["cached_tokens"] == 12, "as the fake engine says, 3 for each"
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"] <= row["e2e_ms_max"]
    asked = [tuple(request.prompt.tolist()) for request in service.engine.requests]
    assert all(len(prompt) == 16 for prompt in asked)
    assert len(asked) == 1 + 4 + 2 + 4, "each level has a warm-up as wide as itself"
    assert len(set(asked)) == len(asked), "no prompt is asked twice"


def test_the_command_says_what_failed_and_exits_1(
    service: Service, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.fault_every = 2
    assert main(["bench", "--endpoint", service.endpoint, *BENCH]) == 1
    out = capsys.readouterr().out
    assert "concurrency 1: 2 internal" in out
    assert "fake-model" in out


def test_request_rates_are_rows_too(
    service: Service, worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*BENCH[:6], "--request-rate", "50,100", "--slo-ttft-ms", "10000", "--csv"]
    assert main(["bench", "--endpoint", service.endpoint, *flags]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["request_rate"]) for row in rows] == [50, 100]
    for row in rows:
        assert float(row["goodput_per_s"]) == pytest.approx(float(row["requests_per_s"]))
        assert row["slo_ttft_ms"] == "10000.0"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt-tokens", "250", "--max-tokens", "10"], "--prompt-tokens 250: a slot holds 256 tokens"),
        (["--max-tokens", "256"], "--max-tokens 256: a slot holds 256 tokens"),
        (["--prompt-tokens", "4", "--max-tokens", "4", "--shared-prefix", "4"], "--shared-prefix 4"),
        (["--concurrency", "0"], "--concurrency 0: '0' is not a whole number ≥ 1"),
        (["--request-rate", "fast"], "--request-rate 'fast'"),
        (["--request-rate", "0"], "--request-rate '0'"),
        (["--request-rate", "nan"], "--request-rate 'nan'"),
        (["--requests", "0"], "--requests 0: must be at least 1"),
        (["-b", "4"], "--batch needs an ENGINE directory"),
    ],
)
def test_bad_flags_are_named(
    service: Service, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert main(["bench", "--endpoint", service.endpoint, *flags]) == 64
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "name either an ENGINE directory or --endpoint"),
        (["engine", "--endpoint", "ipc:///x"], "name either an ENGINE directory or --endpoint"),
        (["engine", "--concurrency", "4"], "--concurrency needs --endpoint"),
        (["engine", "-p", "many"], "-p many: 'many' is not a whole number"),
        (["engine", "-b", "0"], "-b 0: '0' is not a whole number ≥ 1"),
        (["engine", "-r", "0"], "--repetitions 0: must be at least 1"),
    ],
)
def test_bad_flags_are_named_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert main(["bench", *flags]) == 64
    assert says in capsys.readouterr().err


def test_nobody_at_the_endpoint_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", "--endpoint", f"ipc://{tmp_path}/nobody.sock", "--wait", "0"])
    assert code == 69
    assert "nobody.sock" in capsys.readouterr().err


@pytest.mark.model
def test_the_command_measures_an_engine(smollm2_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-p", "8", "-n", "2", "-d", "0,8", "-b", "1,2", "-r", "2", "-t", "1", "--json"]
    assert main(["bench", str(smollm2_engine), *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(row["test"], row["batch"]) for row in document["rows"]] == [
        ("pp8", 1),
        ("pp8 @ d8", 1),
        ("tg2", 1),
        ("tg2", 2),
        ("tg2 @ d8", 1),
        ("tg2 @ d8", 2),
    ]
    for row in document["rows"]:
        seconds = row["samples"]["seconds"]
        assert len(seconds) == 2
        rates = [row["tokens"] * row["batch"] / value for value in seconds]
        assert row["tokens_per_s_mean"] == pytest.approx(sum(rates) / 2)
    assert document["facts"]["threads"] == 1


@pytest.mark.model
def test_more_than_the_engine_holds_names_the_flag(
    smollm2_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(smollm2_engine), "-b", "1,5"]) == 64
    assert "-b 5: the engine advances at most 4 rows" in capsys.readouterr().err
    assert main(["bench", str(smollm2_engine), "-d", "1000", "-n", "100"]) == 64
    assert "-n 24 is the most behind -d 1000" in capsys.readouterr().err

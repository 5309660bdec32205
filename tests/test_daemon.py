"""The daemon as a process, with the real model: it answers, drains, refuses, and its exit codes say why."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq
from curve_service import free_ports

from edgellm import Client
from edgellm.cli import main
from edgellm.client import CurveKeys, Statistics, subscribe
from edgellm.config import Config, EngineConfig
from edgellm.daemon import Daemon
from edgellm.errors import ConfigError, RequestError, Unreachable

pytestmark = pytest.mark.model

READY_S = 30.0
EXIT_S = 20.0
QUESTION = "What is the capital of France? Answer in one sentence."


@contextmanager
def daemon(engine: Path, endpoint: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EDGELLM_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellm", "serve", str(engine), "--endpoint", endpoint, *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/e.sock"


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=EXIT_S)
    return process.returncode, log


def test_it_answers_as_the_readme_says_and_drains(smollm2_engine: Path, endpoint: str) -> None:
    with daemon(smollm2_engine, endpoint) as process, Client(endpoint) as client:
        client.wait_ready(READY_S)
        answer = client.chat(QUESTION, temperature=0, max_tokens=24)
        assert "Paris" in answer.text
        assert answer.finish_reason in ("stop", "length")

        # A bare REQ socket, as in the README.
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.connect(endpoint)
            messages = [{"role": "user", "content": QUESTION}]
            fields = {"v": 1, "id": 1, "op": "chat", "messages": messages, "temperature": 0, "max_tokens": 24}
            socket.send(msgpack.packb(fields))
            assert socket.poll(10_000)
            assert msgpack.unpackb(socket.recv())["text"] == answer.text
            socket.close(linger=0)

        code, log = stop(process)
    assert code == 0
    assert "READY in" in log
    assert "capital" not in log
    assert "Paris" not in log


def test_the_same_seed_gives_the_same_text(smollm2_engine: Path, endpoint: str) -> None:
    with daemon(smollm2_engine, endpoint) as process, Client(endpoint) as client:
        client.wait_ready(READY_S)
        texts = [
            client.chat("Name a colour.", temperature=1.5, seed=seed, max_tokens=32).text
            for seed in (7, 7, 8)
        ]
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]
        assert stop(process)[0] == 0


def test_sigterm_lets_an_open_answer_finish_and_refuses_new_ones(smollm2_engine: Path, endpoint: str) -> None:
    with daemon(smollm2_engine, endpoint) as process, Client(endpoint) as client:
        client.wait_ready(READY_S)
        with client.stream_chat("Count.", temperature=0, ignore_eos=True, max_tokens=100) as stream:
            next(stream)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(RequestError) as refused:
                while True:
                    client.chat("Hello.", max_tokens=1)
                    time.sleep(0.01)
            assert refused.value.code == "shutting_down"
            tokens = sum(len(delta.tokens) for delta in stream)
        assert tokens >= 90
        process.communicate(timeout=EXIT_S)
    assert process.returncode == 0


def test_a_drain_that_takes_too_long_ends_what_is_open(smollm2_engine: Path, endpoint: str) -> None:
    with (
        daemon(smollm2_engine, endpoint, "--drain-timeout", "0.2") as process,
        Client(endpoint) as client,
    ):
        client.wait_ready(READY_S)
        with (
            client.stream_chat("Count.", temperature=0, ignore_eos=True, max_tokens=900) as stream,
            pytest.raises(RequestError) as ended,
        ):
            next(stream)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            for _ in stream:
                pass
        assert ended.value.code == "shutting_down"
        process.communicate(timeout=EXIT_S)
        assert time.monotonic() - started < 1.2
    assert process.returncode == 0


def test_a_drain_is_told_to_those_who_listen(smollm2_engine: Path, endpoint: str) -> None:
    with (
        daemon(smollm2_engine, endpoint) as process,
        Client(endpoint) as client,
        subscribe(endpoint, topics=["stats"], silence=10) as events,
    ):
        client.wait_ready(READY_S)
        with client.stream_chat("Count.", temperature=0, ignore_eos=True, max_tokens=900) as stream:
            next(stream)
            process.send_signal(signal.SIGTERM)
            heard = [event for event in itertools.islice(events, 4) if isinstance(event, Statistics)]
            draining = [event for event in heard if event.status == "draining"]
            assert len(draining) >= 2
            assert draining[0].running == 1
        assert stop(process)[0] == 0


def test_slots_may_be_fewer_and_shorter_than_built(smollm2_engine: Path, endpoint: str) -> None:
    flags = ["--max-batch-size", "1", "--max-seq-len", "128", "--max-num-tokens", "32"]
    with daemon(smollm2_engine, endpoint, *flags) as process, Client(endpoint) as client:
        client.wait_ready(READY_S)
        model = client.model()
        assert (model.max_batch_size, model.max_seq_len, model.max_num_tokens) == (1, 128, 32)
        assert "Paris" in client.chat(QUESTION, temperature=0, max_tokens=24).text
        with pytest.raises(RequestError) as refused:
            client.generate("many words " * 200)
        assert refused.value.code == "too_long"
        assert stop(process)[0] == 0


def test_a_second_daemon_refuses_the_socket(smollm2_engine: Path, endpoint: str) -> None:
    with daemon(smollm2_engine, endpoint) as first, Client(endpoint) as client:
        client.wait_ready(READY_S)
        with daemon(smollm2_engine, endpoint) as second:
            _, log = second.communicate(timeout=EXIT_S)
        assert second.returncode == 78
        assert f"process {first.pid}" in log
        assert client.chat("Hello.", max_tokens=2).text
        assert stop(first)[0] == 0


def test_a_flipped_byte_is_found_and_named(smollm2_engine: Path, endpoint: str, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(smollm2_engine, engine)
    data = engine / "model.onnx.data"
    with data.open("r+b") as file:
        file.seek(data.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with daemon(engine, endpoint) as process:
        _, log = process.communicate(timeout=EXIT_S)
    assert process.returncode == 66
    assert "model.onnx.data is not as it was built" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--max-seq-len", "4096"], 78, "engine.max_seq_len = 4096"),
        (["--max-batch-size", "5"], 78, "--max-batch-size 4"),
        (["--threads", "none"], 78, "--threads none: must be an integer"),
        (["--set", "server.max_quque=1"], 78, "server.max_queue"),
        (["--max-seq-len", "1"], 78, "--max-seq-len 1: max_seq_len must be 0 (as built) or at least 2"),
        (["--set", "nonsense"], 64, "KEY=VALUE"),
        (["--config", "/nonexistent.toml"], 78, "/nonexistent.toml"),
        (["--endpoint", "tcp://127.0.0.1:5555"], 78, "CURVE"),
        (["--endpoint", "ipc:///proc/edgellm/e.sock"], 78, "server.endpoint"),
    ],
)
def test_what_can_never_work_says_so_and_exits_for_good(
    smollm2_engine: Path, endpoint: str, flags: list[str], code: int, words: str
) -> None:
    with daemon(smollm2_engine, endpoint, *flags) as process:
        _, log = process.communicate(timeout=EXIT_S)
    assert process.returncode == code, log
    assert words in log
    assert "Traceback" not in log


def test_a_missing_engine_is_named(endpoint: str, tmp_path: Path) -> None:
    with daemon(tmp_path / "none", endpoint) as process:
        _, log = process.communicate(timeout=EXIT_S)
    assert process.returncode == 66
    assert "edgellm build" in log


def test_what_is_no_engine_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    words = f"{tmp_path}/model.gguf is a file; `edgellm build {tmp_path}/model.gguf -o ENGINE`"
    with daemon(Path("model.gguf"), f"ipc://{tmp_path}/e.sock") as process:
        _, log = process.communicate(timeout=EXIT_S)
    assert process.returncode == 66
    assert words in log
    assert main(["bench", "model.gguf"]) == 66
    assert words in capsys.readouterr().err


def test_without_proc_the_daemon_says_what_to_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path} is not mounted"):
        Daemon(lambda: Config(engine=EngineConfig(path="engine")))


def test_over_tcp_clients_with_a_key_are_answered_and_sighup_lets_in_more(
    smollm2_engine: Path, tmp_path: Path
) -> None:
    for directory, name in (("own", "server"), ("clients", "one"), ("later", "two")):
        assert main(["keygen", str(tmp_path / directory), "--name", name]) == 0
    endpoint = f"tcp://127.0.0.1:{free_ports()}"
    settings = (
        f"server.curve_secret_key={tmp_path}/own/server.key_secret",
        f"server.curve_clients={tmp_path}/clients",
    )
    flags = [part for setting in settings for part in ("--set", setting)]
    server_key = tmp_path / "own" / "server.key"
    with (
        daemon(smollm2_engine, endpoint, *flags) as process,
        Client(endpoint, curve=CurveKeys(tmp_path / "clients" / "one.key_secret", server_key)) as one,
        Client(endpoint, curve=CurveKeys(tmp_path / "later" / "two.key_secret", server_key)) as two,
    ):
        one.wait_ready(READY_S)
        assert "Paris" in one.chat(QUESTION, temperature=0, max_tokens=24).text
        with pytest.raises(Unreachable, match="does not know this client's key"):
            two.status()
        shutil.copy(tmp_path / "later" / "two.key", tmp_path / "clients")
        process.send_signal(signal.SIGHUP)
        two.wait_ready(READY_S)
        assert two.status().status == "ready"
        code, log = stop(process)
    assert code == 0
    assert "1 refused so far" in log
    assert "Traceback" not in log

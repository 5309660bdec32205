"""The blocking client against a real socket."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from fake_engine import EOS, FakeEngine, Service, echo

from edgellm import Client, errors
from edgellm.client import subscribe
from edgellm.scheduler.request import Finish, Request


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        service.engine.script = echo
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.endpoint, timeout=5) as client:
        yield client


def two_words(engine: FakeEngine, request: Request) -> None:
    """Say two words and no more: the rest is the test's."""
    engine.say(request.key, b"one ")
    engine.say(request.key, b"two ")


def test_asking(client: Client) -> None:
    assert client.chat("hi").text == "user:hi\nassistant:"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert client.chat(turns).text == "system:be brief\nuser:hi\nassistant:"
    answer = client.generate([104, 105], max_tokens=1, stop="x", temperature=0, seed=None)  # type: ignore[arg-type]
    assert (answer.text, answer.tokens, answer.finish_reason) == ("h", [104], "length")
    assert answer.usage.prompt_tokens == 2
    assert answer.timings.total_ms == pytest.approx(1000)
    assert client.tokenize("hi") == [104, 105]
    assert bytes(client.tokenize(messages="hi")) == b"user:hi\nassistant:"
    assert client.health().ready
    assert client.status().requests["done"] == 3
    assert (client.model().name, client.model().eos_ids) == ("fake-model", [EOS])


def test_streaming(client: Client) -> None:
    with client.stream_generate("abc") as stream:
        assert stream.answer is None
        assert "".join(delta.text for delta in stream) == "abc"
    assert stream.answer is not None
    assert stream.answer.text == "abc"
    assert list(stream) == []


def test_streams_may_be_read_in_turn(service: Service, client: Client) -> None:
    one, two = client.stream_generate("one"), client.stream_generate("two")
    assert client.generate("three").text == "three"
    assert "".join(delta.text for delta in two) == "two"
    assert "".join(delta.text for delta in one) == "one"


def test_leaving_a_stream_early_cancels_it(service: Service, client: Client) -> None:
    service.engine.script = two_words
    with client.stream_generate("x") as stream:
        assert next(stream).text.startswith("one")
    service.engine.wait(lambda engine: [finish for _, finish in engine.stopped] == [Finish.CANCELLED])
    for _ in client.stream_generate("x"):
        break
    service.engine.wait(lambda engine: len(engine.stopped) == 2)
    assert client.health().ready


def test_errors_are_the_daemon_s(service: Service, client: Client) -> None:
    with pytest.raises(errors.BadRequest, match="role") as raised:
        client.chat([{"role": "pirate", "content": "hi"}])
    assert raised.value.field == "messages[0].role"
    with pytest.raises(errors.TooLong):
        client.generate("x", max_tokens=10_000)
    with pytest.raises(errors.BadRequest, match="colour"):
        client.generate("x", colour="red")  # type: ignore[call-arg]
    with pytest.raises(errors.BadRequest, match="MessagePack"):
        client.generate("\udc80")
    service.engine.script = lambda engine, request: engine.end(request.key, Finish.FAULT)
    with pytest.raises(errors.InternalError), client.stream_generate("x") as stream:
        list(stream)


def test_a_timeout_cancels_the_request(service: Service, client: Client) -> None:
    service.engine.script = None
    with pytest.raises(errors.RequestTimeout) as raised:
        client.generate("x", timeout=0.05)
    assert isinstance(raised.value, TimeoutError)
    service.engine.wait(lambda engine: [finish for _, finish in engine.stopped] == [Finish.CANCELLED])
    service.engine.script = echo
    assert client.generate("y").text == "y"  # the late reply is not mistaken for this one


def test_nobody_there(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/none.sock", connect_timeout=0.05) as client:
        with pytest.raises(errors.Unreachable, match=r"none\.sock"):
            client.chat("hi")
        with pytest.raises(errors.RequestTimeout, match="nothing answered"):
            client.wait_ready(0.1)
    with Client("nonsense") as client, pytest.raises(errors.Unreachable, match="ipc://PATH"):
        client.chat("hi")


def test_what_speaks_something_else(tmp_path: Path) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/other.sock")

    def answer() -> None:
        for reply in (b"hello?", msgpack.packb([1, 2]), msgpack.packb({"v": 9, "id": 1, "ev": "new"})):
            route, _ = router.recv_multipart()
            router.send_multipart([route, reply])

    thread = threading.Thread(target=answer)
    thread.start()
    with Client(f"ipc://{tmp_path}/other.sock", timeout=5) as client:
        for _ in range(3):
            with pytest.raises(errors.ProtocolError):
                client.health()
    thread.join()
    context.destroy(linger=0)


def test_a_daemon_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.engine.script = two_words
    with Client(service.endpoint, timeout=5, connect_timeout=0.2) as client:
        stream = client.stream_generate("x")
        assert next(stream).text.startswith("one")
        service.close()
        with pytest.raises(errors.ShuttingDown):
            list(stream)
        with pytest.raises((errors.Unreachable, errors.ConnectionLost)):
            client.health()
        with Service(tmp_path) as again:
            again.engine.script = echo
            assert client.generate("back").text == "back"


def test_a_daemon_that_is_killed_is_noticed_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, zmq; s = zmq.Context().socket(zmq.ROUTER); s.bind(sys.argv[1]); print('up', flush=True);"
        "s.recv_multipart(); print('got it', flush=True); s.recv_multipart()"
    )
    endpoint = f"ipc://{tmp_path}/edgellm.sock"
    daemon = subprocess.Popen([sys.executable, "-c", program, endpoint], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "up\n"

    def kill() -> None:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        daemon.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with Client(endpoint, timeout=30) as client, pytest.raises(errors.ConnectionLost):
        client.generate("x")
    killer.join()
    daemon.wait()
    daemon.stdout.close()


def test_waiting_for_a_daemon_that_starts_later(tmp_path: Path) -> None:
    with Service(tmp_path, ready=False) as service, Client(service.endpoint) as client:
        timer = threading.Timer(0.1, service.attach)
        timer.start()
        assert client.wait_ready(5).ready
        timer.join()


def test_a_closed_client_says_so(service: Service) -> None:
    with Client(service.endpoint) as client:
        client.health()
    for ask in (lambda: client.chat("hi"), lambda: client.stream_chat("hi"), lambda: client.wait_ready(1)):
        with pytest.raises(errors.ClientError, match="closed"):
            ask()
    with subscribe(service.endpoint) as events:
        pass
    with pytest.raises(errors.ClientError, match="closed"):
        events.receive(1)


@pytest.mark.parametrize("messages", [42, None, ["hi"], {"role": "user"}, [{"role": "user", "content": 4}]])
def test_what_is_no_conversation_is_a_bad_request(client: Client, messages: Any) -> None:
    with pytest.raises(errors.BadRequest) as raised:
        client.chat(messages)
    assert raised.value.field is not None
    assert raised.value.field.startswith("messages")


def test_what_is_no_prompt_is_a_bad_request(client: Client) -> None:
    for prompt in (42, ["x"], [1.5]):
        with pytest.raises(errors.BadRequest, match="prompt"):
            client.generate(prompt)  # type: ignore[arg-type]
    for name in ("stop", "logit_bias"):
        with pytest.raises(errors.BadRequest, match=name):
            client.generate("x", **{name: 4})  # type: ignore[arg-type]
    assert client.generate(np.array([104, 105])).text == "hi"  # type: ignore[arg-type]


def test_an_app_pulls_in_pyzmq_and_msgpack_and_nothing_else() -> None:
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from edgellm import AsyncClient, Client\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - set(sys.stdlib_module_names)))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    roots = {name for name in eval(said) if not name.startswith("_")}
    assert {"edgellm", "msgpack", "zmq"} <= roots
    assert not roots & {"msgspec", "numpy", "onnxruntime", "onnx", "tokenizers", "jinja2", "psutil", "rich"}

"""The server over tcp: who holds a known key is answered and is who the key says; nobody else gets in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.auth
from curve_service import TcpService, free_ports
from fake_engine import Peer, Service
from fake_governor import FakeGovernor

from edgellm.client import AsyncClient, Client, CurveKeys, Statistics, subscribe
from edgellm.curve import write_new_pair
from edgellm.errors import (
    BadKeys,
    ConfigError,
    Forbidden,
    Overloaded,
    RequestTimeout,
    TemporaryShortage,
    Unreachable,
)
from edgellm.scheduler.request import Priority
from edgellm.server import Server
from edgellm.server.router import Router
from edgellm.server.tcp_address import TcpAddress
from edgellm.server.zap import DOMAIN, Refusals, judge
from edgellm.server_config import AccessRule, ServerConfig

SHORT_S = 0.6


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TcpService]:
    with TcpService(tmp_path, "perception", "dashboard") as service:
        yield service


def ask(service: TcpService, keys: CurveKeys, **options: object) -> str:
    with Client(service.endpoint, connect_timeout=5, curve=keys) as client:
        return client.generate("hello").text


UNKNOWN = "does not know this client's key"
SILENT = "nothing serves at .* under the public key"


def refused(endpoint: str, keys: CurveKeys, words: str = UNKNOWN) -> None:
    """A client with these keys is told that nobody is there for it, by a typed error."""
    with (
        Client(endpoint, connect_timeout=SHORT_S, curve=keys) as client,
        pytest.raises(Unreachable, match=words),
    ):
        client.generate("hello")

    async def asynchronous() -> None:
        async with AsyncClient(endpoint, connect_timeout=SHORT_S, curve=keys) as client:
            await client.generate("hello")

    with pytest.raises(Unreachable, match=words):
        asyncio.run(asynchronous())


def eventually(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_known_key_is_answered(service: TcpService) -> None:
    keys = service.pair("perception")
    with Client(service.endpoint, connect_timeout=5, curve=keys) as client:
        assert client.generate("hello").text == "hello"
        with client.stream_generate("stream") as stream:
            assert "".join(delta.text for delta in stream) == "stream"
        assert client.wait_ready(5).ready

    async def asynchronous() -> str:
        async with AsyncClient(service.endpoint, connect_timeout=5, curve=keys) as client:
            assert (await client.wait_ready(5)).ready
            return (await client.generate("async")).text

    assert asyncio.run(asynchronous()) == "async"


def test_keys_of_the_environment(service: TcpService, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = service.pair("perception")
    monkeypatch.setenv("EDGELLM_CURVE_SECRET_KEY", str(keys.secret_key_file))
    monkeypatch.setenv("EDGELLM_CURVE_SERVER_KEY", str(keys.server_public_key_file))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgellm", *arguments, "--endpoint", service.endpoint]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for arguments in (["chat", "hi"], ["top", "--once"]):
        ended = run(*arguments)
        assert (ended.returncode, ended.stderr) == (0, "")
    monkeypatch.delenv("EDGELLM_CURVE_SERVER_KEY")
    ended = run("chat", "hi")
    assert ended.returncode == 69
    assert "EDGELLM_CURVE_SERVER_KEY" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unknown_key_never_gets_in(service: TcpService, caplog: pytest.LogCaptureFixture) -> None:
    keys = service.pair("stranger")
    refused(service.endpoint, keys)
    assert "not in server.curve_clients" in caplog.text
    public, secret = zmq.auth.load_certificate(keys.secret_key_file)
    assert public.decode() in caplog.text
    assert secret is not None
    assert secret.decode() not in caplog.text
    assert not service.engine.requests
    assert ask(service, service.pair("dashboard")) == "hello"


def test_no_key_never_gets_in(service: TcpService, caplog: pytest.LogCaptureFixture) -> None:
    with Peer(service.endpoint) as peer:
        peer.send(id=1, op="generate", prompt="x")
        eventually(lambda: "its handshake failed" in caplog.text)
        assert not peer.socket.poll(300)
    assert not service.engine.requests
    assert ask(service, service.pair("dashboard")) == "hello"


def test_another_servers_key_never_gets_in(service: TcpService, caplog: pytest.LogCaptureFixture) -> None:
    other, _ = write_new_pair(service.keys, "other-server")
    refused(service.endpoint, CurveKeys(service.keys / "perception.key_secret", other), SILENT)
    eventually(lambda: "its handshake failed" in caplog.text)
    assert not service.engine.requests
    assert ask(service, service.pair("dashboard")) == "hello"


def test_a_key_without_its_secret_never_gets_in(service: TcpService) -> None:
    """Public keys are no secret: who has copied one cannot use it."""
    stranger, known = service.pair("stranger"), service.pair("perception")
    with zmq.Context() as context, contextlib.closing(context.socket(zmq.DEALER)) as socket:
        socket.linger = 0
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        server, _ = zmq.auth.load_certificate(known.server_public_key_file)
        public, _ = zmq.auth.load_certificate(known.secret_key_file)
        _, secret = zmq.auth.load_certificate(stranger.secret_key_file)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        assert secret is not None
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.connect(service.endpoint)
        assert not monitor.poll(500)
        socket.disable_monitor()
        monitor.close(linger=0)
    assert not service.engine.requests


def test_rubbish_at_the_port_stops_nothing(service: TcpService) -> None:
    port = int(service.endpoint.rpartition(":")[2])
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b""):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(rubbish)
    assert ask(service, service.pair("perception")) == "hello"


def test_refusals_are_counted_and_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    for _ in range(1000):
        refusals.note("unknown")
    now = 61.0
    refusals.note("unknown")
    assert refusals.count == 1001
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "1001 refused" in said[1]


def test_a_key_is_let_in_once_the_directory_is_read_again(service: TcpService) -> None:
    keys = service.admit("late")

    async def asynchronous() -> str:
        async with AsyncClient(service.endpoint, connect_timeout=5, curve=keys) as other:
            with pytest.raises(Unreachable, match=UNKNOWN):
                await other.generate("early")
            service.server.reload_clients()
            return (await other.generate("hello")).text

    with Client(service.endpoint, connect_timeout=5, curve=keys) as client:
        with pytest.raises(Unreachable, match=UNKNOWN):
            client.generate("early")
        assert asyncio.run(asynchronous()) == "hello"
        assert client.generate("hello").text == "hello"  # the same client tries anew
    (service.clients / "late.key").unlink()
    service.server.reload_clients()
    refused(service.endpoint, keys)


def test_a_bad_file_changes_nothing_when_read_again(service: TcpService) -> None:
    (service.clients / "broken.key").write_text("public-key = nonsense")
    with pytest.raises(ConfigError, match=r"server\.curve_clients: .*broken\.key"):
        service.server.reload_clients()
    assert ask(service, service.pair("perception")) == "hello"


def test_rules_by_key(tmp_path: Path) -> None:
    rules = [
        AccessRule(uid=0, max_priority="critical", may_limit=True),
        AccessRule(key="perception", max_priority="critical", may_limit=True),
        AccessRule(key="dashboard", max_priority="background", max_requests=0),
    ]
    config = ServerConfig(rules=rules, max_priority="normal")
    with TcpService(tmp_path, "perception", "dashboard", "guest", config=config) as service:
        governor = FakeGovernor()
        service.server.govern(governor)
        for name, priority in (("perception", Priority.CRITICAL), ("guest", Priority.NORMAL)):
            with Client(service.endpoint, connect_timeout=5, curve=service.pair(name)) as client:
                client.generate("x", priority="critical")
                assert service.engine.requests[-1].priority is priority
        with Client(service.endpoint, connect_timeout=5, curve=service.pair("dashboard")) as client:
            with pytest.raises(Overloaded, match=r"server\.rules\[2\]"):
                client.generate("x")
            with pytest.raises(Forbidden, match="key dashboard may not limit"):
                client.suspend()
        with Client(service.endpoint, connect_timeout=5, curve=service.pair("perception")) as client:
            client.suspend()
            client.resume()
            with pytest.raises(Forbidden, match="only root"):
                client.resume(everyone=True)
        assert [limit.by for limit in governor.limits] == ["key perception"]
        assert governor.released == ["key perception"]


def test_a_rule_for_a_key_that_is_not_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(rules=[AccessRule(key="app"), AccessRule(uid=1), AccessRule(key="typo")])
    with TcpService(tmp_path, "app", config=config):
        told = [record.getMessage() for record in caplog.records if "server.rules" in record.getMessage()]
    assert told == [f"server.rules[2]: there is no typo.key in {tmp_path}/clients"]


def test_a_rule_by_key_fits_nobody_over_ipc(tmp_path: Path) -> None:
    config = ServerConfig(rules=[AccessRule(key="perception", max_requests=0)])
    with Service(tmp_path, config) as service, Peer(service.endpoint) as peer:
        peer.send(id=1, op="generate", prompt="x")
        service.engine.wait(lambda engine: len(engine.requests) == 1)


def test_an_ipv6_address_is_no_uid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fd00::1:0:0:1 ends like `localhost:0:0:1`, which is how libzmq writes root's process 1 over ipc."""
    keys = {"Peer-Address": "fd00::1:0:0:1", "User-Id": "guest"}
    monkeypatch.setattr("edgellm.server.router._property", lambda _frame, name: keys[name])
    with (
        TcpService(tmp_path, "guest", config=ServerConfig(max_priority="normal")) as service,
        Client(service.endpoint, connect_timeout=5, curve=service.pair("guest")) as client,
    ):
        client.generate("x", priority="critical")
        assert service.engine.requests[-1].priority is Priority.NORMAL
        with pytest.raises(Forbidden, match="key guest"):
            client.suspend()


def test_who_does_not_read_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(send_timeout_s=0.2)
    with TcpService(tmp_path, "slow", config=config) as service:
        router = service.server._router
        keys = service.pair("slow")
        with zmq.Context() as context, contextlib.closing(context.socket(zmq.DEALER)) as sluggish:
            sluggish.linger = 0
            sluggish.rcvhwm = 1
            sluggish.rcvbuf = 4096
            server, _ = zmq.auth.load_certificate(keys.server_public_key_file)
            public, secret = zmq.auth.load_certificate(keys.secret_key_file)
            assert secret is not None
            sluggish.setsockopt(zmq.CURVE_SERVERKEY, server)
            sluggish.setsockopt(zmq.CURVE_PUBLICKEY, public)
            sluggish.setsockopt(zmq.CURVE_SECRETKEY, secret)
            sluggish.setsockopt(zmq.RECONNECT_IVL, -1)
            sluggish.connect(service.endpoint)
            question = msgspec.msgpack.encode({"v": 1, "id": 2, "op": "model"})
            for _ in range(20_000):
                if "does not read" in caplog.text:
                    break
                with contextlib.suppress(zmq.Again):
                    sluggish.send(question, zmq.NOBLOCK)
            eventually(lambda: "key=slow host=127.0.0.1" in caplog.text)
            eventually(lambda: not router._alive)


def test_events_come_over_tcp_too(service: TcpService) -> None:
    port = int(service.endpoint.rpartition(":")[2])
    assert service.server.events_endpoint == f"tcp://127.0.0.1:{port + 1}"
    with subscribe(service.endpoint, topics=["stats"], curve=service.pair("perception")) as events:
        eventually_published(service, events.receive)
    with (
        subscribe(service.endpoint, curve=service.pair("stranger")) as events,
        pytest.raises(AssertionError, match="nothing"),
    ):
        eventually_published(service, events.receive, tries=10)


def eventually_published(service: TcpService, receive: Callable[[float], object], tries: int = 100) -> None:
    for _ in range(tries):
        service.server.publish_statistics()
        with contextlib.suppress(RequestTimeout):
            assert isinstance(receive(0.05), Statistics)
            return
    raise AssertionError("nothing was published")


def test_events_over_tcp_beside_an_ipc_endpoint(tmp_path: Path) -> None:
    _, secret = write_new_pair(tmp_path / "keys", "server")
    (tmp_path / "clients").mkdir()
    events = f"tcp://127.0.0.1:{free_ports()}"
    server = Server(
        ServerConfig(
            endpoint=f"ipc://{tmp_path}/e.sock",
            events_endpoint=events,
            curve_secret_key=str(secret),
            curve_clients=str(tmp_path / "clients"),
        )
    )
    server.bind()
    server.start()
    with Peer(server.endpoint) as peer:
        assert peer.ask(id=1, op="health")["status"] == "loading"
    server.close()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5570", "tcp://*:5570"])
@pytest.mark.parametrize("key", ["curve_secret_key", "curve_clients"])
@pytest.mark.parametrize("field", ["endpoint", "events_endpoint"])
def test_tcp_without_keys_is_refused(tmp_path: Path, endpoint: str, key: str, field: str) -> None:
    config = msgspec.structs.replace(ServerConfig(), **{field: endpoint, key: str(tmp_path)})
    with pytest.raises(ConfigError, match=r"server\.curve_secret_key.*server\.curve_clients.*edgellm keygen"):
        Server(config)


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://", "tcp:/127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://:5570",
     "tcp://fd00::1:5570", "tcp://[fd00::x]:5570", "tcp://127.0.0.1:*", "tcp://a b:1"],
)  # fmt: skip
def test_endpoints_that_are_none(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.endpoint: .*tcp://ADDRESS:PORT"):
        Server(_config(tmp_path, endpoint))


def test_the_last_port_has_no_next(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.events_endpoint: .*65536"):
        Server(_config(tmp_path, "tcp://127.0.0.1:65535"))


def test_an_address_that_is_not_there_yet_is_tried_again(tmp_path: Path) -> None:
    server = Server(_config(tmp_path, "tcp://192.0.2.1:5570"))  # RFC 5737: nobody has it
    with pytest.raises(TemporaryShortage, match=r"server\.endpoint: .*192\.0\.2\.1.*no interface has"):
        server.bind()


@pytest.mark.parametrize(("host", "ipv6"), [("[fd00::10]", 1), ("192.168.1.10", 0), ("*", 0)])
def test_ipv6_is_asked_for_where_it_is_needed(host: str, ipv6: int) -> None:
    """Not by binding: a container may have no such address."""
    with zmq.Context() as context, contextlib.closing(context.socket(zmq.ROUTER)) as router:
        TcpAddress(f"tcp://{host}:5570", "server.endpoint").prepare(router)
        assert router.getsockopt(zmq.IPV6) == ipv6


def test_a_port_that_is_taken_is_named(tmp_path: Path, service: TcpService) -> None:
    (tmp_path / "second").mkdir()
    server = Server(_config(tmp_path / "second", service.endpoint))
    with pytest.raises(ConfigError, match=r"server\.endpoint: .*in use.*another port"):
        server.bind()


def test_a_process_that_may_have_no_such_sockets_is_told_the_drop_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidding(socket.socket):
        def __init__(self, family: int = -1, *args: int) -> None:
            if family == socket.AF_NETLINK:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *args)

    server = Server(_config(tmp_path, f"tcp://127.0.0.1:{free_ports()}"))
    monkeypatch.setattr("socket.socket", Forbidding)
    with pytest.raises(ConfigError, match=r"AF_NETLINK.*systemd/drop-ins/tcp\.conf"):
        server.bind()


def test_without_the_handler_nobody_gets_in(tmp_path: Path) -> None:
    """libzmq lets everyone in if nothing answers its questions, unless told otherwise."""
    service = TcpService(tmp_path, "perception")
    with service:
        assert service.server._authenticator is not None
        endpoint = f"tcp://127.0.0.1:{free_ports()}"
        with zmq.Context() as context:  # without a handler
            router = Router(ServerConfig(), endpoint, service.server._authenticator)
            router.bind(context)
            refused(endpoint, service.pair("perception"), SILENT)
            assert router.receive() is None
            router.close()


def test_judgements() -> None:
    key, other = b"k" * 32, b"o" * 32
    good = [b"1.0", b"7", DOMAIN, b"10.0.0.1", b"", b"CURVE", key]
    assert judge(good, {key: "app"}) == ([b"1.0", b"7", b"200", b"OK", b"app", b""], "")
    for index, value in ((0, b"2.0"), (2, b""), (5, b"NULL"), (5, b"PLAIN"), (6, other), (6, b"")):
        request = [*good[:index], value, *good[index + 1 :]]
        reply, refused = judge(request, {key: "app"})
        assert reply[:3] == [b"1.0", b"7", b"400"]
        assert reply[4] == b""
        assert refused
    for count in range(len(good)):
        assert judge(good[:count], {key: "app"})[0][2] == b"400"
    assert judge([*good, b""], {key: "app"})[0][2] == b"400"


def test_clients_without_keys_are_told_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGELLM_CURVE_SECRET_KEY", raising=False)
    with Client("tcp://127.0.0.1:5570") as client:
        with pytest.raises(BadKeys, match=r"CurveKeys.*EDGELLM_CURVE_SECRET_KEY.*edgellm keygen"):
            client.status()
        with pytest.raises(BadKeys, match="edgellm keygen"):
            client.wait_ready(30)
    with pytest.raises(BadKeys, match="edgellm keygen"):
        subscribe("tcp://127.0.0.1:5570")

    async def asynchronous() -> None:
        async with AsyncClient("tcp://127.0.0.1:5570") as client:
            await client.status()

    with pytest.raises(BadKeys, match="edgellm keygen"):
        asyncio.run(asynchronous())


def test_secrets_are_not_shown(service: TcpService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = service.pair("perception")
    _, secret = zmq.auth.load_certificate(keys.secret_key_file)
    assert secret is not None
    assert ask(service, keys) == "hello"
    assert service.server._authenticator is not None
    assert secret.decode() not in caplog.text + repr(keys) + str(dataclasses.asdict(keys))
    assert "secret" not in repr(service.server._authenticator._pair)


def _config(directory: Path, endpoint: str) -> ServerConfig:
    _, secret = write_new_pair(directory / "own", "server")
    clients = directory / "known"
    clients.mkdir()
    return ServerConfig(endpoint=endpoint, curve_secret_key=str(secret), curve_clients=str(clients))

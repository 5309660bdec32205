"""Whatever arrives, there is a typed answer, exactly one, and the loop goes on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from fake_engine import MAX_SEQ_LEN, VOCAB_SIZE, ByteTokenizer, FakeEngine, Peer, Service, echo
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgellm.protocol import OPS
from edgellm.scheduler.request import Request


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("socket")) as service:
        service.engine.script = echo
        yield service


@pytest.fixture(scope="module")
def peer(service: Service) -> Iterator[Peer]:
    with Peer(service.endpoint) as peer:
        yield peer


USER = [{"role": "user", "content": "hi"}]

BAD_FIELDS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"op": "sing"}, "bad_request", "op"),
    ({"op": None}, "bad_request", "op"),
    ({"v": 2, "op": "health"}, "bad_request", "v"),
    ({"v": "1", "op": "health"}, "bad_request", "v"),
    ({"op": "health", "colour": "red"}, "bad_request", "colour"),
    ({"op": "chat"}, "bad_request", "messages"),
    ({"op": "chat", "messages": []}, "bad_request", "messages"),
    ({"op": "chat", "messages": "hi"}, "bad_request", "messages"),
    ({"op": "chat", "messages": [{"role": "pirate", "content": "hi"}]}, "bad_request", "messages[0].role"),
    ({"op": "chat", "messages": [{"role": "user"}]}, "bad_request", "messages[0].content"),
    ({"op": "chat", "messages": [{"role": "user", "content": 5}]}, "bad_request", "messages[0].content"),
    ({"op": "chat", "messages": [{"role": "tool", "content": "x"}]}, "bad_request", "messages"),
    ({"op": "chat", "messages": USER, "temperature": math.nan}, "bad_request", "temperature"),
    ({"op": "chat", "messages": USER, "temperature": -1}, "bad_request", "temperature"),
    ({"op": "chat", "messages": USER, "temperature": "hot"}, "bad_request", "temperature"),
    ({"op": "chat", "messages": USER, "top_p": 0}, "bad_request", "top_p"),
    ({"op": "chat", "messages": USER, "top_p": math.inf}, "bad_request", "top_p"),
    ({"op": "chat", "messages": USER, "top_logprobs": 21, "logprobs": True}, "bad_request", "top_logprobs"),
    ({"op": "chat", "messages": USER, "top_logprobs": 2}, "bad_request", "top_logprobs"),
    ({"op": "chat", "messages": USER, "logit_bias": {VOCAB_SIZE: 1.0}}, "bad_request", "logit_bias"),
    ({"op": "chat", "messages": USER, "logit_bias": {1: math.nan}}, "bad_request", "logit_bias"),
    ({"op": "chat", "messages": USER, "stop": [""]}, "bad_request", "stop[0]"),
    ({"op": "chat", "messages": USER, "max_tokens": 0}, "bad_request", "max_tokens"),
    ({"op": "chat", "messages": USER, "max_tokens": MAX_SEQ_LEN}, "too_long", "max_tokens"),
    ({"op": "chat", "messages": USER, "min_tokens": 9, "max_tokens": 8}, "bad_request", "min_tokens"),
    ({"op": "chat", "messages": USER, "priority": "urgent"}, "bad_request", "priority"),
    ({"op": "chat", "messages": USER, "deadline_ms": 0}, "bad_request", "deadline_ms"),
    ({"op": "chat", "messages": USER, "seed": -1}, "bad_request", "seed"),
    (
        {"op": "chat", "messages": [{"role": "user", "content": "x" * MAX_SEQ_LEN}]},
        "too_long",
        "messages",
    ),
    ({"op": "generate", "prompt": ""}, "bad_request", "prompt"),
    ({"op": "generate", "prompt": []}, "bad_request", "prompt"),
    ({"op": "generate", "prompt": [1, VOCAB_SIZE]}, "bad_request", "prompt[1]"),
    ({"op": "generate", "prompt": [2**31]}, "bad_request", "prompt[0]"),
    ({"op": "generate", "prompt": [-1]}, "bad_request", "prompt[0]"),
    ({"op": "generate", "prompt": [1] * MAX_SEQ_LEN}, "too_long", "prompt"),
    ({"op": "cancel"}, "bad_request", "target"),
    ({"op": "cancel", "target": "nobody"}, "not_found", "target"),
    ({"op": "tokenize"}, "bad_request", "text"),
    ({"op": "tokenize", "text": "a", "messages": USER}, "bad_request", "text"),
]


@pytest.mark.parametrize(("fields", "code", "field"), BAD_FIELDS)
def test_a_bad_field_is_named(peer: Peer, fields: dict[str, Any], code: str, field: str | None) -> None:
    reply = peer.ask(**{"id": "bad", **fields})
    assert (reply["ev"], reply["id"], reply["code"], reply["field"]) == ("error", "bad", code, field)
    assert peer.silent()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xc1",
        msgpack.packb([1, "x", "health"]),
        msgpack.packb("health"),
        msgpack.packb(None),
        msgpack.packb({}),
        msgpack.packb({"v": 1, "op": "health"}),
        msgpack.packb({"v": 1, "op": "health", "id": ""}),
        msgpack.packb({"v": 1, "op": "health", "id": 1.5}),
        msgpack.packb({"v": 1, "op": "health", "id": "x" * 200}),
        msgpack.packb({1: 2}),
        b"\xdf\xff\xff\xff\xff",  # a map of 2³² − 1 entries, none of which follows
        b"\x81\xa1v" + b"\x91" * 5000,  # nested beyond any reason
        msgpack.packb(msgpack.ExtType(42, b"pickle")),
    ],
)
def test_what_has_no_usable_id_is_answered_without_one(peer: Peer, payload: bytes) -> None:
    peer.socket.send(payload)
    reply = peer.receive()
    assert (reply["ev"], reply["id"], reply["code"]) == ("error", None, "bad_request")
    assert peer.silent()


def test_a_truncated_message_is_answered_with_its_id(peer: Peer) -> None:
    peer.socket.send(msgpack.packb({"v": 1, "id": "cut", "op": "chat", "messages": USER})[:-3])
    reply = peer.receive()
    assert (reply["id"], reply["code"]) == ("cut", "bad_request")


def test_too_large_a_message_is_answered_with_its_id(peer: Peer) -> None:
    reply = peer.ask(id="large", op="generate", prompt="x" * 10_000_000)
    assert (reply["id"], reply["code"]) == ("large", "bad_request")
    assert "1048576" in reply["message"]
    assert peer.silent()


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "longest_token", 2)
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        service.engine.script = echo
        for fields in ({"op": "generate", "prompt": "é" * 257}, {"op": "tokenize", "text": "x" * 513}):
            reply = peer.ask(id=1, **fields)
            assert reply["code"] == "too_long"
            assert "514 bytes" in reply["message"] or "513 bytes" in reply["message"]
        assert len(peer.ask(id=1, op="tokenize", text="x" * 512)["tokens"]) == 512


def test_a_monstrous_frame_costs_its_sender_the_connection_and_nobody_else(service: Service) -> None:
    with Peer(service.endpoint) as monster, Peer(service.endpoint) as other:
        assert monster.silent()
        monster.socket.send(b"x" * (17 << 20))
        assert not monster.socket.poll(200)
        assert other.silent()


def test_a_hundred_frames_get_one_answer(peer: Peer) -> None:
    body = msgpack.packb({"v": 1, "id": "frames", "op": "health"})
    peer.socket.send_multipart([body] * 100)
    reply = peer.receive()
    assert (reply["id"], reply["code"]) == ("frames", "bad_request")
    assert "100" in reply["message"]
    peer.socket.send_multipart([b"", body, b""])  # a delimiter, and one frame too many
    assert peer.socket.recv() == b""
    assert peer.receive()["code"] == "bad_request"
    assert peer.silent()


def test_a_delimiter_is_echoed(peer: Peer) -> None:
    peer.socket.send_multipart([b"", msgpack.packb({"v": 1, "id": 5, "op": "health"})])
    delimiter, body = peer.socket.recv_multipart()
    assert delimiter == b""
    assert msgpack.unpackb(body)["status"] == "ready"


def test_req_gets_one_answer_to_anything(service: Service) -> None:
    with Peer(service.endpoint, zmq.REQ) as req:
        for payload in (b"", b"\x00", msgpack.packb({"v": 1, "id": 1, "op": "chat", "messages": USER})):
            req.socket.send(payload)
            assert req.receive()["ev"] in ("error", "done")


def test_an_open_id_cannot_be_used_twice(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        peer.send(id="a", op="generate", prompt="first")
        second = peer.ask(id="a", op="generate", prompt="second")
        assert (second["code"], second["field"]) == ("bad_request", "id")
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        (first,) = service.engine.requests
        service.engine.end(first.key, data=b"one")
        assert peer.receive()["text"] == "one"
        peer.send(id="a", op="generate", prompt="third")  # free again
        service.engine.wait(lambda engine: len(engine.requests) == 2)


def test_another_connection_may_use_the_id_but_not_cancel_it(tmp_path: Path) -> None:
    with Service(tmp_path) as service, Peer(service.endpoint) as one, Peer(service.endpoint) as two:
        one.send(id="a", op="generate", prompt="one")
        service.engine.wait(lambda engine: len(engine.requests) == 1)
        assert two.ask(id=1, op="cancel", target="a")["code"] == "not_found"
        two.send(id="a", op="generate", prompt="two")
        service.engine.wait(lambda engine: len(engine.requests) == 2)
        for request, text in zip(service.engine.requests, (b"1", b"2"), strict=True):
            service.engine.end(request.key, data=text)
        assert one.receive()["text"] == "1"
        assert two.receive()["text"] == "2"


def test_a_failure_of_ours_is_answered_and_logged_without_the_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(engine: FakeEngine, request: Request) -> None:
        raise RuntimeError(bytes(request.prompt.astype("u1")).decode())

    with Service(tmp_path) as service, Peer(service.endpoint) as peer:
        service.engine.script = broken
        assert peer.ask(id=1, op="generate", prompt="secret words")["code"] == "internal"
        service.engine.script = echo
        assert peer.ask(id=1, op="generate", prompt="secret words")["text"] == "secret words"
    assert "RuntimeError" in caplog.text
    assert "broken" in caplog.text  # the traceback
    assert "secret" not in caplog.text


def _valid_messages() -> list[dict[str, Any]]:
    sampling = {
        "temperature": 0.5,
        "top_k": 4,
        "stop": ["x"],
        "logit_bias": {1: 2.0},
        "seed": 9,
        "max_tokens": 4,
    }
    bodies: list[dict[str, Any]] = [{"op": op} for op in OPS]
    bodies += [
        {"op": "chat", "messages": USER, **sampling},
        {"op": "generate", "prompt": [1, 2, 3], "deadline_ms": 1000, "priority": "high"},
        {"op": "generate", "prompt": "abc", "logprobs": True, "top_logprobs": 2},
        {"op": "tokenize", "text": "abc"},
    ]
    return bodies


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(body=st.sampled_from(_valid_messages()), key=st.text(max_size=9), junk=JUNK, data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_message_with_an_id_is_answered_once_whatever_else_it_holds(
    peer: Peer, body: dict[str, Any], key: str, junk: Any, data: st.DataObject
) -> None:
    mutated = dict(body)
    mutated[data.draw(st.sampled_from([*body, key]))] = junk
    mutated.pop("stream", None)
    reply = peer.ask(**{**mutated, "id": "fuzz"})
    assert reply["id"] == "fuzz"
    assert peer.silent()


@given(payload=st.binary(max_size=300), delimited=st.booleans())
@example(payload=b"\x81\xd4\x00\x00\x00", delimited=False)  # a map whose key, an extension, cannot be hashed
@settings(max_examples=150, deadline=None)
def test_random_bytes_are_answered_once(peer: Peer, payload: bytes, delimited: bool) -> None:
    peer.socket.send_multipart([b"", payload] if delimited else [payload])
    reply = msgpack.unpackb(peer.socket.recv_multipart()[-1])
    assert reply["code"] == "bad_request"
    assert peer.silent()


@given(body=st.sampled_from(_valid_messages()), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_damaged_messages_are_answered_once(peer: Peer, body: dict[str, Any], seed: int) -> None:
    randomness = random.Random(seed)
    payload = bytearray(msgpack.packb({"v": 1, "id": "damaged", **body}))
    for _ in range(randomness.randint(1, 4)):
        payload[randomness.randrange(len(payload))] = randomness.randrange(256)
    peer.socket.send(bytes(payload[: randomness.randint(1, len(payload))]))
    assert peer.receive()["ev"] in ("error", "done", "accepted", "health", "status", "model", "tokenize")
    while peer.socket.poll(1):  # a damaged `stream` can only have become true
        assert peer.receive()["ev"] in ("delta", "done")
    assert peer.silent()

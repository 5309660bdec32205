"""The codec against another one: what msgspec reads and writes here, msgpack writes and reads."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm import protocol
from edgellm.errors import REQUEST_ERRORS, BadRequest, RequestError

ids = st.text(min_size=1, max_size=128) | st.integers(0, 2**64 - 1)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()}
    ),
    min_size=1,
    max_size=3,
)
sampling = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans(),
        "max_tokens": st.none() | st.integers(1, 2**31),
        "temperature": st.floats(0, 100) | st.integers(0, 100),
        "top_p": st.floats(0, 1, exclude_min=True),
        "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
        "seed": st.none() | st.integers(0, 2**64 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=9), max_size=3),
        "priority": st.sampled_from(["critical", "high", "normal", "background"]),
        "deadline_ms": st.none() | st.integers(1, 86_400_000),
    },
)


@given(id_=ids, turns=messages, options=sampling)
def test_a_valid_request_is_read_as_it_was_written(id_: Any, turns: Any, options: dict[str, Any]) -> None:
    payload = msgpack.packb({"v": 1, "id": id_, "op": "chat", "messages": turns, **options})
    request = protocol.decode_request(payload)
    assert isinstance(request, protocol.Chat)
    assert request.id == id_
    assert [(m.role, m.content) for m in request.messages] == [(t["role"], t["content"]) for t in turns]
    for name, value in options.items():
        assert getattr(request, name) == value
    assert protocol.decode_request(protocol.encode(request)) == request


@given(
    id_=ids,
    text=st.text(),
    tokens=st.lists(st.integers(0, 2**31 - 1)),
    stop=st.none() | st.text(),
    number=st.floats(0, 1e9),
)
def test_a_reply_is_read_by_another_codec(
    id_: Any, text: str, tokens: list[int], stop: str | None, number: float
) -> None:
    done = protocol.Done(
        id=id_,
        text=text,
        tokens=tokens,
        finish_reason="stop",
        usage=protocol.Usage(1, 2, 3),
        timings=protocol.Times(None, number, number),
        logprobs=[protocol.Logprob(token=5, logprob=-number, top=[(5, -number)])],
        stop=stop,
    )
    assert msgpack.unpackb(protocol.encode(done)) == {
        "ev": "done", "v": 1, "id": id_, "text": text, "tokens": tokens, "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 3},
        "timings": {"queue_ms": None, "first_token_ms": number, "total_ms": number},
        "logprobs": [{"token": 5, "logprob": -number, "top": [[5, -number]]}], "stop": stop,
    }  # fmt: skip


@given(st.binary())
def test_no_bytes_raise_anything_but_bad_request(payload: bytes) -> None:
    protocol.peek_id(payload)
    with pytest.raises(BadRequest):
        protocol.decode_request(payload)


@given(
    id_=ids,
    before=st.dictionaries(st.text(), st.text() | st.lists(st.integers(-(2**63), 2**64 - 1)), max_size=3),
    data=st.data(),
)
def test_an_id_is_found_in_what_is_left_of_a_message(
    id_: Any, before: dict[str, Any], data: st.DataObject
) -> None:
    for name in ("id", "rest"):
        before.pop(name, None)
    head = msgpack.packb({**before, "id": id_, "rest": "x" * 20})
    cut = data.draw(st.integers(len(head) - 20, len(head)))
    assert protocol.peek_id(head[:cut]) == id_


@pytest.mark.parametrize("code", REQUEST_ERRORS)
def test_an_error_crosses_the_wire_whole(code: str) -> None:
    error: RequestError = REQUEST_ERRORS[code]("why", field="top_p", retry_after_ms=5)
    fields = msgpack.unpackb(protocol.encode(protocol.error_reply("a", error)))
    assert fields == {
        "ev": "error", "v": 1, "id": "a", "code": code, "message": "why", "field": "top_p",
        "retry_after_ms": 5, "usage": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        (
            {"op": "chat", "messages": [{"role": "usr", "content": ""}]},
            "messages[0].role",
            "assistant, system",
        ),
        ({"op": "generate", "prompt": "x", "temprature": 1}, "temprature", "did you mean temperature?"),
        ({"op": "generate", "prompt": 4}, "prompt", "must be a string or an array, not an integer"),
        ({"op": "generate", "prompt": "x", "max_tokens": 0}, "max_tokens", "must be an integer, at least 1"),
    ],
)
def test_a_refusal_says_what_would_work(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(BadRequest) as raised:
        protocol.decode_request(msgpack.packb({"v": 1, "id": 1, **fields}))
    assert raised.value.field == field
    assert words in str(raised.value)
    assert "`" not in str(raised.value)

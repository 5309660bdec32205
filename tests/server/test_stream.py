"""One request's way back, for any cut into tokens, steps and sends."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edgellm.protocol import Accepted, Delta, Done, Error
from edgellm.scheduler.request import Finish, Token, Update
from edgellm.server.stream import Stream


def make(**changes: Any) -> Stream:
    arguments: dict[str, Any] = {
        "id": "a", "key": 1, "streaming": True, "delimited": False, "logprobs": False, "prompt_tokens": 3,
        "priority": "normal", "stop": [], "min_tokens": 0, "arrival": 10.0,
        "token_bytes": lambda token: bytes([token]) if token < 256 else b"",
    }  # fmt: skip
    return Stream(**{**arguments, **changes})


def expected(data: bytes, stops: list[str]) -> tuple[str, str | None]:
    """The answer by its definition: all bytes as text, cut before the stop string that is complete first."""
    text = data.decode("utf-8", "replace")
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(
    text=st.text(alphabet="abé→🙂", max_size=30),
    damage=st.binary(max_size=3),
    stops=st.lists(st.text(alphabet="abé→", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_the_deltas_are_the_answer_however_it_is_cut(
    text: str, damage: bytes, stops: list[str], data: st.DataObject
) -> None:
    payload = text.encode() + damage
    stream = make(stop=stops)
    sent: list[Any] = []

    def send_some() -> None:
        while data.draw(st.booleans()) and (reply := stream.next()) is not None:
            stream.advance()
            sent.append(reply)

    rest = list(payload)
    while rest:
        count = data.draw(st.integers(1, 5))
        stream.take(Update(1, [Token(byte) for byte in rest[:count]]), now=11.0)
        del rest[:count]
        send_some()
    stream.take(Update(1, finish=Finish.LENGTH), now=12.0)
    stream.take(Update(1, [Token(97)], finish=Finish.FAULT), now=13.0)  # after the end: nothing
    while (reply := stream.next()) is not None:
        stream.advance()
        sent.append(reply)

    accepted, *deltas, done = sent
    assert isinstance(accepted, Accepted)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert isinstance(done, Done)
    assert (done.text, done.stop) == expected(payload, stops)
    assert done.finish_reason == ("length" if done.stop is None else "stop")
    assert "".join(delta.text for delta in deltas) == done.text
    assert [token for delta in deltas for token in delta.tokens] == done.tokens
    assert done.tokens == list(payload)[: len(done.tokens)]
    assert done.usage.completion_tokens == len(done.tokens)
    assert stream.closed


def test_what_is_not_sent_merges() -> None:
    stream = make()
    assert isinstance(stream.next(), Accepted)
    stream.advance()
    for byte in b"abc":
        stream.take(Update(1, [Token(byte)]), now=11.0)
        delta = stream.next()  # offered, and there was no room
    assert isinstance(delta, Delta)
    assert delta.text == "abc"
    stream.advance()
    assert stream.next() is None


def test_an_error_is_the_end_and_reports_what_was_used() -> None:
    stream = make(streaming=False)
    stream.take(Update(1, [Token(97)], cached_tokens=2), now=11.0)
    assert stream.next() is None
    stream.take(Update(1, finish=Finish.DEADLINE), now=12.0)
    error = stream.next()
    assert isinstance(error, Error)
    assert (error.code, stream.outcome) == ("deadline_exceeded", "deadline_exceeded")
    assert error.usage is not None
    assert (error.usage.completion_tokens, error.usage.cached_tokens) == (1, 2)


def test_an_answer_that_nothing_may_continue_is_a_bad_request_after_its_tokens() -> None:
    stream = make(streaming=False)
    stream.take(Update(1, [Token(97)]), now=11.0)
    stream.take(Update(1, finish=Finish.NOTHING_ALLOWED), now=12.0)
    error = stream.next()
    assert isinstance(error, Error)
    assert error.code == "bad_request"
    assert "leaves no token" in error.message
    assert error.usage is not None
    assert error.usage.completion_tokens == 1


def test_a_stop_string_outweighs_a_later_failure() -> None:
    stream = make(stop=["!"])
    stream.take(Update(1, [Token(97), Token(33)]), now=11.0)
    assert stream.matched == "!"
    stream.take(Update(1, finish=Finish.FAULT), now=12.0)
    assert stream.outcome == "done"

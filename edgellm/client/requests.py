"""What can be asked: each operation's fields, under the names of the wire."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

Messages = str | Sequence[Mapping[str, str]]
"""A conversation, `{"role": …, "content": …}` a turn; a bare string is one turn of the user's."""


class Options(TypedDict, total=False):
    """How an answer is generated; what is absent is the daemon's default. See docs/protocol.md."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: Sequence[str]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    priority: Literal["critical", "high", "normal", "background"]
    deadline_ms: int


def chat(messages: Messages, stream: bool, options: Options) -> dict[str, Any]:
    """The fields of a `chat`."""
    return {"op": "chat", "messages": turns(messages), "stream": stream, **_plain(options)}


def generate(prompt: str | Sequence[int], stream: bool, options: Options) -> dict[str, Any]:
    """The fields of a `generate`."""
    return {"op": "generate", "prompt": _prompt(prompt), "stream": stream, **_plain(options)}


def tokenize(text: str | None, messages: Messages | None) -> dict[str, Any]:
    """The fields of a `tokenize`."""
    if messages is not None:
        return {"op": "tokenize", "messages": turns(messages)}
    return {"op": "tokenize", "text": text}


def limit(batch_cap: int | None, duty: float | None, ttl_ms: int | None) -> dict[str, Any]:
    """The fields of a `limit`."""
    return {"op": "limit", "batch_cap": batch_cap, "duty": duty, "ttl_ms": ttl_ms}


def suspend(ttl_ms: int | None) -> dict[str, Any]:
    """The fields of a `suspend`."""
    return {"op": "suspend", "ttl_ms": ttl_ms}


def resume(everyone: bool) -> dict[str, Any]:
    """The fields of a `resume`."""
    return {"op": "resume", "all": everyone}


def turns(messages: Messages) -> Any:
    """A conversation in the wire's form. What is none goes as it is: the daemon's refusal names the field."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Iterable) or isinstance(messages, Mapping):
        return messages
    return [dict(message) if isinstance(message, Mapping) else message for message in messages]


def _prompt(prompt: str | Sequence[int]) -> Any:
    """Token ids as plain ints, whichever integers they are; what is neither text nor ids goes as it is."""
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        return prompt
    tokens = list(prompt)
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        return tokens


def _plain(options: Options) -> dict[str, Any]:
    """Options as msgpack can write them; None means absent."""
    fields: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if "logit_bias" in fields:
        bias = fields["logit_bias"]
        fields["logit_bias"] = dict(bias) if isinstance(bias, Mapping) else bias
    if "stop" in fields:
        stop = fields["stop"]
        if isinstance(stop, str):
            stop = [stop]
        fields["stop"] = list(stop) if isinstance(stop, Iterable) else stop
    return fields

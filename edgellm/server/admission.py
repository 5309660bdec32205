"""From a wire request to what the engine is asked: tokens, limits, defaults."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import BadRequest, TooLong
from edgellm.protocol import Chat, Generate, Generation, Message, Tokenize
from edgellm.sampling import SamplingParams
from edgellm.server.served import ServedModel


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine can serve; fields as in `scheduler.request.Request`."""

    prompt: NDArray[np.int32]
    sampling: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]


def admit(model: ServedModel, request: Chat | Generate, default_max_tokens: int) -> Admitted:
    """Tokenize and check a request against the model and the slot.

    Raises:
        BadRequest: with the field at fault.
        TooLong: prompt, or prompt and max_tokens, outgrow a slot; says by how much.
    """
    field = "messages" if isinstance(request, Chat) else "prompt"
    prompt = _prompt(model, request)
    if not len(prompt):
        raise BadRequest(f"{field} is empty: there is nothing to continue", field=field)
    max_tokens = _max_tokens(model, request, len(prompt), field, default_max_tokens)
    stop_ids = frozenset[int]() if request.ignore_eos else frozenset(model.eos_ids)
    return Admitted(prompt, _sampling(model, request, stop_ids), max_tokens, stop_ids)


def tokenize(model: ServedModel, request: Tokenize) -> NDArray[np.int32]:
    """Token ids int32 [n] of a text or a conversation.

    Raises:
        BadRequest: with the field at fault.
        TooLong: it could not fit in a slot.
    """
    if request.messages is not None:
        return _encode_chat(model, request.messages)
    assert request.text is not None
    return _encode(model, request.text, "text")


def _prompt(model: ServedModel, request: Chat | Generate) -> NDArray[np.int32]:
    if isinstance(request, Chat):
        return _encode_chat(model, request.messages)
    if isinstance(request.prompt, str):
        return _encode(model, request.prompt, "prompt", bos=True)
    prompt = np.asarray(request.prompt, dtype=np.int32)
    if (outside := np.flatnonzero(prompt >= model.vocab_size)).size:
        where = int(outside[0])
        raise BadRequest(
            f"prompt[{where}] is token {prompt[where]}, and the vocabulary ends at {model.vocab_size - 1}",
            field=f"prompt[{where}]",
        )
    return prompt


def _encode(
    model: ServedModel, text: str, field: str, *, bos: bool = False, mark: str = ""
) -> NDArray[np.int32]:
    """Tokenize what could fit a slot: a megabyte of text would take the I/O thread 0.4 s and 100 MB."""
    longest = model.tokenizer.longest_token
    if longest is not None:
        size = len((text.replace(mark, "") if mark else text).encode(errors="replace"))
        if size > longest * model.max_seq_len:
            raise TooLong(
                f"the text has {size} bytes, and more than {longest * model.max_seq_len} cannot fit in a slot"
                f" of {model.max_seq_len} tokens",
                field=field,
            )
    return model.tokenizer.encode(text, bos=bos, mark=mark)


def _encode_chat(model: ServedModel, messages: list[Message]) -> NDArray[np.int32]:
    """A conversation's tokens. Special tokens are the template's: within messages they are quoted."""
    if model.template is None:
        raise BadRequest("this engine has no chat template: use op generate", field="op")
    contents, mark = model.tokenizer.quote([message.content for message in messages])
    turns = zip(messages, contents, strict=True)
    text = model.template.render([{"role": message.role, "content": content} for message, content in turns])
    return _encode(model, text, "messages", mark=mark)


def _max_tokens(model: ServedModel, request: Generation, prompt: int, field: str, default: int) -> int:
    room = model.max_seq_len - prompt
    if room < 1:
        raise TooLong(
            f"the prompt has {prompt} tokens, and a slot holds {model.max_seq_len}, at least one of them for"
            f" the answer: shorten it to {model.max_seq_len - 1}",
            field=field,
        )
    if request.max_tokens is None:
        max_tokens = min(default, room)
    elif request.max_tokens > room:
        raise TooLong(
            f"max_tokens is {request.max_tokens}, and after a prompt of {prompt} tokens {room} fit in a slot"
            f" of {model.max_seq_len}",
            field="max_tokens",
        )
    else:
        max_tokens = request.max_tokens
    if request.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens is {request.min_tokens}, more than max_tokens, which is {max_tokens} here",
            field="min_tokens",
        )
    return max_tokens


def _sampling(model: ServedModel, request: Generation, stop_ids: frozenset[int]) -> SamplingParams:
    for token in request.logit_bias:
        if token >= model.vocab_size:
            raise BadRequest(
                f"logit_bias names token {token}, and the vocabulary ends at {model.vocab_size - 1}",
                field="logit_bias",
            )
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", field="top_logprobs")
    return SamplingParams(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        seed=secrets.randbits(64) if request.seed is None else request.seed,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        min_tokens=request.min_tokens,
        suppressed=tuple(sorted(stop_ids)) if request.min_tokens else (),
    )

"""Chat templates: a conversation becomes the text that the model was trained on.

Templates are jinja, as Hugging Face's `transformers` compiles them: sandboxed, immutable, blocks trimmed,
with `raise_exception`, `tojson` and loop controls. They come with a checkpoint, which may come from anywhere:
loops, products and the text itself are bounded, so that a careless one cannot hang or fill a daemon.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgellm.errors import BadRequest, EngineError

MAX_OUTPUT_CHARACTERS: Final = 16_000_000
MAX_RANGE_TOTAL: Final = 100_000
"""What all `range` loops of one rendering may run over, together. A conversation has at most 4,096 turns."""


class _Refusal(Exception):
    """The template called raise_exception."""


class _Excess(Exception):
    """The template does more than any template needs."""


class ChatTemplate:
    """A compiled chat template. Any thread may render.

    Args:
        source: jinja.
        bos, eos: text of the special tokens, `bos_token` and `eos_token` in the template; "" if none.

    Raises:
        EngineError: the source is not a template.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._special = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise EngineError(f"the chat template does not compile: {error}") from error

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the answer begins.

        Args:
            messages: maps with `role` and `content`.
            add_generation_prompt: end with what opens the assistant's turn.

        Raises:
            BadRequest: the template refuses this conversation.
        """
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                range=_Ranges().range,
                **self._special,
            ):
                size += len(part)
                _bound(size, "its text is too long")
                parts.append(part)
        except _Refusal as error:
            raise BadRequest(f"the model's chat template refuses this: {error}", field="messages") from error
        except Exception as error:  # a template is a program: it may fail with anything
            raise BadRequest(
                f"the model's chat template fails on this conversation: {error}", field="messages"
            ) from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products bounded: `'x' * 10**10` is one operation."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse what would be huge before it is made."""
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if hasattr(sequence, "__len__"):
                    _bound(len(sequence) * times, "it repeats a text too often")
        if operator == "**" and (abs(left) > 1_000_000 or abs(right) > 64):
            raise _Excess("it computes a huge power")
        return super().call_binop(context, operator, left, right)


class _Ranges:
    """Counts what all loops of one rendering run over."""

    def __init__(self) -> None:
        self._left = MAX_RANGE_TOTAL

    def range(self, *bounds: int) -> Iterator[int]:
        """Python's range, until the total is used up."""
        for value in range(*bounds):
            self._left -= 1
            if self._left < 0:
                raise _Excess("its loops do not end")
            yield value


def _bound(size: int, what: str) -> None:
    if size > MAX_OUTPUT_CHARACTERS:
        raise _Excess(what)


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja's own escapes HTML, which models have not been trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)

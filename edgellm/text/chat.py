"""Chat templates: a conversation becomes the text that the model was trained on.

Templates are jinja, as Hugging Face's `transformers` compiles them: sandboxed, immutable, blocks trimmed,
with `raise_exception`, `strftime_now`, `tojson`, `{% generation %}` and loop controls. They come with a
checkpoint, which may come from anywhere, so time and memory are bounded: see `edgellm.text.budget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from edgellm.errors import BadRequest, EngineError
from edgellm.text.budget import Budget, within
from edgellm.text.sandbox import MAX_SOURCE_CHARACTERS, Refusal, SandboxedEnvironment

_MAX_COMPLAINT: Final = 300


class ChatTemplate:
    """A compiled chat template. Any thread may render.

    Args:
        source: jinja.
        bos, eos: text of the special tokens, `bos_token` and `eos_token` in the template; "" if none.

    Raises:
        EngineError: the source is not a template, or a huge one.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._special = {"bos_token": bos, "eos_token": eos}
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise EngineError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARACTERS}"
            )
        try:
            self._template = SandboxedEnvironment().from_string(source)
        except Exception as error:  # Python's compiler has limits of its own, and says so in its own ways
            raise EngineError(f"the chat template does not compile: {_brief(error)}") from error

    def complaint(self) -> str | None:
        """Why it cannot write the simplest conversation, a user's single message; None: it can."""
        try:
            self.render([{"role": "user", "content": "Hello."}])
        except BadRequest as error:
            return str(error)
        return None

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the answer begins.

        Args:
            messages: maps with `role` and `content`.
            add_generation_prompt: end with what opens the assistant's turn.

        Raises:
            BadRequest: the template refuses this conversation, fails on it, or takes too much time or text.
        """
        given = sum(len(text) for message in messages for text in message.values())
        try:
            return within(
                Budget(given),
                self._template.generate(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special,
                ),
            )
        except Refusal as error:
            raise BadRequest(
                f"the model's chat template refuses this: {_brief(error)}", field="messages"
            ) from error
        except Exception as error:  # a template is a program: it may fail with anything
            raise BadRequest(
                f"the model's chat template fails on this conversation: {_brief(error)}", field="messages"
            ) from error


def _brief(error: Exception) -> str:
    """An error's sentence; a template may put anything into one."""
    text = str(error) or type(error).__name__
    return text if len(text) <= _MAX_COMPLAINT else f"{text[:_MAX_COMPLAINT]}…"

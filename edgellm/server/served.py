"""What the server is given once the engine is ready: the engine thread's handle, the model's text side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm.enginedir import EngineDir
from edgellm.executor.base import ExecutorInfo
from edgellm.governor.causes import Limit, State
from edgellm.governor.policy import Decision
from edgellm.governor.sensors import Readings
from edgellm.protocol import ModelReply
from edgellm.scheduler.request import Finish, Request


class EngineStats(Protocol):
    """Counters since the start, and how full the engine is now."""

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        ...

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        ...

    @property
    def batch_cap(self) -> int:
        """Rows that may advance in one step."""
        ...

    @property
    def steps(self) -> int:
        """Steps run."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of admitted prompts, cached ones included."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Those of them that were not computed again."""
        ...

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""
        ...


class EngineHandle(Protocol):
    """The engine thread as the I/O thread sees it. No call blocks."""

    def submit(self, request: Request) -> None:
        """Queue a request. Its updates arrive through `Server.deliver`, the last one with `finish`."""
        ...

    def stop(self, key: int, finish: Finish) -> None:
        """End a request after the step in flight; a key that has just ended is ignored."""
        ...

    def snapshot(self) -> EngineStats:
        """How things are now."""
        ...


class GovernorHandle(Protocol):
    """The governor as the I/O thread sees it. No call blocks."""

    @property
    def decision(self) -> Decision | None:
        """The last decision; None before the first."""
        ...

    @property
    def readings(self) -> Readings | None:
        """The newest sweep of the sensors, if there is one."""
        ...

    @property
    def transitions(self) -> Mapping[State, int]:
        """State → how often it was entered."""
        ...

    @property
    def dwell_s(self) -> float:
        """How long a state is kept, at least, after its cause is gone."""
        ...

    def limit(self, limit: Limit) -> Decision:
        """Put a ceiling on what runs, in place of the same asker's earlier one; holds from the next step."""
        ...

    def release(self, by: str | None) -> Decision:
        """Take back the ceiling that `by` asked for; None: everybody's."""
        ...


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0…vocab_size − 1."""
        ...

    @property
    def longest_token(self) -> int | None:
        """Bytes of text that one token can stand for; None if there is no bound."""
        ...

    @property
    def strips_space(self) -> bool:
        """Whether an answer's text of its own begins without the space of its first token."""
        ...

    def encode(self, text: str, *, bos: bool = False, mark: str = "") -> NDArray[np.int32]:
        """int32 [n]; special tokens written in the text are recognised, but for what `quote` marked; `bos` as
        the model wants it.
        """
        ...

    def quote(self, texts: Sequence[str]) -> tuple[list[str], str]:
        """Texts whose special tokens are not recognised by `encode` with the mark. Raises BadRequest."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for special tokens."""
        ...


class Template(Protocol):
    """A chat template."""

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt's text, up to where the assistant's turn begins. Raises BadRequest."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is being served, and how its text is made.

    Attributes:
        template: None where the engine has no chat template; `chat` is refused then.
        eos_ids: tokens that end an answer.
        max_batch_size: slots.
        max_seq_len: tokens a slot holds, prompt and answer together.
    """

    tokenizer: Tokenizer
    template: Template | None
    name: str
    architecture: str
    executor: str
    quantization: str
    vocab_size: int
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    eos_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        *,
        tokenizer: Tokenizer,
        template: Template | None,
        directory: EngineDir,
        info: ExecutorInfo,
    ) -> ServedModel:
        """Put together what an engine directory says and what the executor has made of it."""
        return cls(
            tokenizer=tokenizer,
            template=template,
            name=directory.model_name,
            architecture=directory.spec.architecture,
            executor=info.name,
            quantization=directory.config.pretrained_config.quantization.quant_algo or "none",
            vocab_size=info.vocab_size,
            max_batch_size=info.max_batch_size,
            max_seq_len=info.max_seq_len,
            max_num_tokens=info.max_num_tokens,
            eos_ids=directory.eos_ids,
        )

    def describe(self, id_: str | int) -> ModelReply:
        """The answer to `model`."""
        return ModelReply(
            id=id_,
            name=self.name,
            architecture=self.architecture,
            executor=self.executor,
            quantization=self.quantization,
            vocab_size=self.vocab_size,
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            max_num_tokens=self.max_num_tokens,
            eos_ids=list(self.eos_ids),
            chat_template=self.template is not None,
        )

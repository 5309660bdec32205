"""A checkpoint around another: the base of those that change its tensors."""

from __future__ import annotations

from pathlib import Path

from edgellm.checkpoint.base import Checkpoint
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Weight


class WrappedCheckpoint:
    """All that the checkpoint inside is; see `Checkpoint`."""

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner

    @property
    def path(self) -> Path:
        """The file or directory."""
        return self._inner.path

    @property
    def spec(self) -> ModelSpec:
        """The architecture's numbers."""
        return self._inner.spec

    @property
    def name(self) -> str:
        """What to call the model."""
        return self._inner.name

    @property
    def quantization(self) -> Quantization:
        """How most of the linear layers are stored."""
        return self._inner.quantization

    @property
    def stored_bytes(self) -> int:
        """Of all tensors on disk."""
        return self._inner.stored_bytes

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None."""
        return self._inner.chat_template

    @property
    def bos_id(self) -> int | None:
        """The token that opens a text, or None."""
        return self._inner.bos_id

    @property
    def add_bos(self) -> bool:
        """Whether a text starts with it."""
        return self._inner.add_bos

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self._inner.eos_ids

    @property
    def bos_token(self) -> str:
        """The text of `bos_id`."""
        return self._inner.bos_token

    @property
    def eos_token(self) -> str:
        """The text of the first of `eos_ids`."""
        return self._inner.eos_token

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this canonical name."""
        return self._inner.has(name)

    def tokenizer_json(self) -> bytes:
        """The tokenizer in the format of Hugging Face's `tokenizers`, UTF-8."""
        return self._inner.tokenizer_json()

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name.

        Raises:
            CheckpointError: there is none.
        """
        return self._inner.tensor(name)

"""What a checkpoint is to the rest of edgellm, whatever its file format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from edgellm.errors import CheckpointError
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Weight


class Checkpoint(Protocol):
    """A model on disk. Opening reads the header; a tensor's bytes are read when its `read()` is called.

    Tensors have canonical names, Hugging Face's without `model.` and `.weight`:
        embed_tokens · norm · lm_head (absent when tied)
        layers.{i}.input_layernorm · layers.{i}.post_attention_layernorm
        layers.{i}.self_attn.{q,k,v,o}_proj · layers.{i}.self_attn.{q,k,v}_proj.bias
        layers.{i}.mlp.{gate,up,down}_proj
        layers.{i}.mlp.gate (the router) · layers.{i}.mlp.experts.{e}.{gate,up,down}_proj in a mixture's stead
    Rows of q and k are in Hugging Face's order (rotary halves: element d pairs with d + head_size / 2).

    Attributes:
        path: the file or directory.
        spec: the architecture's numbers.
        name: what to call the model.
        quantization: how most of the linear layers are stored.
        stored_bytes: of all tensors on disk.
        chat_template: jinja source, or None.
        bos_id: the token that opens a text, or None.
        add_bos: whether a text starts with bos_id when no chat template writes it.
        eos_ids: the tokens that end an answer, ascending; the first in `eos_token` is the template's.
        bos_token, eos_token: their text, as chat templates use it; "" where there is none.
    """

    @property
    def path(self) -> Path: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def name(self) -> str: ...
    @property
    def quantization(self) -> Quantization: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this canonical name."""
        ...

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name.

        Raises:
            CheckpointError: there is none. The weight's `read()` raises it for damaged values.
        """
        ...

    def tokenizer_json(self) -> bytes:
        """The tokenizer in the format of Hugging Face's `tokenizers`, UTF-8.

        Raises:
            CheckpointError: the vocabulary is damaged or of a kind that edgellm does not know.
        """
        ...


def name_of(file_name: str) -> str:
    """A model's name from that of its file: what is no UTF-8 in it becomes U+FFFD."""
    return os.fsencode(file_name).decode(errors="replace")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, of whatever format edgellm reads.

    Raises:
        CheckpointError: there is none, it is damaged, or of an unsupported format or architecture.
    """
    try:
        files = sorted(path.iterdir()) if path.is_dir() else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if files is None:
        _require_file(path)
    for file in files or ():
        _refuse_pipe(file)

    # Imported here, so that a family of formats is paid for only by those who open it.
    if files is not None and path / "config.json" in files:
        from edgellm.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)

    from edgellm.checkpoint.gguf_model import GgufCheckpoint
    from edgellm.checkpoint.safetensors import refuse_pickles

    if files is not None:
        ggufs = [file for file in files if file.suffix == ".gguf"]
        if len(ggufs) != 1:
            refuse_pickles(files)
            raise CheckpointError(
                f"{path} is a directory with {len(ggufs) or 'no'} GGUF files and no config.json; "
                "name the .gguf file to build, or a model directory"
            )
        path = ggufs[0]
    refuse_pickles([path])
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} holds tensors alone; name its directory, which has the config.json")
    return GgufCheckpoint(path)


def _require_file(path: Path) -> None:
    if not path.exists():
        hint = ""
        if not path.is_absolute() and len(path.parts) == 2:
            hint = "; edgellm fetches nothing from a model hub: bring the files yourself"
        raise CheckpointError(f"cannot read {path}: No such file or directory{hint}")
    _refuse_pipe(path)


def _refuse_pipe(path: Path) -> None:
    """What is there and neither a file nor a directory: reading from a pipe would never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a directory")

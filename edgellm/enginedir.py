"""The engine directory: what `edgellm build` writes and everything else opens.

    config.json             TensorRT-LLM's version, pretrained_config and build_config, plus our own section
    model.onnx, …           the network, by executor: for CUDA network.json, weights.safetensors, its pieces'
                            digests weights.sha256, and compiled kernels as kernels/sm_87/….cubin
    tokenizer.json          Hugging Face's tokenizers
    tokenizer_config.json   the special tokens' text, for the chat template
    chat_template.jinja     absent if the checkpoint has none
    generation_config.json  Hugging Face's: bos and eos ids
    quantization.json       what `edgellm build --quant` cost (`quantize/report.py`); absent without

Every file's size and SHA-256 is in config.json, its own among them (`engine_seal.py`). A directory without a
config.json is no engine; it is written last, and only then the directory takes its place (`engine_place.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edgellm.engine_config import (
    CONFIG,
    FORMAT_VERSION,
    BuildConfig,
    Compute,
    EdgellmSection,
    EngineConfig,
    PretrainedConfig,
)
from edgellm.engine_seal import is_sealed, sha256_of
from edgellm.errors import EngineError
from edgellm.executor.base import Progress
from edgellm.model.kv_cache import KvCache
from edgellm.model.spec import ModelSpec

if TYPE_CHECKING:
    from edgellm.text.chat import ChatTemplate
    from edgellm.text.tokenizer import Tokenizer

__all__ = [
    "FORMAT_VERSION",
    "BuildConfig",
    "EdgellmSection",
    "EngineConfig",
    "EngineDir",
    "PretrainedConfig",
    "is_engine",
    "open_engine",
    "verify_engine",
    "write_json",
]

TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
GENERATION_CONFIG: Final = "generation_config.json"
QUANTIZATION: Final = "quantization.json"


@dataclass(frozen=True, slots=True)
class EngineDir:
    """An engine directory that `open_engine` found in order."""

    path: Path
    config: EngineConfig

    @property
    def spec(self) -> ModelSpec:
        """The model's numbers."""
        return self.config.pretrained_config.spec()

    @property
    def build(self) -> BuildConfig:
        """What it was built for."""
        return self.config.build_config

    @property
    def compute(self) -> Compute:
        """How the linear layers compute."""
        return self.config.edgellm.compute

    @property
    def kv_cache(self) -> KvCache:
        """Element type of the KV cache: fixed by the network that was built."""
        return self.config.edgellm.kv_cache

    @property
    def model_name(self) -> str:
        """What to call the model."""
        return self.config.edgellm.model_name

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.config.edgellm.eos_ids

    @property
    def bos_id(self) -> int | None:
        """The token that opens a text, or None."""
        return self.config.edgellm.bos_id

    @property
    def compared_by_executor(self) -> str | None:
        """The file that the executor compares itself, since it reads all of it anyway: piece by piece, with
        digests that are compared like any other file."""
        return "weights.safetensors" if self.config.edgellm.executor == "cuda" else None

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer.

        Raises:
            EngineError: tokenizer.json is damaged.
        """
        from edgellm.text.tokenizer import Tokenizer

        return Tokenizer.from_file(self.path / TOKENIZER, bos_id=self.bos_id if self._ours.add_bos else None)

    def chat_template(self) -> ChatTemplate | None:
        """Compile the chat template; None if the model has none.

        Raises:
            EngineError: chat_template.jinja or tokenizer_config.json is damaged.
        """
        from edgellm.text.chat import ChatTemplate

        if CHAT_TEMPLATE not in self._ours.files:
            return None
        special = msgspec.json.decode(_read(self.path / TOKENIZER_CONFIG), type=dict[str, Any])
        return ChatTemplate(
            _read(self.path / CHAT_TEMPLATE).decode(),
            bos=special.get("bos_token") or "",
            eos=special.get("eos_token") or "",
        )

    @property
    def _ours(self) -> EdgellmSection:
        return self.config.edgellm


def open_engine(path: Path) -> EngineDir:
    """Open an engine directory: config.json is checked whole, of the other files presence and size.

    `verify_engine` reads the other files too; it may run beside the loading.

    Raises:
        EngineError: it is no engine, or of another format version, or a file disagrees; the message names it.
    """
    try:
        is_file, is_directory, has_config = path.is_file(), path.is_dir(), (path / CONFIG).is_file()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    if is_file:
        raise EngineError(
            f"{path} is a file; `edgellm build {path} -o ENGINE` makes an engine directory of a checkpoint"
        )
    if not is_directory:
        raise EngineError(
            f"there is no engine directory {path}; `edgellm build CHECKPOINT -o {path}` makes one"
        )
    if not has_config:
        raise EngineError(f"{path} is not an engine directory: it has no {CONFIG}")
    raw = _read(path / CONFIG)
    version = _format_version(raw)
    if version is None and _is_model_config(raw):
        raise EngineError(
            f"{path} is a checkpoint; `edgellm build {path} -o ENGINE` makes an engine directory of it"
        )
    if version is None:
        raise EngineError(f"{path / CONFIG} is damaged, or not edgellm's; build the engine again")
    if version != FORMAT_VERSION:
        raise EngineError(
            f"{path / CONFIG} has format_version {version}, this edgellm reads {FORMAT_VERSION}; "
            "build the engine again with this edgellm, or run the edgellm that built it"
        )
    if not is_sealed(raw):
        raise EngineError(f"{path / CONFIG} is not as `edgellm build` wrote it; build the engine again")
    try:
        config = msgspec.json.decode(raw, type=EngineConfig)
    except msgspec.DecodeError as error:
        raise EngineError(f"{path / CONFIG}: {error}") from error
    for name, record in config.edgellm.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise EngineError(f"{path} has no {name}: {error.strerror}; build the engine again") from error
        if size != record.bytes:
            raise EngineError(
                f"{path / name} has {size} bytes instead of {record.bytes}; build the engine again"
            )
    return EngineDir(path, config)


def is_engine(path: Path) -> bool:
    """Whether `path` is an engine directory, of whatever format version; a checkpoint is none."""
    try:
        raw = (path / CONFIG).read_bytes()
    except OSError:
        return False
    return _format_version(raw) is not None


def verify_engine(
    engine: EngineDir, progress: Progress = lambda _name, _fraction: None, *, loading: bool = False
) -> None:
    """Compare every file with its SHA-256; the interpreter's lock is free most of the time.

    Args:
        loading: an executor loads the engine as well; what it compares while it reads is left to it.

    Raises:
        EngineError: a file is not as it was written; the message names it.
    """
    records = dict(engine.config.edgellm.files)
    if loading:
        records.pop(engine.compared_by_executor or "", None)
    total, done = sum(record.bytes for record in records.values()) or 1, 0
    for name, record in records.items():
        progress(name, done / total)
        if sha256_of(engine.path / name) != record.sha256:
            raise EngineError(
                f"{engine.path / name} is not as it was built: its SHA-256 differs; build the engine again"
            )
        done += record.bytes
    progress("verified", 1.0)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file for people to read, too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error


def _format_version(raw: bytes) -> int | None:
    """The format version in a config.json, or None if it is not one of ours."""
    try:
        version = msgspec.json.decode(raw)["edgellm"]["format_version"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def _is_model_config(raw: bytes) -> bool:
    """Whether a config.json is a model's, as transformers writes them."""
    try:
        return bool(msgspec.json.decode(raw)["architectures"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return False

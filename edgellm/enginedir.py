"""The engine directory: what `edgellm build` writes and everything else opens.

    config.json             TensorRT-LLM's version, pretrained_config and build_config, plus our own section
    model.onnx, …           the network, by executor: for CUDA network.json, weights.safetensors, its pieces'
                            digests weights.sha256, and compiled kernels as kernels/sm_87/….cubin
    tokenizer.json          Hugging Face's tokenizers
    tokenizer_config.json   the special tokens' text, for the chat template
    chat_template.jinja     absent if the checkpoint has none
    generation_config.json  Hugging Face's: bos and eos ids
    quantization.json       what `edgellm build --quant` cost (`quantize/report.py`); absent without

Every file's size and SHA-256 is in config.json, and config.json holds its own: the SHA-256 of its bytes with
the 64 digits of that very field set to 0. A directory without a config.json is no engine; it is written last.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edgellm.engine_config import (
    FORMAT_VERSION,
    UNSEALED,
    BuildConfig,
    Compute,
    EdgellmSection,
    EngineConfig,
    FileRecord,
    PretrainedConfig,
)
from edgellm.engine_draft import new_draft
from edgellm.errors import BuildError, EngineError
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
    "new_engine",
    "open_engine",
    "real_path",
    "seal",
    "sha256_of",
    "verify_engine",
    "write_json",
]

CONFIG: Final = "config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
GENERATION_CONFIG: Final = "generation_config.json"
QUANTIZATION: Final = "quantization.json"

_CHUNK_BYTES: Final = 1 << 20
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_SEAL: Final = re.compile(rb'("config_sha256": ")([0-9a-f]{64})(")')


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
        is_file, is_directory, is_sealed = path.is_file(), path.is_dir(), (path / CONFIG).is_file()
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
    if not is_sealed:
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
    seal = _SEAL.search(raw)
    if seal is None or _seal(raw) != seal[2].decode():
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


@contextmanager
def new_engine(path: Path) -> Iterator[Path]:
    """Make an engine directory: gives a temporary one beside `path`, which becomes `path` at the end.

    Inside, write the files, then call `seal`. If anything is raised, nothing is left behind.

    Raises:
        BuildError: `path` exists and is no engine directory or is not UTF-8, or writing failed (a full disk,
            no permission).
    """
    path = real_path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise BuildError(
            f"{path} is not UTF-8, and no library would load an engine there; name another place with -o"
        ) from error
    made = False
    try:
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_draft(path) as draft:
            made = True
            draft.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the engine from the daemon's user
            yield draft
            if not (draft / CONFIG).exists():
                raise AssertionError("new_engine: seal was not called")
            _sync(draft)
            _move_into_place(draft, path)
    except OSError as error:
        if not made:
            raise BuildError(f"cannot create {path}: {error.strerror} ({error.filename})") from error
        hint = "; free some space and build again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise BuildError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def real_path(path: Path) -> Path:
    """An absolute path without symbolic links; where these go round in circles, with them."""
    return Path(os.path.realpath(path))  # Path.resolve would raise RuntimeError, until Python 3.13


def seal(draft: Path, config: EngineConfig, hashed: Mapping[str, str] = {}) -> EngineConfig:
    """Write config.json with size and SHA-256 of every file in `draft`; gives what was written.

    Args:
        hashed: file name → SHA-256 in hex, of those that need not be read again.
    """
    names = {file.relative_to(draft).as_posix(): file for file in sorted(draft.rglob("*")) if file.is_file()}
    files = {
        name: FileRecord(sha256=hashed.get(name) or sha256_of(file), bytes=file.stat().st_size)
        for name, file in names.items()
        if name != CONFIG
    }
    section = msgspec.structs.replace(config.edgellm, files=files, config_sha256=UNSEALED)
    config = msgspec.structs.replace(config, edgellm=section)
    digest = _seal(_encode(config))
    config = msgspec.structs.replace(config, edgellm=msgspec.structs.replace(section, config_sha256=digest))
    (draft / CONFIG).write_bytes(_encode(config))
    return config


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file for people to read, too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hex; constant memory.

    Raises:
        EngineError: the file cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error


def _encode(config: EngineConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def _seal(raw: bytes) -> str:
    return hashlib.sha256(_SEAL.sub(rb"\g<1>" + UNSEALED.encode() + rb"\g<3>", raw)).hexdigest()


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


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise BuildError(f"{path} exists and is not a directory; name another one with -o")
    config = path / CONFIG
    if any(path.iterdir()) and not (config.is_file() and _format_version(_read(config)) is not None):
        raise BuildError(
            f"{path} exists and is not an engine directory; it is left as it is, name another one"
        )


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    """Bring a directory and its files to the disk, so that after the rename a power cut cannot empty them."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step, renameat2(2) with RENAME_EXCHANGE; in three where it is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if hasattr(libc, "renameat2") and libc.renameat2(*names, _RENAME_EXCHANGE) == 0:
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{other.name}.old-", dir=other.parent))
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _move_into_place(draft: Path, path: Path) -> None:
    """Rename; an engine that is there already changes places with the draft, which is then removed.

    At no moment is there no engine, so a power cut cannot lose both. Files that a running daemon has open
    live on until it closes them.
    """
    if path.exists():
        _exchange(draft, path)
    else:
        draft.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

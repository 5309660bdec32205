"""The seal of an engine: size and SHA-256 of every file, in config.json, and config.json's own.

Its own is the SHA-256 of its bytes with the 64 digits of that very field set to 0.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from edgellm.engine_config import CONFIG, UNSEALED, EngineConfig, FileRecord
from edgellm.errors import EngineError

__all__ = ["is_sealed", "seal", "sha256_of"]

_CHUNK_BYTES: Final = 1 << 20
_OWN: Final = re.compile(rb'("config_sha256": ")([0-9a-f]{64})(")')


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
    digest = _own_digest(_encode(config))
    config = msgspec.structs.replace(config, edgellm=msgspec.structs.replace(section, config_sha256=digest))
    (draft / CONFIG).write_bytes(_encode(config))
    return config


def is_sealed(raw: bytes) -> bool:
    """Whether the bytes of a config.json are as `seal` wrote them."""
    own = _OWN.search(raw)
    return own is not None and _own_digest(raw) == own[2].decode()


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


def _encode(config: EngineConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def _own_digest(raw: bytes) -> str:
    return hashlib.sha256(_OWN.sub(rb"\g<1>" + UNSEALED.encode() + rb"\g<3>", raw)).hexdigest()

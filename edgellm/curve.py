"""CURVE keys for tcp: pairs and their files, as pyzmq and czmq write them (ZPL, rfc.zeromq.org/spec/4).

NAME.key          the public key; goes to whoever talks with NAME
NAME.key_secret   both keys; stays where it is, readable for its owner alone

Keys are 32 bytes, in files as 40 characters of Z85. Needs pyzmq and nothing else.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from edgellm.errors import BadKeys

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"

SECRET_ENVIRONMENT = "EDGELLM_CURVE_SECRET_KEY"
SERVER_ENVIRONMENT = "EDGELLM_CURVE_SERVER_KEY"

MAX_FILE_BYTES = 65_536
KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENTRY = re.compile(r"""^\s*(public|secret)-key\s*=\s*["']?([^"'\n]*?)["']?\s*$""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One party's keys, in Z85."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """What a client needs for tcp. Files are read with each new connection, so keys can be exchanged.

    Attributes:
        secret_key_file: its own NAME.key_secret.
        server_public_key_file: the daemon's NAME.key.
    """

    secret_key_file: str | os.PathLike[str]
    server_public_key_file: str | os.PathLike[str]

    @classmethod
    def from_environment(cls) -> CurveKeys | None:
        """What $EDGELLM_CURVE_SECRET_KEY and $EDGELLM_CURVE_SERVER_KEY name, if both are set."""
        secret, server = os.environ.get(SECRET_ENVIRONMENT), os.environ.get(SERVER_ENVIRONMENT)
        return cls(secret, server) if secret and server else None


def secure_client(socket: Any, endpoint: str, keys: CurveKeys | None) -> None:
    """Prepare a client's socket for `endpoint`, before it connects. Only tcp has keys.

    Raises:
        BadKeys: there are none, or a file is not one of keys.
    """
    if not endpoint.startswith("tcp://"):
        return
    keys = keys or CurveKeys.from_environment()
    if keys is None:
        raise BadKeys(
            f"{endpoint} needs keys: give the client curve=CurveKeys(…), or set {SECRET_ENVIRONMENT} to its"
            f" NAME{SECRET_SUFFIX} and {SERVER_ENVIRONMENT} to the daemon's NAME{PUBLIC_SUFFIX}; `edgellm"
            " keygen` makes them"
        )
    own = read_pair(Path(keys.secret_key_file))
    socket.setsockopt(zmq.CURVE_SERVERKEY, read_public(Path(keys.server_public_key_file)))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)


def write_new_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a pair: its public and its secret file. Neither is ever overwritten.

    Raises:
        BadKeys: the name is none for a file, a file of it exists, or the directory cannot be written to.
    """
    if not _NAME.fullmatch(name):
        raise BadKeys(f"{name!r} is no name for keys: use up to 64 letters, digits, '.', '_' and '-'")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    public_file, secret_file = directory / (name + PUBLIC_SUFFIX), directory / (name + SECRET_SUFFIX)
    for file in (public_file, secret_file):
        if os.path.lexists(file):
            raise BadKeys(f"{file} exists and stays as it is: choose another name or directory")
    entry = f'curve\n    public-key = "{public}"\n'
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write_new(
            secret_file,
            f'# CURVE secret key: for {name} alone.\n{entry}    secret-key = "{secret}"\n',
            0o600,
        )
        _write_new(public_file, f"# CURVE public key of {name}.\n{entry}", 0o644)
    except OSError as error:
        raise BadKeys(f"{error.filename or directory} cannot be written: {error.strerror}") from None
    return public_file, secret_file


def read_public(path: Path) -> bytes:
    """The public key of a file, in Z85.

    Raises:
        BadKeys: it cannot be read, or holds none.
    """
    return _key(path, _read(path)[0], "public")


def read_pair(path: Path) -> KeyPair:
    """Both keys of a NAME.key_secret.

    Raises:
        BadKeys: it cannot be read, others can read it too, or the keys in it are no pair.
    """
    entries, mode = _read(path)
    if mode & 0o077:
        raise BadKeys(f"{path} is a secret that others than its owner may read: chmod 0600 {path}")
    pair = KeyPair(_key(path, entries, "public"), _key(path, entries, "secret"))
    if zmq.curve_public(pair.secret) != pair.public:
        raise BadKeys(f"{path}: the public key does not belong to the secret one: make a new pair")
    return pair


def read_directory(path: Path) -> dict[bytes, str]:
    """The keys of all NAME.key in a directory: raw public key of 32 bytes → NAME.

    Raises:
        BadKeys: it cannot be read, anyone may put keys there, a file is bad, or two files hold the same key.
    """
    try:
        mode = path.stat().st_mode
        files = sorted(each for each in path.iterdir() if each.suffix == PUBLIC_SUFFIX)
    except OSError as error:
        raise BadKeys(f"{path} cannot be read: {error.strerror}") from None
    if mode & 0o002:
        raise BadKeys(f"{path} can be written by anyone, who could let himself in: chmod o-w {path}")
    names: dict[bytes, str] = {}
    for file in files:
        if not _NAME.fullmatch(file.stem):
            raise BadKeys(f"{file}: a key's name has up to 64 letters, digits, '.', '_' and '-'")
        key = z85.decode(read_public(file))
        if key in names:
            raise BadKeys(f"{file} and {names[key]}{PUBLIC_SUFFIX} hold the same key: remove one of them")
        names[key] = file.stem
    return names


def _write_new(path: Path, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        os.fchmod(descriptor, mode)  # whatever the umask
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def _read(path: Path) -> tuple[dict[str, str], int]:
    """A key file's entries, and its mode when it was read."""
    try:
        # Not blocking: a FIFO would keep the daemon from starting.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise BadKeys(f"{path} cannot be read: {error.strerror}") from None
    entries: dict[str, str] = {}
    for kind, value in _ENTRY.findall(data.decode("utf-8", "replace")):
        entries.setdefault(kind, value)
    return entries, mode


def _key(path: Path, entries: dict[str, str], kind: str) -> bytes:
    if kind not in entries:
        wanted = PUBLIC_SUFFIX if kind == "public" else SECRET_SUFFIX
        raise BadKeys(f"{path} holds no {kind} key: name the NAME{wanted} that `edgellm keygen` wrote")
    text = entries[kind]
    try:
        raw = z85.decode(text)
    except (ValueError, KeyError, struct.error):  # length, characters, and more than 32 bits
        raw = b""
    if len(raw) != KEY_BYTES:
        raise BadKeys(f"{path}: its {kind} key is not 40 characters of Z85: copy the file again")
    return text.encode()

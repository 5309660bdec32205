"""Key files: what pyzmq's own reader and writer make of ours and we of theirs, and which are refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import zmq
import zmq.auth
from zmq.utils import z85

from edgellm.cli import main
from edgellm.curve import read_directory, read_pair, read_public, write_new_pair
from edgellm.errors import BadKeys, ConfigError
from edgellm.server import Server
from edgellm.server_config import ServerConfig


def test_pyzmq_reads_what_is_written(tmp_path: Path) -> None:
    public_file, secret_file = write_new_pair(tmp_path, "app")
    pair = read_pair(secret_file)
    assert zmq.auth.load_certificate(public_file) == (pair.public, None)
    assert zmq.auth.load_certificate(secret_file) == (pair.public, pair.secret)
    assert zmq.curve_public(pair.secret) == pair.public
    assert pair.secret not in public_file.read_bytes()


def test_what_pyzmq_writes_is_read(tmp_path: Path) -> None:
    public_file, secret_file = zmq.auth.create_certificates(tmp_path, "app", {"name": "public-key"})
    Path(secret_file).chmod(0o600)
    pair = read_pair(Path(secret_file))
    assert (pair.public, pair.secret) == zmq.auth.load_certificate(secret_file)
    assert read_public(Path(public_file)) == pair.public
    assert read_directory(tmp_path) == {z85.decode(pair.public): "app"}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_secret_is_its_owner_s_alone(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(umask)
    try:
        public_file, secret_file = write_new_pair(tmp_path, "app")
    finally:
        os.umask(before)
    assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(public_file.stat().st_mode) == 0o644


@pytest.mark.parametrize("existing", ["app.key", "app.key_secret"])
@pytest.mark.parametrize("dangling", [False, True])
def test_keygen_never_overwrites(
    tmp_path: Path, existing: str, dangling: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if dangling:
        (tmp_path / existing).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / existing).write_text("precious")
    assert main(["keygen", str(tmp_path), "--name", "app"]) == 64
    assert f"{existing} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert dangling or (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "../app", "a/b", "a b", "-x", "x" * 65, "ä"])
def test_names_that_are_none(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path), f"--name={name}"]) == 64
    assert "letters, digits" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--server"], "server.curve_secret_key"), (["--client"], "server.curve_clients"), ([], 'key = "app"')],
)
def test_keygen_says_what_goes_where(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", str(tmp_path / "deep" / "keys"), "--name", "app", *flags]) == 0
    said = capsys.readouterr().out
    assert words in said
    assert f"{tmp_path}/deep/keys/app.key_secret" in said
    assert read_pair(tmp_path / "deep/keys/app.key_secret").secret.decode() not in said


def test_a_directory_that_cannot_be_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", "/proc/keys", "--name", "app"]) == 64
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    _, secret_file = write_new_pair(tmp_path / "own", "server")
    secret_file.chmod(mode)
    config = ServerConfig(
        endpoint="tcp://127.0.0.1:5570", curve_secret_key=str(secret_file), curve_clients=str(tmp_path)
    )
    with pytest.raises(ConfigError, match=r"server\.curve_secret_key: .*chmod 0600"):
        Server(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no public key"),
        ("public-key", "holds no public key"),
        ('public-key = ""', "40 characters"),
        ('public-key = "short"', "40 characters"),
        ('public-key = "' + "a" * 39 + '"', "40 characters"),
        ('public-key = "' + "#" * 40 + '"', "40 characters"),  # each five are more than 32 bits
        ('public-key = "' + "ä" * 20 + '"', "40 characters"),
        ('public-key = "' + "~" * 40 + '"', "40 characters"),
        ("\0" * 100, "holds no public key"),
    ],
)
def test_files_that_hold_no_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "app.key"
    path.write_text(text)
    for read in (lambda: read_public(path), lambda: read_directory(tmp_path)):
        with pytest.raises(BadKeys, match=words) as raised:
            read()
        assert "app.key" in str(raised.value)


def test_a_pair_that_is_none(tmp_path: Path) -> None:
    public_file, one = write_new_pair(tmp_path, "one")
    _, two = write_new_pair(tmp_path, "two")
    with pytest.raises(BadKeys, match="others than its owner"):
        read_pair(public_file)
    public_file.chmod(0o600)
    with pytest.raises(BadKeys, match=r"no secret key: name the NAME\.key_secret"):
        read_pair(public_file)
    mixed = two.read_text().replace(read_pair(two).public.decode(), read_pair(one).public.decode())
    two.write_text(mixed)
    with pytest.raises(BadKeys, match="does not belong"):
        read_pair(two)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "app.key"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    with pytest.raises(BadKeys, match=r"app\.key"):
        read_public(path)
    with pytest.raises(BadKeys, match=r"app\.key"):
        read_pair(path)


def test_directories_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match="cannot be read"):
        read_directory(tmp_path / "missing")
    public_file, _ = write_new_pair(tmp_path, "one")
    (tmp_path / "README").write_text("not a key")
    assert list(read_directory(tmp_path).values()) == ["one"]  # its secret, too, is no public key's file
    (tmp_path / "two.key").write_bytes(public_file.read_bytes())
    with pytest.raises(BadKeys, match=r"two\.key and one\.key hold the same key"):
        read_directory(tmp_path)
    (tmp_path / "two.key").unlink()
    tmp_path.chmod(0o777)
    with pytest.raises(BadKeys, match="chmod o-w"):
        read_directory(tmp_path)

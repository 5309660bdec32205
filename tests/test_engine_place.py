"""An engine takes its place whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_engines import FILES, names_in, open_and_verify, write_engine

from edgellm.engine_place import new_engine
from edgellm.errors import BuildError


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with new_engine(tmp_path / "engine") as draft:
            (draft / "model.onnx").write_bytes(b"half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(BuildError, match=r"No space left on device; free some space"):
        fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_engine_that_was_there(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine")
    with pytest.raises(ZeroDivisionError), new_engine(tmp_path / "engine"):
        raise ZeroDivisionError
    open_and_verify(tmp_path / "engine")
    assert names_in(tmp_path) == ["engine"]


class _OldLibc:
    """A C library from before renameat2."""


@pytest.mark.parametrize("libc", [None, _OldLibc()])
def test_an_engine_is_replaced_and_one_that_is_open_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: object
) -> None:
    if libc is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_more: libc)
    write_engine(tmp_path / "engine")
    with (tmp_path / "engine" / "model.onnx").open("rb") as still_open:
        write_engine(tmp_path / "engine", {"model.onnx": b"new"})
        assert still_open.read() == FILES["model.onnx"]
    directory = open_and_verify(tmp_path / "engine")
    assert list(directory.config.edgellm.files) == ["model.onnx"]
    assert names_in(tmp_path) == ["engine"]


def test_a_file_system_may_refuse_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def renameat2(self, *_args: object) -> int:
            return -1

    write_engine(tmp_path / "engine")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_more: Refuses())
    write_engine(tmp_path / "engine", {"model.onnx": b"new"})
    assert list(open_and_verify(tmp_path / "engine").config.edgellm.files) == ["model.onnx"]
    assert names_in(tmp_path) == ["engine"]


def test_through_a_symbolic_link_its_target_is_replaced(tmp_path: Path) -> None:
    write_engine(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    write_engine(tmp_path / "current", {"model.onnx": b"new"})
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "model.onnx").read_bytes() == b"new"


def test_what_is_no_engine_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for path in (precious, tmp_path / "file", model):
        with pytest.raises(BuildError, match=str(path)):
            write_engine(path)
    assert (precious / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    write_engine(tmp_path / "empty")
    write_engine(tmp_path / "not" / "yet" / "there")


def test_an_unwritable_place_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"cannot create .*File exists \(.*/file\)"):
        write_engine(tmp_path / "file" / "engine")
    (tmp_path / "circle").symlink_to("circle")
    for place in ("circle", "circle/engine"):
        with pytest.raises(BuildError, match="circle"):
            write_engine(tmp_path / place)
    with pytest.raises(BuildError, match="is not UTF-8"):
        write_engine(tmp_path / os.fsdecode(b"engine\xff"))


def test_an_engine_that_cannot_be_looked_into_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()

    def closed(self: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", closed)  # as root, no mode of the directory would do it
    with pytest.raises(BuildError, match=r"cannot create .*engine: Permission denied"):
        write_engine(tmp_path / "engine")

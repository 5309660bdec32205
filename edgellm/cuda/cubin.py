"""What a compiled kernel takes, read off its cubin: registers, stack, shared memory, and its mangled name.

A cubin is an ELF64 file (machine 190, EM_CUDA). Each kernel has a section `.text.NAME`, its attributes in
`.nv.info.NAME`, its shared memory in `.nv.shared.NAME`; the section `.nv.info` holds what concerns symbols.
Attributes are records: a byte of format, a byte of kind, then a 16-bit value, or a 16-bit length and as many
bytes (format 4). Kinds and formats are those that `cuobjdump -elf` and `nvdisasm` name (EIATTR_…).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

EM_CUDA: Final = 190
SHT_SYMTAB: Final = 2
SIZED: Final = 4
"""EIFMT_SVAL: a 16-bit length, then the value."""

MAX_THREADS: Final = 0x05
FRAME_SIZE: Final = 0x11
MIN_STACK_SIZE: Final = 0x12
REGCOUNT: Final = 0x2F

_TEXT: Final = ".text."


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes.

    Attributes:
        name: mangled, as the module knows it.
        registers: of a thread.
        stack: bytes of local memory of a thread: spilled registers, and arrays that found none.
        shared: bytes of static shared memory of a block.
        code: bytes of instructions.
    """

    name: str
    registers: int
    stack: int
    shared: int
    code: int


class BadCubin(ValueError):
    """The bytes are no cubin, or damaged."""


def read_resources(image: bytes) -> tuple[Resources, ...]:
    """Every kernel in a cubin, by name.

    Raises:
        BadCubin: it is none.
    """
    try:
        return tuple(sorted(_kernels(image), key=lambda each: each.name))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise BadCubin(f"the cubin is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int
    info: int


def _kernels(image: bytes) -> Iterator[Resources]:
    sections = _sections(image)
    symbols = _symbols(image, sections)
    registers: dict[str, int] = {}
    stack: dict[str, int] = {}
    for section in sections:
        if section.name != ".nv.info":
            continue
        for kind, value in _records(image[section.offset : section.offset + section.size]):
            if kind in (FRAME_SIZE, MIN_STACK_SIZE, REGCOUNT) and len(value) >= 8:
                symbol, number = struct.unpack_from("<II", value)
                into = registers if kind == REGCOUNT else stack
                name = symbols[symbol]
                into[name] = max(into.get(name, 0), number)
    shared = {each.name: each.size for each in sections if each.name.startswith(".nv.shared.")}
    for section in sections:
        if not section.name.startswith(_TEXT):
            continue
        name = section.name[len(_TEXT) :]
        # Before CUDA 11 had the record, the count stood in the section header alone (sh_info's upper byte).
        yield Resources(
            name=name,
            registers=registers.get(name, section.info >> 24),
            stack=stack.get(name, 0),
            shared=shared.get(f".nv.shared.{name}", 0),
            code=section.size,
        )


def _sections(image: bytes) -> list[_Section]:
    if image[:4] != b"\x7fELF" or len(image) < 64 or image[4] != 2:
        raise BadCubin("these bytes are no ELF64 file, so no cubin")
    (machine,) = struct.unpack_from("<H", image, 18)
    if machine != EM_CUDA:
        raise BadCubin(f"this ELF file is for machine {machine}, not for CUDA ({EM_CUDA})")
    (table,) = struct.unpack_from("<Q", image, 40)
    entry, count, names_at = struct.unpack_from("<HHH", image, 58)
    raw = []
    for index in range(count):
        name, kind, _, _, offset, size, link, info = struct.unpack_from(
            "<IIQQQQII", image, table + index * entry
        )
        raw.append((name, kind, offset, size, link, info))
    names = raw[names_at][2]
    return [
        _Section(_text(image, names + name), kind, offset, size, link, info)
        for name, kind, offset, size, link, info in raw
    ]


def _symbols(image: bytes, sections: list[_Section]) -> list[str]:
    """Names by index; empty without a symbol table."""
    for table in sections:
        if table.kind == SHT_SYMTAB:
            strings = sections[table.link].offset
            return [
                _text(image, strings + struct.unpack_from("<I", image, at)[0])
                for at in range(table.offset, table.offset + table.size, 24)
            ]
    return []


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        form, kind, value = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == SIZED:
            yield kind, data[at : at + value]
            at += value
        else:
            yield kind, struct.pack("<H", value)


def _text(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()

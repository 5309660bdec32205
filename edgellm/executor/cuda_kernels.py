"""The cubins of an engine: compiled when it is built, for devices named by their compute capability, or here.

An engine's cubin is named after all that went into it but NVRTC's version, so one that another edgellm built
of another source is not found, rather than run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from edgellm.cuda.launch import Device, Kernel
from edgellm.cuda.nvrtc import Compiler, read_program
from edgellm.errors import DeviceError, EngineError

DIRECTORY: Final = "kernels"

KNOWN: Final[dict[int, tuple[int, tuple[int, ...]]]] = {
    80: (163 << 10, (108, 98)),
    86: (99 << 10, (84, 82, 68, 46, 38, 28, 20, 16)),
    87: (163 << 10, (16, 14, 8, 4)),
    89: (99 << 10, (142, 128, 76, 60, 46, 34, 24, 20)),
    90: (227 << 10, (132, 114, 78)),
    100: (227 << 10, (148, 144)),
    120: (99 << 10, (188, 170, 84, 70, 48, 36, 30)),
}
"""Compute capability → shared memory of a block (CUDA C++ programming guide, opted in), multiprocessors of
the devices that have it. 8.7 is Orin: AGX 64 GB and DRIVE, AGX 32 GB, NX and Nano 8 GB, Nano 4 GB."""


def devices_of(sm: int) -> tuple[Device, ...]:
    """The devices that an engine for a compute capability is built for.

    Raises:
        ValueError: none is known.
    """
    if sm not in KNOWN:
        raise ValueError(f"kernels can be built ahead for {', '.join(map(str, KNOWN))}")
    shared, multiprocessors = KNOWN[sm]
    return tuple(Device(sm, count, shared) for count in multiprocessors)


def write_cubins(
    directory: Path, kernels: Iterable[Kernel], sm: int, progress: Callable[[float], None]
) -> None:
    """Compile kernels into an engine directory.

    Raises:
        BuildError: a kernel does not compile.
        DeviceError: NVRTC is not installed.
        OSError: a file cannot be written.
    """
    for kernel, image in Compiler().cubins(kernels, sm, progress).items():
        path = directory / _name(kernel, sm)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def load_cubins(
    directory: Path, kernels: Iterable[Kernel], sm: int, progress: Callable[[float], None]
) -> dict[Kernel, bytes]:
    """The engine's cubins, and others compiled now.

    Raises:
        EngineError: some are missing, and there is no NVRTC.
        BuildError: a kernel does not compile.
    """
    found: dict[Kernel, bytes] = {}
    missing = []
    for kernel in dict.fromkeys(kernels):
        path = directory / _name(kernel, sm)
        if path.is_file():
            found[kernel] = path.read_bytes()
        else:
            missing.append(kernel)
    if missing:
        try:
            compiler = Compiler()
        except DeviceError as error:
            raise EngineError(
                f"{directory} lacks {len(missing)} of the kernels that sm_{sm} needs, and they cannot be "
                f"compiled here: {error}. Or build the engine again with this edgellm: "
                f"edgellm build --executor cuda --sm {sm}"
            ) from error
        found |= compiler.cubins(missing, sm, progress)
    return found


def _name(kernel: Kernel, sm: int) -> str:
    return f"{DIRECTORY}/sm_{sm}/{read_program(kernel, sm).key((0, 0))}.cubin"

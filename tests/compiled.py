"""Kernels compiled for the tests, with what each takes: no GPU needed, kept for the whole run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from edgellm.cuda.cubin import Resources, read_resources
from edgellm.cuda.launch import Device, Kernel, Launch
from edgellm.cuda.nvrtc import Compiler

DEVICES = {
    "a100": Device(80, 108, 163 << 10),
    "rtx3090": Device(86, 82, 99 << 10),
    "agx orin": Device(87, 16, 163 << 10),
    "orin, 14 SMs": Device(87, 14, 163 << 10),
    "orin nx": Device(87, 8, 163 << 10),
    "orin nano": Device(87, 4, 163 << 10),
    "h100": Device(90, 132, 227 << 10),
}
"""Devices that launches are made for, by name; shared memory as the CUDA C++ programming guide has it."""

REGISTERS_PER_SM = 65_536


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel and what it takes."""

    kernel: Kernel
    resources: Resources


@cache
def _compiler() -> Compiler:
    return Compiler()


def compile_for(kernels: Iterable[Kernel], sm: int) -> list[Compiled]:
    """Compile kernels; raises BuildError with NVRTC's words."""
    cubins = _compiler().cubins(kernels, sm)
    return [Compiled(kernel, *read_resources(cubin)) for kernel, cubin in cubins.items()]


def kernels_of(launches: Iterable[Launch]) -> list[Kernel]:
    """The kernels of launches, each once."""
    return list(dict.fromkeys(launch.kernel for launch in launches))


def assert_fits(compiled: Iterable[Compiled], device: Device) -> None:
    """That nothing spills and a block of every kernel fits the device."""
    for each in compiled:
        kernel, took = each.kernel, each.resources
        assert took.stack == 0, f"{kernel.expression} for sm_{device.sm}: {took.stack} bytes spilled"
        assert kernel.threads % 32 == 0 and kernel.threads <= 1024, kernel
        # Registers are handed out to warps in units of 256.
        warps = kernel.threads // 32
        assert warps * -(-took.registers * 32 // 256) * 256 <= REGISTERS_PER_SM, (kernel, took.registers)
        assert kernel.shared + took.shared <= device.shared_per_block + 1024 * (device.sm >= 90), kernel

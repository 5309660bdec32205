"""Power mode and clocks: what nvpmodel allows, and what the GPU runs at."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host

STATUS = "var/lib/nvpmodel/status"
MODES = "etc/nvpmodel.conf"

_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
_CEILING = re.compile(r"^(GPU|EMC)\s+MAX_FREQ\s+(-?\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PowerMode:
    """A mode of nvpmodel.conf: ceilings in Hz, infinite where it sets none (0 or −1)."""

    number: int
    name: str
    gpu: float
    emc: float


def check_power(host: Host) -> Iterator[Finding]:
    """The power mode, and the GPU's clock."""
    if not host.running:
        yield Finding.not_asked("power mode")
        return
    status, modes = host.text(STATUS), power_modes(host.text(MODES) or "")
    if status is not None or modes:
        yield _mode(status or "", modes)
    elif host.board.l4t:
        yield Finding(
            "power mode",
            Level.WARN,
            "unknown",
            f"/{STATUS} cannot be read, so the ceilings of the clocks are not known",
            "sudo nvpmodel -q shows the mode",
        )
    yield from _clock(host)


def power_modes(text: str) -> list[PowerMode]:
    """The modes of an nvpmodel.conf, with their GPU and memory (EMC) ceilings."""
    parts = _MODE.split(text)[1:]
    modes = []
    for number, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        ceilings = {what: float(hertz) for what, hertz in _CEILING.findall(body)}
        gpu, emc = (value if (value := ceilings.get(what, 0.0)) > 0 else math.inf for what in ("GPU", "EMC"))
        modes.append(PowerMode(int(number), name, gpu, emc))
    return modes


def _mode(status: str, modes: list[PowerMode]) -> Finding:
    found = re.search(r"pmode:(\d+)", status)
    if found is None:
        return Finding(
            "power mode",
            Level.WARN,
            f"unknown ({status or 'no status'})",
            "the clocks may be held down",
            "sudo nvpmodel -q shows the mode, sudo nvpmodel -m N sets it",
        )
    number = int(found[1])
    mode = next((mode for mode in modes if mode.number == number), None)
    if mode is None:
        return Finding(
            "power mode", Level.OK, f"mode {number}", "/etc/nvpmodel.conf does not say what it allows"
        )
    best = max(modes, key=lambda other: (other.emc, other.gpu))
    if mode.emc < best.emc:
        return Finding(
            "power mode",
            Level.WARN,
            f"{mode.name} (mode {number}): memory clock at most {mode.emc / 1e6:.0f} MHz",
            "decoding is bound by memory bandwidth: tokens come as much slower as the memory",
            f"sudo nvpmodel -m {best.number} ({best.name}), if cooling and supply allow",
        )
    ceiling = f"GPU at most {mode.gpu / 1e6:.0f} MHz" if math.isfinite(mode.gpu) else "GPU without a ceiling"
    return Finding("power mode", Level.OK, f"{mode.name} (mode {number}): {ceiling}")


def _clock(host: Host) -> Iterator[Finding]:
    gpu = host.readings.gpu
    if not host.sensors_answered:
        return
    if gpu is None:
        if host.tegra:
            yield Finding(
                "GPU clock",
                Level.WARN,
                "not found",
                "no GPU below /sys/class/devfreq: the governor cannot see it being throttled",
                "load the GPU's driver (nvgpu), or show the host's /sys to this container",
            )
        return
    if gpu.hertz is None:
        yield Finding(
            "GPU clock",
            Level.WARN,
            "unreadable",
            "the governor cannot see the GPU being throttled",
            "see dmesg for nvgpu",
        )
        return
    held = (
        ", held there (jetson_clocks)" if gpu.min_hertz is not None and gpu.min_hertz == gpu.max_hertz else ""
    )
    most = f" of {gpu.max_hertz / 1e6:.0f}" if gpu.max_hertz else ""
    yield Finding("GPU clock", Level.OK, f"{gpu.hertz / 1e6:.0f}{most} MHz now{held}")

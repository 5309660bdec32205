"""Which board this is, what software it carries, and what it can be expected to have.

Everything is read below one root, so that tests can lay out a board as files. Nothing here raises: a file
that is missing or unreadable says nothing, and a board that says nothing is a generic host.

Sources: the device tree's `model` and `compatible` (NUL-separated strings); `/etc/nv_tegra_release` of Jetson
Linux, whose first line is `# R36 (release), REVISION: 4.7, GCID: …, BOARD: generic, …`; DRIVE OS's
`/etc/nvidia/version-ubuntu-rootfs.txt`, such as `6.0.8.1-34171226`. Module part numbers (p3701-0005 …) are
those of NVIDIA's public device trees.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path

ORIN_PASSIVE_C = 99.0
"""Where Orin's firmware and kernel begin to throttle (Jetson Linux r35 to r39), if a zone does not say."""

ORIN_CRITICAL_C = 104.5
"""Where Orin shuts down, if a zone does not say."""


class Family(enum.Enum):
    """What configuration fits: the value is the stem of the file in configs/."""

    AGX_ORIN = "jetson-agx-orin"
    ORIN_NX = "jetson-orin-nx"
    ORIN_NANO = "jetson-orin-nano"
    DRIVE_AGX_ORIN = "drive-agx-orin"
    OTHER_TEGRA = "other-tegra"
    GENERIC = "generic"


@dataclass(frozen=True, slots=True)
class Expectations:
    """What a board should have; the policy fails closed where it is missing.

    Attributes:
        thermal: whether at least one thermal zone must be readable.
        required: sensors that must be readable, see `Readings.known`; a configured list replaces this.
        passive_c, critical_c: trips of a zone that names none, °C; None: such a zone does not govern.
    """

    thermal: bool = False
    required: tuple[str, ...] = ()
    passive_c: float | None = None
    critical_c: float | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """A board and its software.

    Attributes:
        name: for a person, such as `Jetson AGX Orin 64GB`.
        family: which of the shipped configurations fits.
        model: the device tree's `model`, or "".
        compatible: the device tree's `compatible`.
        l4t: Jetson Linux release such as `36.4.7`, or None.
        jetpack: the JetPack that carries it, such as `6.2.1`, as exactly as the release tells; or None.
        drive_os: DRIVE OS release such as `6.0.8.1`, or None.
        expects: see Expectations.
    """

    name: str
    family: Family
    model: str = ""
    compatible: tuple[str, ...] = ()
    l4t: str | None = None
    jetpack: str | None = None
    drive_os: str | None = None
    expects: Expectations = Expectations()

    @property
    def software(self) -> str:
        """The board software for a person: `JetPack 6.2 (L4T 36.4.3)`, `DRIVE OS 6.0.8.1`, or `unknown`."""
        if self.drive_os:
            return f"DRIVE OS {self.drive_os}"
        if self.l4t:
            return f"JetPack {self.jetpack} (L4T {self.l4t})" if self.jetpack else f"L4T {self.l4t}"
        return "unknown"

    @property
    def nvmap_refuses_free_memory(self) -> bool:
        """Whether this release's nvmap fails allocations with error 12 although memory is free.

        A guard that came with r35.6.3, r36.4.7 and r38.2.2; mended in r35.6.4 and r36.5.
        """
        if self.l4t is None:
            return False
        version = _numbers(self.l4t)
        return version in {(35, 6, 3), (36, 4, 7)} or (38, 2, 2) <= version < (39,)


_ORIN = Expectations(thermal=True, required=("tj",), passive_c=ORIN_PASSIVE_C, critical_c=ORIN_CRITICAL_C)
# DRIVE OS: zone names may differ from Jetson's, and nothing below the operating system is sure to throttle.
_DRIVE = Expectations(thermal=True, passive_c=ORIN_PASSIVE_C, critical_c=ORIN_CRITICAL_C)
_TEGRA = Expectations(thermal=True)

_MODULES: dict[str, tuple[str, Family]] = {
    "p3701-0000": ("Jetson AGX Orin 32GB (developer kit)", Family.AGX_ORIN),
    "p3701-0002": ("Jetson AGX Orin 32GB (developer kit)", Family.AGX_ORIN),
    "p3701-0004": ("Jetson AGX Orin 32GB", Family.AGX_ORIN),
    "p3701-0005": ("Jetson AGX Orin 64GB", Family.AGX_ORIN),
    "p3701-0008": ("Jetson AGX Orin Industrial", Family.AGX_ORIN),
    "p3767-0000": ("Jetson Orin NX 16GB", Family.ORIN_NX),
    "p3767-0001": ("Jetson Orin NX 8GB", Family.ORIN_NX),
    "p3767-0003": ("Jetson Orin Nano 8GB", Family.ORIN_NANO),
    "p3767-0004": ("Jetson Orin Nano 4GB", Family.ORIN_NANO),
    "p3767-0005": ("Jetson Orin Nano 8GB (developer kit)", Family.ORIN_NANO),
}

_MODELS: tuple[tuple[str, str, Family], ...] = (
    ("agx orin", "Jetson AGX Orin", Family.AGX_ORIN),
    ("orin nx", "Jetson Orin NX", Family.ORIN_NX),
    ("orin nano", "Jetson Orin Nano", Family.ORIN_NANO),
)

_JETPACKS: dict[tuple[int, ...], str] = {
    (35, 1): "5.0.2",
    (35, 2): "5.1",
    (35, 3): "5.1.1",
    (35, 4): "5.1.2",
    (35, 5): "5.1.3",
    (35, 6, 0): "5.1.4",
    (35, 6, 1): "5.1.5",
    (35,): "5",
    (36, 2): "6.0 DP",
    (36, 3): "6.0",
    (36, 4, 0): "6.1",
    (36, 4, 3): "6.2",
    (36, 4, 4): "6.2.1",
    (36, 4, 7): "6.2.1",
    (36,): "6",
    (38, 2): "7.0",
    (38, 4): "7.1",
    (38,): "7",
    (39,): "7.2",
}
"""L4T release, as many numbers of it as tell → JetPack; the longest that fits counts."""

_L4T_LINE = re.compile(
    r"^#\s*R(?P<major>\d+)\s*\(release\),\s*REVISION:\s*(?P<rest>\d+(?:\.\d+)*)", re.MULTILINE
)
_DRIVE_VERSION = re.compile(r"\b(\d+\.\d+(?:\.\d+)*)\b")
_DRIVE_FILES = ("etc/nvidia/version-ubuntu-rootfs.txt", "etc/nvidia/version-driveos.txt")


def read_text(path: Path, limit: int = 65536) -> str | None:
    """A small text file's content, or None if it cannot be read. Undecodable bytes are replaced."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return None


def identify_board(root: Path = Path("/")) -> Board:
    """Name the board whose /proc and /etc lie under `root`."""
    model = (read_text(root / "proc/device-tree/model") or "").strip("\0\n ")
    compatible = tuple(filter(None, (read_text(root / "proc/device-tree/compatible") or "").split("\0")))
    l4t = _l4t(root)
    drive_os = _drive_os(root)
    name, family = _name(root, model, compatible, l4t, drive_os)
    return Board(
        name=name,
        family=family,
        model=model,
        compatible=compatible,
        l4t=l4t,
        jetpack=_jetpack(l4t) if l4t else None,
        drive_os=drive_os,
        expects=_expectations(family),
    )


def _name(
    root: Path, model: str, compatible: tuple[str, ...], l4t: str | None, drive_os: str | None
) -> tuple[str, Family]:
    """Most certain first: DRIVE OS, the module's part number, the model's words, any Tegra, anything else."""
    tegra234 = "nvidia,tegra234" in compatible
    if drive_os or "drive" in model.lower() or any("p3710" in entry for entry in compatible):
        if tegra234 or "orin" in model.lower():
            return "DRIVE AGX Orin", Family.DRIVE_AGX_ORIN
        return model or "an NVIDIA DRIVE board", Family.OTHER_TEGRA
    for entry in compatible:
        for part, (name, family) in _MODULES.items():
            # "nvidia,p3737-0000+p3701-0005": carrier + module; the Super and camera variants append more.
            if part in entry:
                return _with_super(name, model), family
    for words, name, family in _MODELS:
        if words in model.lower():
            return _with_super(_with_memory(name, root, family), model), family
    if l4t or any(entry.startswith("nvidia,tegra") for entry in compatible):
        return model or "an NVIDIA Tegra board", Family.OTHER_TEGRA
    return model or _dmi_name(root) or "generic host", Family.GENERIC


def _with_super(name: str, model: str) -> str:
    return f"{name} Super" if "super" in model.lower() else name


def _with_memory(name: str, root: Path, family: Family) -> str:
    """Tell the modules of a family apart by MemTotal, which is the size less what firmware keeps."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", read_text(root / "proc/meminfo") or "", re.MULTILINE)
    if found is None:
        return name
    gib = int(found[1]) / (1 << 20)
    sizes = {Family.AGX_ORIN: (32, 64), Family.ORIN_NX: (8, 16), Family.ORIN_NANO: (4, 8)}[family]
    size = sizes[0] if gib <= sizes[0] else sizes[1]
    return f"{name} {size}GB"


def _dmi_name(root: Path) -> str | None:
    vendor, product = (
        (read_text(root / "sys/class/dmi/id" / entry) or "").strip()
        for entry in ("sys_vendor", "product_name")
    )
    return f"{vendor} {product}".strip() or None


def _expectations(family: Family) -> Expectations:
    if family in {Family.AGX_ORIN, Family.ORIN_NX, Family.ORIN_NANO}:
        return _ORIN
    if family is Family.DRIVE_AGX_ORIN:
        return _DRIVE
    return _TEGRA if family is Family.OTHER_TEGRA else Expectations()


def _l4t(root: Path) -> str | None:
    found = _L4T_LINE.search(read_text(root / "etc/nv_tegra_release") or "")
    return f"{found['major']}.{found['rest']}" if found else None


def _drive_os(root: Path) -> str | None:
    for file in _DRIVE_FILES:
        found = _DRIVE_VERSION.search(read_text(root / file) or "")
        if found:
            return found[1]
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _jetpack(l4t: str) -> str | None:
    version = (*_numbers(l4t), 0)
    for length in (3, 2, 1):
        if version[:length] in _JETPACKS:
            return _JETPACKS[version[:length]]
    return None

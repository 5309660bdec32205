"""What TensorRT says while it builds: warnings to pass on, memory to compare, and the layers it fused.

The verbose log is the only place where a machine without a GPU sees what became of the network: a plan can be
deserialized on a device alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

_WEIGHTS: Final = re.compile(r"Total Weights Memory: (\d+) bytes")
_ACTIVATIONS: Final = re.compile(r"Total Activation Memory: (\d+) bytes")
_LAYER: Final = re.compile(r"^Name: (?P<name>[^,]+), LayerType: (?P<type>\w+), (?P<tensors>.*)$")
_SECTION: Final = re.compile(r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName):)")
_TENSOR: Final = re.compile(r"Name: ([^,]+), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor of a fused layer, with TensorRT's name for its type; −1 stands for what a profile bounds."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A kernel of the plan: one of TensorRT's layers, or several that it made one."""

    name: str
    type: str
    inputs: tuple[FusedTensor, ...]
    constants: tuple[FusedTensor, ...]
    outputs: tuple[FusedTensor, ...]


@dataclass(slots=True)
class BuildLog:
    """The log of one build.

    Attributes:
        errors, warnings: messages of these severities, in order, each once.
        lines: all lines, the verbose ones too.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, severity: str, message: str) -> None:
        """Take a message in."""
        kept = {"INTERNAL_ERROR": self.errors, "ERROR": self.errors, "WARNING": self.warnings}.get(severity)
        if kept is not None and message not in kept:
            kept.append(message)
        self.lines.extend(message.splitlines())

    @property
    def weight_bytes(self) -> int | None:
        """What the plan's weights take on the device, or None if the log does not say."""
        found = self._numbers(_WEIGHTS)
        return found[-1] if found else None

    @property
    def activation_bytes(self) -> list[int]:
        """What activations take, profile by profile."""
        return self._numbers(_ACTIVATIONS)

    def layers(self) -> list[FusedLayer]:
        """The plan's kernels of all profiles, in order; needs the profiling verbosity DETAILED."""
        found = []
        for line in self.lines:
            match = _LAYER.match(line)
            if match is None:
                continue
            parts = dict(_SECTION.findall(match["tensors"] + ", TacticName:"))
            found.append(
                FusedLayer(
                    match["name"],
                    match["type"],
                    *(_tensors(parts.get(part, "")) for part in ("Inputs", "Constants", "Outputs")),
                )
            )
        return found

    def _numbers(self, pattern: re.Pattern[str]) -> list[int]:
        return [int(match[1]) for line in self.lines if (match := pattern.search(line))]


def constants_by_type(layers: list[FusedLayer]) -> Counter[str]:
    """Elements of all constants by type, those that several layers read counted once."""
    seen = {tensor for layer in layers for tensor in layer.constants}
    elements: Counter[str] = Counter()
    for tensor in seen:
        size = 1
        for dimension in tensor.shape:
            size *= dimension
        elements[tensor.dtype] += size
    return elements


class Log(Protocol):
    """What takes messages in."""

    def add(self, severity: str, message: str) -> None:
        """Take a message in; `severity` is TensorRT's name for it."""
        ...


def make_logger(trt: Any, log: Log) -> Any:
    """An ILogger of the library that writes into `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()


def _tensors(text: str) -> tuple[FusedTensor, ...]:
    return tuple(
        FusedTensor(name, tuple(int(size) for size in shape.split(",") if size), dtype)
        for name, shape, dtype in _TENSOR.findall(text)
    )

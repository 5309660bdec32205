"""Measured figures by name, kept in a file as they come, and what they are to reach.

A figure's name is its model's, then what was measured: `qwen3-8b decode 8`. Files are lines of JSON, so a
program that is cut off leaves all that it had, and programs can add to the same file one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class Figures:
    """Adds figures to a file.

    Args:
        path: made when the first one comes; None: nothing is kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def add(self, name: str, value: float) -> None:
        """Keep a figure."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"figure": name, "value": value}) + "\n")


def read_figures(path: Path) -> dict[str, float]:
    """Of a file, the last of each name; none where there is no file. A line that was cut off is left out."""
    found: dict[str, float] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["figure"]] = entry["value"]
    return found


@dataclass(frozen=True, slots=True)
class Gate:
    """What a figure is to reach.

    Attributes:
        figure: its name.
        bound: the least that is good enough; with `most`, the largest.
        goal: what is aimed at beyond that.
        unit: of all of them.
        most: whether less is better.
    """

    figure: str
    bound: float | None
    goal: float | None = None
    unit: str = "tok/s"
    most: bool = False

    def verdict(self, value: float | None) -> str:
        """In a word or two: what a measured value is worth; None was not measured."""
        if value is None:
            return "not measured"
        if self.bound is not None and not self._reaches(value, self.bound):
            return "MISSED"
        if self.goal is None:
            return "met"
        return "goal" if self._reaches(value, self.goal) else "below the goal"

    def _reaches(self, value: float, bound: float) -> bool:
        return value <= bound if self.most else value >= bound


H100: Final = (
    Gate("qwen3-8b decode 1", 561, 620),
    Gate("qwen3-8b decode 8", 3700, 3900),
    Gate("qwen3-8b decode 16", 5300, 6000),
    Gate("qwen3-8b prefill 512", 16_000, 20_000),
    Gate("qwen3-8b prefill 4 × 2048", None, 25_000),
    Gate("qwen3-8b decode 1 without dependent launches", 472),
    Gate("qwen3-8b share of the bare executor through the socket 8", 0.95, unit=""),
    Gate("smollm2-135m decode 1", 2500),
    Gate("bytes taken after READY", 0, unit="B", most=True),
    Gate("real model mean KL", 0.001, unit="nats", most=True),
    Gate("Orin's shape linear least × its memory", 1.5, unit="×"),
    Gate("Orin's shape attention least × its memory", 1.5, unit="×"),
    Gate("Orin's shape attention int8 least × its memory", 1.5, unit="×"),
)
"""On one NVIDIA H100, int4 in groups of 128, decode of 128 tokens behind 512. Other devices have no bounds of
their own: the table shows how far they are from these."""


def gates_table(figures: Mapping[str, float], gates: Iterable[Gate] = H100) -> str:
    """Markdown: each bound and goal beside what was measured."""
    lines = ["| figure | measured | at least | goal | |", "| --- | ---: | ---: | ---: | --- |"]
    for gate in gates:
        value = figures.get(gate.figure)
        bound, goal = (
            "" if each is None else f"{'≤ ' * gate.most}{_number(each)}" for each in (gate.bound, gate.goal)
        )
        shown = "–" if value is None else f"{_number(value)} {gate.unit}".rstrip()
        lines.append(f"| {gate.figure} | {shown} | {bound} | {goal} | {gate.verdict(value)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"

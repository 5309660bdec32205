"""What compute-sanitizer says comes to: silence of a program that failed or was cut off proves nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import sanitizer
from limited import Outcome, Say
from sanitized import GROUPS
from sanitizer import FOUND, TOOLS, check_sanitizer, read_outcome

# As compute-sanitizer 2025 writes.
CLEAN_MEMCHECK = ["========= COMPUTE-SANITIZER", "ran: add<4>", "========= ERROR SUMMARY: 0 errors"]
CLEAN_RACECHECK = [
    "========= COMPUTE-SANITIZER",
    "ran: add<4>",
    "ran: sum",
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
]
HAZARD = "========= Error: Race reported between Write access at sum()+0x80 and Read access at sum()+0xf0"
RACES = ["========= COMPUTE-SANITIZER", HAZARD, "=========     [1024 hazards]"]
RACES_SUMMED = [*RACES, "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"]
INVALID = [
    "========= COMPUTE-SANITIZER",
    "========= Invalid __global__ read of size 4 bytes",
    "=========     at void sum()+0x90",
    "========= ERROR SUMMARY: 1 error",
]


@pytest.mark.parametrize(
    ("code", "lines", "verdict", "found", "kernels"),
    [
        (0, CLEAN_MEMCHECK, "clean", 0, ["add<4>"]),
        (0, CLEAN_RACECHECK, "clean", 0, ["add<4>", "sum"]),
        (FOUND, RACES_SUMMED, "findings", 2, []),
        (0, RACES_SUMMED, "findings", 2, []),
        (FOUND, INVALID, "findings", 1, []),
        (None, CLEAN_RACECHECK[:3], "ran out of time", 0, ["add<4>", "sum"]),
        (None, RACES, "findings", 1, []),
        (1, [*CLEAN_RACECHECK, "wrong: add"], "failed", 0, ["add<4>", "sum"]),
        (0, ["Unable to find injection library"], "failed", 0, []),
    ],
)
def test_verdicts(code: int | None, lines: list[str], verdict: str, found: int, kernels: list[str]) -> None:
    finding = read_outcome(Outcome(code, lines, 1.0))
    assert (finding.verdict, finding.found, finding.kernels) == (verdict, found, kernels)


def check(
    monkeypatch: pytest.MonkeyPatch, outcomes: dict[tuple[str, str], Outcome]
) -> tuple[bool, list[str], list[list[str]]]:
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "compute-sanitizer")
    said: list[str] = []
    commands = []

    def run(command: Sequence[str], *, limit_s: float, say: Say = said.append) -> Outcome:
        assert limit_s == 7
        commands.append(list(command))
        return outcomes.get((command[2], command[7]), Outcome(0, CLEAN_RACECHECK, 1.0))

    good = check_sanitizer(said.append, seed=5, groups=("linear", "moe"), limit_s=7, run=run)
    return good, "\n".join(said).splitlines(), commands


def test_every_group_has_a_verdict_under_every_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    good, said, commands = check(monkeypatch, {})
    assert good
    assert [(command[2], command[7]) for command in commands] == [
        (tool, group) for tool in TOOLS for group in ("linear", "moe")
    ]
    assert sum("| clean | 0 | 2 |" in line for line in said) == 4
    assert "- moe, racecheck: `add<4>`, `sum`" in said


@pytest.mark.parametrize(
    ("outcome", "verdict", "shown"),
    [
        (Outcome(FOUND, RACES_SUMMED, 1.0), "findings", HAZARD),
        (Outcome(None, CLEAN_RACECHECK[:2], 7.0), "ran out of time", "- moe, racecheck: `add<4>`"),
        (Outcome(1, ["Traceback", "CudaError"], 1.0), "failed", "CudaError"),
    ],
)
def test_one_that_is_not_clean_is_shown_and_the_others_are_run(
    outcome: Outcome, verdict: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, said, commands = check(monkeypatch, {("racecheck", "moe"): outcome})
    assert not good
    assert len(commands) == 4
    assert any(f"| racecheck | moe | {verdict} |" in line for line in said)
    assert shown in said


def test_without_the_tool_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    said: list[str] = []
    assert check_sanitizer(said.append, seed=5, limit_s=7)
    assert said == ["- compute-sanitizer is not installed: not run"]


def test_groups_cover_every_source_of_kernels() -> None:
    sources = {path.stem for path in (Path(__file__).parents[2] / "edgellm" / "kernels").glob("*.cu")}
    # The small kernels of two files are one group, and so are those of mixtures.
    assert sources - {"feed", "experts", "held_experts"} == set(GROUPS) - {"steps"}

"""compute-sanitizer over the kernels, group by group, each with a time limit: every group gets a verdict."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from limited import Outcome, Say, run_limited
from sanitized import GROUPS, RAN

TOOLS: Final = ("memcheck", "racecheck")
FOUND: Final = 9
"""Exit code for findings."""
USUAL_PLACE: Final = Path("/usr/local/cuda/bin/compute-sanitizer")

Verdict = Literal["clean", "findings", "ran out of time", "failed"]

_SUMMARY: Final = re.compile(
    r"ERROR SUMMARY: (?P<errors>\d+) error|RACECHECK SUMMARY: (?P<hazards>\d+) hazard"
)
_FINDING: Final = re.compile(r"^=+ (Error|Warning): |^=+ Invalid |^=+ .*\bhazard\b.* detected", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a tool says of a group.

    Attributes:
        verdict: `failed`: the program under the tool did, so that its silence proves nothing.
        found: errors, or hazards; of a run that was cut off, those seen so far.
        kernels: that had run.
        seconds: that it took.
        said: the tool's own lines; where the program failed, the last lines of both.
    """

    verdict: Verdict
    found: int
    kernels: list[str]
    seconds: float
    said: list[str]


def read_outcome(outcome: Outcome) -> Finding:
    """What a tool's run comes to."""
    said = [line for line in outcome.lines if line.startswith("=====")]
    summaries = [match for line in said if (match := _SUMMARY.search(line))]
    counted = sum(int(match["errors"] or match["hazards"]) for match in summaries)
    found = counted or sum(bool(_FINDING.search(line)) for line in said)
    verdict: Verdict
    if found or outcome.code == FOUND:
        verdict = "findings"
    elif outcome.code is None:
        verdict = "ran out of time"
    elif outcome.code == 0 and summaries:
        verdict = "clean"
    else:
        verdict = "failed"
    kernels = [line.removeprefix(RAN) for line in outcome.lines if line.startswith(RAN)]
    return Finding(
        verdict, found, kernels, outcome.seconds, outcome.lines[-40:] if verdict == "failed" else said
    )


def check_sanitizer(
    say: Say,
    *,
    seed: int,
    groups: Sequence[str] = tuple(GROUPS),
    tools: Sequence[str] = TOOLS,
    limit_s: float,
    run: Callable[..., Outcome] = run_limited,
) -> bool:
    """Every tool over every group; whether all are clean. True, and said, where there is no sanitizer.

    Args:
        limit_s: of each.
        run: runs a command with a limit.
    """
    sanitizer = find_sanitizer()
    if sanitizer is None:
        say("- compute-sanitizer is not installed: not run")
        return True
    say(f"At most {limit_s:.0f} s for each.\n\n| tool | kernels of | verdict | found | kernels | s |")
    say("| --- | --- | --- | ---: | ---: | ---: |")
    findings: list[tuple[str, str, Finding]] = []
    for tool in tools:
        for group in groups:
            program = [sys.executable, str(Path(__file__).with_name("sanitized.py")), group]
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *program]
            finding = read_outcome(run([*command, "--seed", str(seed)], limit_s=limit_s))
            findings.append((tool, group, finding))
            say(
                f"| {tool} | {group} | {finding.verdict} | {finding.found} | {len(finding.kernels)} | "
                f"{finding.seconds:.0f} |"
            )
    for tool, group, finding in findings:
        if finding.verdict in ("findings", "failed"):
            said = "\n".join(finding.said[:60])
            say(f"\n{tool} of {group}:\n\n```\n{said}\n```")
    say("\nKernels that ran under a tool, by group:\n")
    for group in groups:
        for tool in tools:
            names = next(each.kernels for one, other, each in findings if (one, other) == (tool, group))
            say(f"- {group}, {tool}: {', '.join(f'`{name}`' for name in names) or 'none'}")
    return all(finding.verdict == "clean" for _, _, finding in findings)


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    found = shutil.which("compute-sanitizer")
    return found or (str(USUAL_PLACE) if USUAL_PLACE.exists() else None)

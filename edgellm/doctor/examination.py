"""All checks in the order of the report, and its two forms."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator

from edgellm.doctor.board import check_board
from edgellm.doctor.configuration import check_configuration
from edgellm.doctor.devices import check_devices
from edgellm.doctor.executors import check_executors
from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host
from edgellm.doctor.memory import check_memory
from edgellm.doctor.power import check_power
from edgellm.doctor.service import check_service
from edgellm.doctor.thermal import check_thermal

log = logging.getLogger(__name__)

CHECKS: tuple[Callable[[Host], Iterable[Finding]], ...] = (
    check_board,
    check_executors,
    check_power,
    check_thermal,
    check_memory,
    check_devices,
    check_configuration,
    check_service,
)


def examine(host: Host) -> list[Finding]:
    """Every finding. A check that itself breaks is a finding, not the end of the others."""
    return [finding for check in CHECKS for finding in _guarded(check, host)]


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the worst finding: the exit code of `edgellm doctor`."""
    return max((finding.level for finding in findings), default=Level.OK)


def as_text(findings: Iterable[Finding]) -> str:
    """One line each: level, noun, what was found — what it means → what to do."""
    lines = []
    for finding in findings:
        meaning = f" — {finding.meaning}" if finding.meaning else ""
        remedy = f" → {finding.remedy}" if finding.remedy else ""
        lines.append(f"{finding.level.name.lower():4}  {finding.check:17} {finding.value}{meaning}{remedy}")
    return "\n".join(lines)


def as_json(findings: Iterable[Finding]) -> str:
    """`{"worst": …, "findings": [{"check", "level", "value", "meaning", "remedy"}, …]}`, levels as words."""
    findings = list(findings)
    rows = [
        {
            "check": finding.check,
            "level": finding.level.name.lower(),
            "value": finding.value,
            "meaning": finding.meaning,
            "remedy": finding.remedy,
        }
        for finding in findings
    ]
    return json.dumps({"worst": worst(findings).name.lower(), "findings": rows}, ensure_ascii=False, indent=2)


def _guarded(check: Callable[[Host], Iterable[Finding]], host: Host) -> Iterator[Finding]:
    try:
        yield from check(host)
    except Exception as error:
        log.debug("%s", check.__name__, exc_info=True)
        name = check.__name__.removeprefix("check_")
        yield Finding(
            name,
            Level.WARN,
            f"could not be examined: {type(error).__name__}: {error}",
            "the machine says something that edgellm does not expect",
            "report it, with the output of edgellm doctor --json",
        )

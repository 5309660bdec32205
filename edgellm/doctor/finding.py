"""One line of the doctor's report."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.IntEnum):
    """How bad a finding is; the worst one is the exit code of `edgellm doctor`."""

    OK = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at and what it says.

    Attributes:
        check: the noun, such as `thermal`.
        level: OK: nothing to do. WARN: it runs, but slower or with less than it could. FAIL: it cannot serve.
        value: what was found.
        meaning: what that means for edgellm, or "".
        remedy: what to do; set where the level is not OK.
    """

    check: str
    level: Level
    value: str
    meaning: str = ""
    remedy: str = ""

    @classmethod
    def not_asked(cls, check: str, why: str = "only a running system can say") -> Finding:
        """What another system's files do not tell."""
        return cls(check, Level.OK, "not asked", why)

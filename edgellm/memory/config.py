"""The [memory] section of the configuration."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from edgellm.memory.sizes import parse_size

AUTO: Final = "auto"


class MemoryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much memory may be taken, and whether it may be taken back.

    Attributes:
        budget: the most that the process may take, such as `480MiB`; `auto`: MemAvailable − CmaFree − reserve
            when it starts. `edgellm plan` says what an engine needs; more than the budget is not started.
        reserve: what stays free for everything else: under `auto`, and of the board's whole memory.
        lock: keep the process's pages in memory, whatever the pressure (mlockall); needs LimitMEMLOCK.
    """

    budget: str = "auto"
    reserve: str = "256MiB"
    lock: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no size; msgspec turns ValueError into ValidationError."""
        for name, text in (("budget", self.budget), ("reserve", self.reserve)):
            if (name, text) == ("budget", AUTO):
                continue
            try:
                parse_size(text)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

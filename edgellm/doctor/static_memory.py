"""Whether an executor on a device takes memory after READY: it promises that a step allocates nothing.

Two witnesses: what this process asked the driver for, and what the driver has free. The second one also sees
what the driver takes for itself; other processes' memory counts, too. Where the GPU has the host's DRAM it
sees everybody's, and is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.cuda.driver import Driver


@dataclass(frozen=True, slots=True)
class Taken:
    """Since READY.

    Attributes:
        asked: bytes that this process asked the driver for and did not give back.
        gone: bytes by which the device has less free; None: not asked.
    """

    asked: int
    gone: int | None

    @property
    def nothing(self) -> bool:
        """Whether memory is static."""
        return self.asked <= 0 and (self.gone is None or self.gone <= 0)

    def __str__(self) -> str:
        asked = f"device memory taken after READY: {self.asked} bytes asked for"
        if self.gone is None:
            return f"{asked} (the GPU has the host's DRAM, whose other users cannot be told apart)"
        other = ", by the driver itself or another process" if self.gone > max(0, self.asked) else ""
        return f"{asked}, {self.gone} bytes less free on the device{other}"


class StaticMemory:
    """Looks at a device's memory now, and again later.

    Args:
        driver: of a loaded executor; its context is current.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._held, self._free = driver.held, driver.memory()[0]

    def taken(self) -> Taken:
        """Since this was made."""
        integrated = self._driver.facts.integrated
        gone = None if integrated else self._free - self._driver.memory()[0]
        return Taken(self._driver.held - self._held, gone)

"""Stop strings, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one answer for strings that end it.

    The result does not depend on how the text is cut: the string that is complete first counts, and of those
    complete at the same character the longest.

    Args:
        stops: non-empty strings; none at all is allowed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            The text that may be sent now, and the stop string that was found, or None. After a hit nothing is
            held back, and nothing more should be pushed.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        self._held = ""
        hit = min(self._hits(text), default=None)
        if hit is not None:
            _, begin, stop = hit
            return text[:begin], stop
        keep = self._beginning(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """What was held back: the answer ended and it was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _hits(self, text: str) -> list[tuple[int, int, str]]:
        """(end, begin, stop) of each stop's first occurrence, which is also the one that ends first."""
        found = ((text.find(stop), stop) for stop in self._stops)
        return [(begin + len(stop), begin, stop) for begin, stop in found if begin >= 0]

    def _beginning(self, text: str) -> int:
        """Where the longest suffix begins that may become a stop string; len(text) if none may."""
        for begin in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[begin:]
            if any(stop.startswith(tail) for stop in self._stops):
                return begin
        return len(text)

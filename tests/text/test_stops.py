"""StopStrings: the same hit and the same text however the answer is cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edgellm.text.stops import StopStrings

# Few letters, so that beginnings of stop strings, overlaps and hits are common.
LETTERS = st.text(alphabet="ab\n", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=4)


def _whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, letter by letter: cut where a stop string is first complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(text=LETTERS, stops=STOPS, borders=st.lists(st.integers(0, 40)))
def test_any_split_gives_what_the_whole_text_gives(text: str, stops: list[str], borders: list[int]) -> None:
    watcher = StopStrings(stops)
    edges = [0, *sorted(min(border, len(text)) for border in borders), len(text)]
    sent, hit = "", None
    for begin, end in pairwise(edges):
        piece, hit = watcher.push(text[begin:end])
        sent += piece
        if hit is not None:
            break
        held = text[len(sent) : end]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    if hit is None:
        sent += watcher.flush()
    assert (sent, hit) == _whole(text, stops)


@given(text=LETTERS, stop=st.text(alphabet="ab\n", min_size=1, max_size=6))
def test_one_stop_string_is_a_find(text: str, stop: str) -> None:
    watcher = StopStrings([stop])
    sent, hit = watcher.push(text)
    found = text.find(stop)
    assert (sent + watcher.flush(), hit) == ((text, None) if found < 0 else (text[:found], stop))


def test_nothing_is_held_without_stop_strings_or_need() -> None:
    assert StopStrings([]).push("text") == ("text", None)
    watcher = StopStrings(["\nUser:"])
    assert watcher.push("Hello") == ("Hello", None)
    assert watcher.push(" there\nUs") == (" there", None)
    assert watcher.push("ual") == ("\nUsual", None)
    assert watcher.push("\nUser") == ("", None)
    assert watcher.push(": more") == ("", "\nUser:")
    assert watcher.flush() == ""

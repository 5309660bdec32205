"""Logging under systemd and without it; systemd-python's handler through its documented interface."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from edgellm.journal import is_journal, priority, set_level, set_up_logging
from edgellm.systemd import systemd_python

log = logging.getLogger("edgellm.test")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[TextIO]:
    with (tmp_path / "stderr").open("w+") as file:
        yield file


def journal_of(stream: TextIO) -> dict[str, str]:
    status = os.fstat(stream.fileno())
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def text(stream: TextIO) -> str:
    stream.flush()
    return Path(stream.name).read_text()


class FakeJournal:
    """systemd.journal's two names: a handler that passes the whole record to its sender, and send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, message: str, **fields: Any) -> None:
        self.sent.append((message, fields))

    def JournalHandler(self, *, sender_function: Callable[..., None], **constant: Any) -> logging.Handler:
        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                message = self.format(record)  # leaves it in the record as well
                extras = {**constant, **({"CODE_ARGS": str(record.args)} if record.args else {})}
                if record.exc_info:
                    extras["EXCEPTION_INFO"] = record.exc_info
                extras.update(record.__dict__)
                sender_function(
                    message,
                    PRIORITY=str(priority(record.levelno)),
                    LOGGER=record.name,
                    **extras,
                )

        return Handler()


class RecordingJournal:
    """systemd-python's own handler, with its send replaced: no journal is needed to see what it would get."""

    def __init__(self, module: Any) -> None:
        self.JournalHandler = module.JournalHandler
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, message: str, **fields: Any) -> None:
        self.sent.append((message, fields))


JOURNALS: dict[str, Callable[[], Any]] = {"injected": FakeJournal}
if (module := systemd_python("journal")) is not None:
    JOURNALS["systemd-python"] = lambda: RecordingJournal(module)


@pytest.fixture(params=JOURNALS)
def journal(request: pytest.FixtureRequest) -> Any:
    return JOURNALS[request.param]()


def test_fields_reach_the_journal(journal: Any, stream: TextIO) -> None:
    set_up_logging("info", stream=stream, environment=journal_of(stream), journal=journal)
    log.warning("request %s is late", "r7", extra={"REQUEST_ID": "r7", "CLIENT": "uid=1000 pid=42"})
    log.info("state", extra={"STATE": "THROTTLED"})
    (message, fields), (_, second) = journal.sent
    assert message == "edgellm.test: request r7 is late"
    assert fields["PRIORITY"] == "4"
    assert fields["REQUEST_ID"] == "r7"
    assert fields["CLIENT"] == "uid=1000 pid=42"
    assert fields["SYSLOG_IDENTIFIER"] == "edgellm"
    assert fields["LOGGER"] == "edgellm.test"
    assert second["STATE"] == "THROTTLED"
    assert second["PRIORITY"] == "6"
    assert text(stream) == ""


def test_nothing_but_journal_fields_reaches_the_journal(journal: Any, stream: TextIO) -> None:
    """journald drops lower-case fields silently; arguments are not logged a second time as objects."""
    set_up_logging("info", stream=stream, environment=journal_of(stream), journal=journal)
    log.error("failed for %s", "x", exc_info=ValueError("broken"))
    ((message, fields),) = journal.sent
    assert "ValueError: broken" in message
    assert all(name.isupper() for name in fields)
    assert not {"CODE_ARGS", "EXCEPTION_INFO"} & fields.keys()


def test_without_systemd_python_lines_carry_their_priority(stream: TextIO) -> None:
    set_up_logging("debug", stream=stream, environment=journal_of(stream), journal=None)
    log.debug("a")
    log.info("b", extra={"REQUEST_ID": "r7", "STATE": "SHED"})
    log.warning("c")
    log.error("first\nsecond")
    log.critical("e")
    assert text(stream).splitlines() == [
        "<7>edgellm.test: a",
        "<6>edgellm.test: b [REQUEST_ID=r7 STATE=SHED]",
        "<4>edgellm.test: c",
        "<3>edgellm.test: first",
        "<3>second",
        "<2>edgellm.test: e",
    ]


def test_a_field_cannot_forge_a_line(stream: TextIO) -> None:
    set_up_logging("info", stream=stream, environment={}, journal=None)
    log.info("done", extra={"REQUEST_ID": "r7\n2026-01-01 ERROR edgellm: on fire\x1b[2J"})
    assert text(stream).count("\n") == 1
    assert "\x1b" not in text(stream)


def test_every_line_of_a_traceback_is_an_error(stream: TextIO) -> None:
    set_up_logging("info", stream=stream, environment=journal_of(stream), journal=None)
    log.error("failed", exc_info=ValueError("broken\nin two lines"))
    lines = text(stream).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("<3>") for line in lines)


def test_outside_systemd_lines_are_for_a_person(journal: Any, stream: TextIO) -> None:
    set_up_logging("info", stream=stream, environment={}, journal=journal)
    log.info("hello", extra={"CLIENT": "uid=0"})
    line = text(stream)
    assert line.endswith(" INFO edgellm.test: hello [CLIENT=uid=0]\n")
    assert not line.startswith("<")
    assert journal.sent == []


def test_level_is_kept_and_can_be_changed(stream: TextIO) -> None:
    set_up_logging("warning", stream=stream, environment={}, journal=None)
    log.info("quiet")
    set_level("debug")
    log.debug("loud")
    assert "quiet" not in text(stream)
    assert "loud" in text(stream)


def test_setting_up_twice_logs_once(stream: TextIO) -> None:
    for _ in range(2):
        set_up_logging("info", stream=stream, environment={}, journal=None)
    log.info("once")
    assert text(stream).count("once") == 1


def test_journal_stream_must_be_this_very_stream(stream: TextIO, tmp_path: Path) -> None:
    assert is_journal(stream, journal_of(stream))
    with (tmp_path / "redirected").open("w") as other:
        # `edgellm serve 2> file` under systemd: JOURNAL_STREAM is set, but stderr is the file.
        assert not is_journal(other, journal_of(stream))
    assert not is_journal(stream, {})
    assert not is_journal(stream, {"JOURNAL_STREAM": "8:"})
    assert not is_journal(stream, {"JOURNAL_STREAM": "here"})
    assert not is_journal(io.StringIO(), journal_of(stream))

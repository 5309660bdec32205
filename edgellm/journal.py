"""Logging: to systemd's journal with fields of its own, or to standard error.

A log call adds fields through `extra`, in the journal's spelling: upper case.

    log.info("request %s is done", request_id, extra={"REQUEST_ID": request_id, "CLIENT": "uid=1000"})
    journalctl -u edgellm REQUEST_ID=r7

Three ways out, chosen once by `set_up_logging`:
- standard error is the journal (JOURNAL_STREAM) and systemd-python is installed: journal entries with fields;
- standard error is the journal and it is not: lines with the `<N>` priority prefix of sd-daemon(3);
- otherwise lines for a person, with time and level.
Where there are no fields they follow the message in brackets. Prompts and answers are never logged.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from edgellm.systemd import systemd_python

IDENTIFIER = "edgellm"

FIELDS = ("REQUEST_ID", "CLIENT", "STATE")
"""Journal fields that edgellm sets: the request's id, the client's `uid=… pid=…`, the governor's state."""

OF_THE_RECORD = frozenset({"CODE_ARGS", "EXCEPTION_INFO"})
"""Fields of systemd-python's handler that repeat the message's arguments as Python objects."""

TIMED = "%(asctime)s %(levelname)s %(name)s: %(message)s"
BARE = "%(name)s: %(message)s"
"""The journal has its own time and priority."""


class Journal(Protocol):
    """What is used of systemd-python's `systemd.journal`."""

    JournalHandler: Callable[..., logging.Handler]
    send: Callable[..., Any]


def set_up_logging(
    level: str,
    *,
    stream: TextIO | None = None,
    environment: Mapping[str, str] = os.environ,
    journal: Journal | str | None = "auto",
) -> logging.Handler:
    """Send the root logger's records of `level` and above to one place, replacing what was set up before.

    Args:
        level: debug, info, warning or error.
        stream: standard error unless told otherwise.
        environment: where JOURNAL_STREAM is read.
        journal: systemd-python's `systemd.journal`, or None to do without; by default, whichever is there.

    Returns: the handler, now the root logger's only one.
    """
    stream = sys.stderr if stream is None else stream
    module = systemd_python("journal") if isinstance(journal, str) else journal
    handler: logging.Handler
    if not is_journal(stream, environment):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(LineFormatter(TIMED))
    elif module is None:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(PriorityFormatter(BARE))
    else:
        handler = module.JournalHandler(sender_function=_sender(module), SYSLOG_IDENTIFIER=IDENTIFIER)
        handler.setFormatter(logging.Formatter(BARE))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)
    return handler


def set_level(level: str) -> None:
    """Change what is logged from now on; what a reload of the configuration calls."""
    logging.getLogger().setLevel(level.upper())


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd connected this very stream to the journal: JOURNAL_STREAM is its device:inode."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    if not (device.isdecimal() and inode.isdecimal()):
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or a stream without a descriptor
        return False
    return (status.st_dev, status.st_ino) == (int(device), int(inode))


class LineFormatter(logging.Formatter):
    """The message and, in brackets, the fields that came with it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """One record as text; the traceback, if any, is added by the base class below it."""
        text = super().formatMessage(record)
        fields = [
            f"{name}={_on_one_line(record.__dict__[name])}" for name in FIELDS if name in record.__dict__
        ]
        return f"{text} [{' '.join(fields)}]" if fields else text


class PriorityFormatter(LineFormatter):
    """Each line with its `<N>` prefix: the journal takes every line for an entry of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, all with its priority."""
        prefix = f"<{priority(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def priority(level: int) -> int:
    """syslog(3)'s priority of a logging level: 2 critical, 3 error, 4 warning, 6 informational, 7 debug."""
    for bound, value in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= bound:
            return value
    return 7


def _on_one_line(value: object) -> str:
    """A request's id is the client's choice: it must not be able to write a line of its own."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _sender(module: Journal) -> Callable[..., None]:
    def send(message: str, /, **fields: Any) -> None:
        # The handler passes the whole record, `message` among it; the journal knows upper-case fields only.
        module.send(
            message,
            **{
                name: value
                for name, value in fields.items()
                if name.isupper() and name not in OF_THE_RECORD and value is not None
            },
        )

    return send

"""SIGHUP: which parts of a changed configuration take effect at once, and which need a restart."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec

from edgellm.config import Config

log = logging.getLogger(__name__)

RELOADABLE = ("log.level", "limits", "governor", "sensors.required", "scheduler.drain_timeout_s")
"""Keys, and whole sections, that may change while requests run."""


def reloaded(old: Config, new: Config) -> Config:
    """`old` with what may change taken from `new`; every other difference is logged as needing a restart."""
    sections: dict[str, Any] = {}
    for section in Config.__struct_fields__:
        before, after = getattr(old, section), getattr(new, section)
        taken = {}
        for name in _changed(before, after):
            key = f"{section}.{name}"
            if section in RELOADABLE or key in RELOADABLE:
                taken[name] = getattr(after, name)
                log.info("reload: %s is now %s", key, taken[name])
            else:
                log.warning("reload: %s cannot change while running; restart the daemon", key)
        sections[section] = msgspec.structs.replace(before, **taken)
    return Config(**sections)


def _changed(before: msgspec.Struct, after: msgspec.Struct) -> Iterator[str]:
    for name in before.__struct_fields__:
        if getattr(before, name) != getattr(after, name):
            yield name

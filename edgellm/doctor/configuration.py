"""The service's configuration and the engine that it names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import CONFIGURATION, Host
from edgellm.errors import EngineError


def check_configuration(host: Host) -> Iterator[Finding]:
    """What the service would start with."""
    if not host.configured:
        yield Finding(
            "configuration",
            Level.OK,
            f"no /{CONFIGURATION}",
            "defaults; tools/install.sh writes one for the service",
        )
    elif host.config_denied:
        yield Finding(
            "configuration",
            Level.WARN,
            f"/{CONFIGURATION} cannot be read as uid {os.geteuid()}",
            "neither it nor its engine is examined, and the thresholds in this report are the defaults",
            "run the doctor as root, or as a member of the group edgellm",
        )
    elif host.config_error is not None:
        yield Finding(
            "configuration",
            Level.FAIL,
            str(host.config_error),
            "the service exits with 78",
            "correct it; docs/operations.md lists every key",
        )
    else:
        yield Finding("configuration", Level.OK, f"/{CONFIGURATION} is valid")
        if host.live:
            yield _engine(host.config.engine.path)


def _engine(path: str | None) -> Finding:
    if path is None:
        return Finding(
            "engine",
            Level.FAIL,
            "engine.path is not set",
            "the service exits with 78",
            "edgellm build, then tools/install.sh --engine DIRECTORY",
        )
    from edgellm.enginedir import open_engine

    try:
        engine = open_engine(Path(path))
    except EngineError as error:
        return Finding(
            "engine", Level.FAIL, str(error), "the service exits with 66", "build it again with edgellm build"
        )
    built = engine.build
    return Finding(
        "engine",
        Level.OK,
        f"{engine.model_name}: {built.slots}",
        path,
    )

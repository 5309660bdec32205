"""The service's configuration and the engine that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgellm.config import Config, load_config
from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host
from edgellm.errors import ConfigError, EngineError

CONFIGURATION = "etc/edgellm/edgellm.toml"


def check_configuration(host: Host) -> Iterator[Finding]:
    """What the service would start with."""
    if not host.path(CONFIGURATION).exists():
        yield Finding(
            "configuration",
            Level.OK,
            f"no /{CONFIGURATION}",
            "defaults; tools/install.sh writes one for the service",
        )
        return
    config, finding = read_configuration(host)
    yield finding
    if config is not None and host.live:
        yield _engine(config)


def read_configuration(host: Host) -> tuple[Config | None, Finding]:
    """The service's configuration, or None, and what there is to say about it."""
    try:
        # The environment of whoever runs the doctor is not the service's.
        config = load_config(host.path(CONFIGURATION), environment={})
    except ConfigError as error:
        remedy = "correct it; docs/operations.md lists every key"
        return None, Finding("configuration", Level.FAIL, str(error), "the service exits with 78", remedy)
    return config, Finding("configuration", Level.OK, f"/{CONFIGURATION} is valid")


def _engine(config: Config) -> Finding:
    if config.engine.path is None:
        return Finding(
            "engine",
            Level.FAIL,
            "engine.path is not set",
            "the service exits with 78",
            "edgellm build, then tools/install.sh --engine DIRECTORY",
        )
    from edgellm.enginedir import open_engine

    try:
        engine = open_engine(Path(config.engine.path))
    except EngineError as error:
        return Finding(
            "engine", Level.FAIL, str(error), "the service exits with 66", "build it again with edgellm build"
        )
    return Finding(
        "engine",
        Level.OK,
        f"{engine.model_name}: {engine.build.max_batch_size} slots of {engine.build.max_seq_len} tokens",
        config.engine.path,
    )

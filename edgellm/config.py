"""The daemon's configuration: defaults < TOML file < environment < command line, validated as one.

A key is written `section.key`; in the environment it is EDGELLM_SECTION_KEY. Unknown keys are refused, with
the nearest known one; every error names the source that the value came from.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edgellm.errors import ConfigError
from edgellm.governor.config import GovernorConfig, LimitsConfig, SensorsConfig
from edgellm.memory.config import MemoryConfig
from edgellm.server_config import ServerConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "EDGELLM_"
NOT_CONFIGURATION = frozenset({"EDGELLM_CACHE", "EDGELLM_ENDPOINT"})
"""Variables of that prefix that are no configuration keys: the model cache, and a client's endpoint."""


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine: which one, and how much of what it was built for is used.

    Attributes:
        path: engine directory.
        threads: CPU threads that run the model (the CPU executor's); 0: one for each core available.
        max_batch_size: slots; 0: as built. Each slot holds max_seq_len tokens of KV cache.
        max_seq_len: tokens a slot holds, prompt and answer together; 0: as built.
        max_num_tokens: tokens fed in one step at most; 0: as built.
    """

    path: str | None = None
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    max_batch_size: Annotated[int, Meta(ge=0, le=256)] = 0
    max_seq_len: Annotated[int, Meta(ge=0)] = 0
    max_num_tokens: Annotated[int, Meta(ge=0)] = 0


class SchedulerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How steps are composed.

    Attributes:
        max_step_ms: a step feeds as much of a prompt as takes this long, so that running answers keep their
            pace and a cancel takes effect within it.
        drain_timeout_s: on SIGTERM, how long open requests may go on before they are ended.
    """

    max_step_ms: Annotated[int, Meta(ge=1, le=60_000)] = 200
    drain_timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is logged, to standard error. Prompts and answers never are."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that `edgellm serve` can be told."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    governor: GovernorConfig = GovernorConfig()
    limits: LimitsConfig = LimitsConfig()
    sensors: SensorsConfig = SensorsConfig()
    log: LogConfig = LogConfig()


SECTIONS: dict[str, type[Struct]] = {f.name: f.type for f in msgspec.structs.fields(Config)}


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Compose the configuration.

    Args:
        file: a TOML file with one table per section.
        environment: variables EDGELLM_SECTION_KEY; their text is read as the key's type.
        flags: `section.key` → value; None values are absent. Text is read as the key's type.

    Raises:
        ConfigError: naming the source, the key, and what would work.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    sources: dict[str, str] = {}
    for key, value, source in [
        *_from_file(file),
        *_from_environment(environment),
        *_from_flags(flags or {}),
    ]:
        section, _, name = key.partition(".")
        sections[section][name] = value
        sources[key] = source
    try:
        # strict=False reads the text of the environment and of flags as numbers and booleans.
        config: Config = msgspec.convert(sections, Config, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(str(error), sources) from None
    return config


def _known_keys() -> list[str]:
    return [f"{section}.{f.name}" for section, kind in SECTIONS.items() for f in msgspec.structs.fields(kind)]


def _check_key(key: str, source: str, spell: Mapping[str, str] | None = None) -> None:
    """Refuse an unknown key; `spell` maps keys to how this source writes them."""
    known = _known_keys()
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    written = spell or {}
    hint = f"; did you mean {written.get(near[0], near[0])}?" if near else ""
    raise ConfigError(f"{source}: there is no key {written.get(key, key)}{hint}")


def _from_file(file: Path | None) -> Iterator[tuple[str, Any, str]]:
    if file is None:
        return
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not TOML: {error}") from None
    for section, values in document.items():
        if section not in SECTIONS:
            near = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0.5)
            hint = f"; did you mean [{near[0]}]?" if near else f"; sections are {', '.join(SECTIONS)}"
            raise ConfigError(f"{file}: there is no section [{section}]{hint}")
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {section} is a section: write [{section}] and its keys below it")
        for name, value in values.items():
            _check_key(f"{section}.{name}", str(file))
            yield f"{section}.{name}", value, str(file)


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    spelled = {key: ENVIRONMENT_PREFIX + key.replace(".", "_").upper() for key in _known_keys()}
    keys = {variable: key for key, variable in spelled.items()}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in NOT_CONFIGURATION:
            continue
        if variable not in keys:
            guess = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("_", ".", 1)
            _check_key(guess, "environment", {**spelled, guess: variable})
        yield keys[variable], text, variable


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key, value in flags.items():
        if value is not None:
            _check_key(key, "command line")
            yield key, value, f"command line, {key}"


def _explain(text: str, sources: Mapping[str, str]) -> ConfigError:
    """Turn msgspec's sentence, "… - at `$.section.key…`", into one that names the source."""
    what, _, path = text.partition(" - at `$.")
    path = path.rstrip("`")
    key = ".".join(path.partition("[")[0].split(".")[:2])
    return ConfigError(f"{sources.get(key, 'configuration')}: {path}: {what}")

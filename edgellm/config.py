"""The daemon's configuration: defaults < TOML file < environment < command line, validated as one.

A key is written `section.key`; in the environment it is EDGELLM_SECTION_KEY. Unknown keys are refused, with
the nearest known one; every error names the source that the value came from.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from edgellm.complaint import complaint_of
from edgellm.errors import ConfigError
from edgellm.governor.config import GovernorConfig, LimitsConfig, SensorsConfig
from edgellm.memory.config import MemoryConfig
from edgellm.server_config import ServerConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "EDGELLM_"
NOT_CONFIGURATION = frozenset(
    {"EDGELLM_CACHE", "EDGELLM_ENDPOINT", "EDGELLM_CURVE_SECRET_KEY", "EDGELLM_CURVE_SERVER_KEY"}
)
"""Variables of that prefix that are no configuration keys: the model cache, a client's endpoint and keys."""


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine: which one, and how much of what it was built for is used.

    Attributes:
        path: engine directory; in a file a relative one is below that file's directory.
        threads: CPU threads that run the model (the CPU executor's); 0: one for each core available.
        max_batch_size: slots; 0: as built. Each slot holds max_seq_len tokens of KV cache.
        max_seq_len: tokens a slot holds, prompt and answer together, at least 2; 0: as built.
        max_num_tokens: tokens fed in one step at most; 0: as built.
    """

    path: str | None = None
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    max_batch_size: Annotated[int, Meta(ge=0, le=256)] = 0
    max_seq_len: Annotated[int, Meta(ge=0)] = 0
    max_num_tokens: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        """Refuse a slot that holds no answer; msgspec turns ValueError into ValidationError."""
        if self.max_seq_len == 1:
            raise ValueError(
                "max_seq_len must be 0 (as built) or at least 2: a token of prompt, one of answer"
            )


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

HINTS = {"server.socket_mode": 'write octal permissions in quotes, such as "0660"'}
"""What would work, for keys whose type does not say it."""


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
    typed: Mapping[str, str] | None = None,
) -> Config:
    """Compose the configuration.

    Args:
        file: a TOML file with one table per section; a relative engine.path in it is below its directory.
        environment: variables EDGELLM_SECTION_KEY; their text is read as the key's type.
        flags: `section.key` → value; None values are absent. Text is read as the key's type.
        typed: `section.key` → the words on the command line that set it, as in `--threads 4`.

    Raises:
        ConfigError: naming the source, the key, and what would work.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    sources: dict[str, _Source] = {}
    for key, value, source in [
        *_from_file(file),
        *_from_environment(environment),
        *_from_flags(flags or {}, typed or {}),
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


class _Source(NamedTuple):
    """Where a value came from: what an error begins with, and whether every value there is text."""

    name: str
    text: bool


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


def _from_file(file: Path | None) -> Iterator[tuple[str, Any, _Source]]:
    if file is None:
        return
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not TOML: {error}{_quoting(text, str(error))}") from None
    for section, values in document.items():
        if section not in SECTIONS:
            near = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0.5)
            hint = f"; did you mean [{near[0]}]?" if near else f"; sections are {', '.join(SECTIONS)}"
            raise ConfigError(f"{file}: there is no section [{section}]{hint}")
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {section} is a section: write [{section}] and its keys below it")
        for name, value in values.items():
            key = f"{section}.{name}"
            _check_key(key, str(file))
            path = key == "engine.path" and isinstance(value, str)
            yield (
                key,
                str(file.absolute().parent / value) if path else value,
                _Source(f"{file}: {key}", text=False),
            )


def _quoting(text: str, error: str) -> str:
    """A hint where the line at fault has a bare value that must be in quotes."""
    line = re.search(r"at line (\d+)", error)
    match = line and re.fullmatch(
        r"\s*([\w-]+)\s*=\s*([^\s\"'\[{#][^#\"']*?)\s*(?:#.*)?", text.splitlines()[int(line[1]) - 1]
    )
    return f'; if it is text, write {match[1]} = "{match[2]}"' if match else ""


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any, _Source]]:
    spelled = {key: ENVIRONMENT_PREFIX + key.replace(".", "_").upper() for key in _known_keys()}
    keys = {variable: key for key, variable in spelled.items()}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in NOT_CONFIGURATION:
            continue
        if variable not in keys:
            guess = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("_", ".", 1)
            _check_key(guess, "environment", {**spelled, guess: variable})
        yield keys[variable], text, _Source(f"{variable}={text}", text=True)


def _from_flags(flags: Mapping[str, Any], typed: Mapping[str, str]) -> Iterator[tuple[str, Any, _Source]]:
    for key, value in flags.items():
        if value is not None:
            _check_key(key, "command line")
            yield key, value, _Source(typed.get(key, f"command line, {key}"), isinstance(value, str))


def _explain(error: str, sources: Mapping[str, _Source]) -> ConfigError:
    """Turn msgspec's complaint into one that names the source."""
    complaint = complaint_of(error, Config)
    section, dot, rest = complaint.path.partition(".")
    if not dot:  # values that do not go together: the sentence names them
        words = set(re.findall(r"\w+", complaint.what))
        keys = [name for name in SECTIONS[section].__struct_fields__ if name in words]
        named = [name for name in keys if f"{section}.{name}" in sources]
        at = " and ".join(sources[f"{section}.{name}"].name for name in named) or f"configuration: {section}"
        what = complaint.what.removeprefix(f"{named[0]}: ") if len(named) == 1 else complaint.what
        return ConfigError(f"{at}: {what}")
    name = re.split(r"[.\[]", rest, maxsplit=1)[0]
    key, inside = f"{section}.{name}", rest.removeprefix(name)
    source = sources.get(key, _Source(f"configuration: {key}", text=False))
    what = complaint.expected if source.text else complaint.what
    if complaint.near is not None:
        what += f"; did you mean {complaint.near}?"
    if key in HINTS:
        what = HINTS[key]
    return ConfigError(f"{source.name}{inside}: {what}")

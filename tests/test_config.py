"""Configuration: the order of sources, and errors that name source, key and what would work."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.config import Config, load_config
from edgellm.errors import ConfigError


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "edgellm.toml"
    path.write_text(text)
    return path


def test_without_sources_everything_is_default() -> None:
    assert load_config(environment={}) == Config()


def test_environment_beats_file_and_flags_beat_both(tmp_path: Path) -> None:
    file = _file(tmp_path, "[server]\nmax_queue = 1\nmax_message_bytes = 4096\n[engine]\nthreads = 1\n")
    environment = {"EDGELLM_SERVER_MAX_QUEUE": "2", "EDGELLM_ENGINE_THREADS": "2"}
    config = load_config(file, environment, {"engine.threads": "3", "engine.path": None})
    assert config.engine.threads == 3
    assert config.server.max_queue == 2
    assert config.server.max_message_bytes == 4096
    assert config.engine.path is None


def test_other_variables_of_the_prefix_are_left_alone() -> None:
    environment = {"EDGELLM_CACHE": "/c", "EDGELLM_ENDPOINT": "ipc:///x", "PATH": "/bin"}
    assert load_config(environment=environment) == Config()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[server]\nmax_quque = 1\n", ["server.max_quque", "did you mean server.max_queue?"]),
        ("[sever]\n", ["[sever]", "did you mean [server]?"]),
        ("server = 3\n", ["server is a section"]),
        ("[engine]\nthreads = -1\n", ["engine.threads: must be an integer, at least 0"]),
        ("[engine]\nthreads = 'many'\n", ["engine.threads: must be an integer, not a string"]),
        ("[engine\n", ["is not TOML"]),
        ("[server]\nsocket_mode = 0660  # group\n", ["is not TOML", 'write socket_mode = "0660"']),
        ("[engine]\npath = /opt/engine\n", ['write path = "/opt/engine"']),
        ("[server]\nsocket_mode = 660\n", ["server.socket_mode: write octal", '"0660"']),
        ("[server]\nrules = [{max_prio = 1}]\n", ["server.rules[0].max_prio", "did you mean max_priority?"]),
        ("[governor]\nshed_below_c = 20\n", ["governor.shed_below_c: ", "20 is not less than 10"]),
        ("[memory]\nreserve = '4'\n", ["memory.reserve: '4' is no size", "480MiB"]),
        ("[engine]\nmax_seq_len = 1\n", ["engine.max_seq_len: ", "at least 2"]),
        ("[log]\nlevel = 'loud'\n", ["log.level: 'loud' is not one of debug, error, info, warning"]),
    ],
)
def test_a_bad_file_is_named_with_the_key(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = _file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    for part in [str(file), *parts]:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml", {})


def test_a_bad_variable_is_named_as_it_was_written() -> None:
    with pytest.raises(
        ConfigError, match=r"EDGELLM_SERVER_MAX_QUEU.*did you mean EDGELLM_SERVER_MAX_QUEUE\?"
    ):
        load_config(environment={"EDGELLM_SERVER_MAX_QUEU": "1"})
    with pytest.raises(ConfigError, match=r"^EDGELLM_ENGINE_THREADS=two: must be an integer$"):
        load_config(environment={"EDGELLM_ENGINE_THREADS": "two"})


def test_a_bad_flag_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"command line: there is no key engine.thread; did you mean engine.threads"
    ):
        load_config(environment={}, flags={"engine.thread": "1"})
    with pytest.raises(ConfigError, match=r"^--threads many: must be an integer$"):
        load_config(
            environment={}, flags={"engine.threads": "many"}, typed={"engine.threads": "--threads many"}
        )


def test_thresholds_from_several_sources_are_all_named(tmp_path: Path) -> None:
    file = _file(tmp_path, "[governor]\nshed_below_c = 20\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, {"EDGELLM_GOVERNOR_TARGET_BELOW_C": "11"})
    assert f"{file}: governor.shed_below_c and EDGELLM_GOVERNOR_TARGET_BELOW_C=11: " in str(caught.value)
    assert "20 is not less than 11" in str(caught.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "edgellm.toml"
    path.write_bytes(b"\xef\xbb\xbf[log]\nlevel = 'debug'\n")
    assert load_config(path, {}).log.level == "debug"
    path.write_bytes(b"[log]\nlevel = '\xff'\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8: .* at byte 15"):
        load_config(path, {})


def test_a_relative_engine_path_is_below_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _file(tmp_path, "[engine]\npath = 'engines/small'\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("edgellm.toml"), {}).engine.path == f"{tmp_path}/engines/small"
    _file(tmp_path, "[engine]\npath = '/opt/small'\n")
    assert load_config(Path("edgellm.toml"), {}).engine.path == "/opt/small"

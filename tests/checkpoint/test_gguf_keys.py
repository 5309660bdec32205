"""Keys of a GGUF file that edgellm does not act on: fine where they change nothing, otherwise refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from ggufs import Llama

from edgellm.checkpoint import open_checkpoint
from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_keys import HARMLESS, NEUTRAL, READ
from edgellm.checkpoint.gguf_spec import read_spec
from edgellm.errors import CheckpointError

MOE = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}


def known_to_gguf() -> set[str]:
    """Every key of an architecture's own that the `gguf` package can write, without the architecture."""

    def strings(group: type) -> Iterator[str]:
        for value in vars(group).values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, type):
                yield from strings(value)

    keys = strings(gguf.Keys)
    return {key.removeprefix("{arch}.") for key in keys if key.startswith("{arch}.") and "{dense}" not in key}


def write(path: Path, **keys: Any) -> Path:
    Llama(keys={f"llama.{suffix}": value for suffix, value in keys.items()}).write(path)
    return path


@pytest.mark.parametrize("suffix", sorted(NEUTRAL))
def test_what_would_change_the_arithmetic_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "tiny.gguf"
    neutral = NEUTRAL[suffix][-1]
    other: Any = {int: 8, float: 4.0, bool: not neutral}[type(neutral)]
    fine = str(neutral).lower()
    with pytest.raises(CheckpointError, match=rf"llama\.{suffix} = {other}, .* {fine} would be fine"):
        open_checkpoint(write(path, **{suffix: other}))
    open_checkpoint(write(path, **{suffix: neutral}))


def test_a_value_for_each_layer_is_fine_if_all_are(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    open_checkpoint(write(path, swiglu_clamp_exp=[0.0, 0.0]))
    with pytest.raises(CheckpointError, match=r"swiglu_clamp_exp = \[0\.0, 7\.0\]"):
        open_checkpoint(write(path, swiglu_clamp_exp=[0.0, 7.0]))
    with pytest.raises(CheckpointError, match=r"residual_scale = off"):
        open_checkpoint(write(path, residual_scale="off"))


@pytest.mark.parametrize("suffix", [*sorted(known_to_gguf() - READ - HARMLESS - set(NEUTRAL)), "new.key"])
def test_what_is_neither_read_nor_harmless_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=rf"llama\.{suffix}, which edgellm does not know"):
        open_checkpoint(write(tmp_path / "tiny.gguf", **{suffix: 0}))


def test_notes_and_keys_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    notes = {"llama.vocab_size": 7, "llama.tensor_data_layout": "Meta AI original pth"}
    Llama(keys={**notes, "llama.rope.scaling.finetuned": True, "qwen2.logit_scale": 3.0}).write(path)
    with_pattern = {
        "llama.attention.sliding_window": 32,
        "llama.attention.sliding_window_pattern": [True, False],
    }
    open_checkpoint(path)
    Llama(keys=with_pattern).write(path)
    assert open_checkpoint(path).spec.max_context == 32


class _Asked(dict[str, Any]):
    """A file's keys, which notes what was asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def test_what_is_said_to_be_read_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    asked: set[str] = set()
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    keys: dict[str, Any]
    for architecture, keys in (("llama", yarn), ("qwen3moe", MOE)):
        own = {f"{architecture}.{key}": value for key, value in keys.items()}
        Llama(keys=own, architecture=architecture).write(path)
        file = GgufFile(path)
        file.values = values = _Asked(file.values)
        read_spec(file)
        prefix = f"{architecture}."
        asked |= {key.removeprefix(prefix) for key in values.keys_asked if key.startswith(prefix)}
    assert asked == READ
    # `rope.scale_linear` is older than the package's list, and YaRN's are younger than the oldest allowed.
    yarns = {"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"}
    assert {"rope.scale_linear"} <= READ - known_to_gguf() <= {"rope.scale_linear", *yarns}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"general.type": "adapter"}, r"general\.type adapter"),
        ({"general.type": "mmproj"}, r"general\.type mmproj"),
        ({"split.count": 3}, r"one of 3 parts.*--merge"),
    ],
)
def test_what_is_no_whole_model_says_so(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    path = tmp_path / "tiny.gguf"
    Llama(keys=keys).write(path)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(path)

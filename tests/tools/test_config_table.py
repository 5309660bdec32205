"""docs/operations.md names every key, as the configuration has it."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import config_table

from edgellm.config import Config, load_config

DOCUMENT = config_table.DOCUMENT.read_text(encoding="utf-8")


def test_the_documents_table_is_the_configurations() -> None:
    assert config_table.with_table(DOCUMENT) == DOCUMENT, "run: python tools/config_table.py --write"


def test_every_key_is_there_and_can_be_set() -> None:
    """Independent of the tool: by what load_config accepts."""
    config = Config()
    for section in msgspec.structs.fields(Config):
        for field in msgspec.structs.fields(getattr(config, section.name)):
            key = f"{section.encode_name}.{field.encode_name}"
            assert f"| `{key}` | `" in DOCUMENT
            value = getattr(getattr(config, section.name), field.name)
            if isinstance(value, (str, int, float)):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                assert load_config(environment={config_table.variable(key): text}) == config


def test_docstrings_are_read_by_their_indentation() -> None:
    class Silent(msgspec.Struct):
        """Says nothing.

        Attributes:
            a, b: two at once,
                over two lines.
            c: one
        """

        a: int = 0
        b: int = 0
        c: int = 0

    assert config_table.attributes(Silent) == {
        "a": "two at once, over two lines.",
        "b": "two at once, over two lines.",
        "c": "one",
    }

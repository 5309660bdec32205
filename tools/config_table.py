"""The table of configuration keys in docs/operations.md, from the configuration's own docstrings.

tools/config_table.py --write     bring the document up to date
tools/config_table.py             print the table; exit code 1 if the document's differs
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from edgellm.config import ENVIRONMENT_PREFIX, SECTIONS

DOCUMENT = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN = "<!-- keys: tools/config_table.py --write -->\n"
END = "<!-- end of keys -->\n"


def main() -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write it into docs/operations.md")
    args = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    current = with_table(text)
    if args.write:
        DOCUMENT.write_text(current, encoding="utf-8")
        return 0
    print(table(), end="")
    return 0 if text == current else 1


def with_table(document: str) -> str:
    """The document with the present table between its markers."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{DOCUMENT}: the markers {BEGIN.strip()} and {END.strip()} are missing")
    return before + begin + table() + end + after


def table() -> str:
    """One row for each key: name, environment variable, default, what it is."""
    rows = ["| Key | Default | What it is |\n", "|---|---|---|\n"]
    for section, kind in SECTIONS.items():
        meanings = attributes(kind)
        for field in msgspec.structs.fields(kind):
            key = f"{section}.{field.encode_name}"
            meaning = meanings.get(field.name)
            if meaning is None:
                raise SystemExit(
                    f"{kind.__module__}.{kind.__name__}: its docstring says nothing of {field.name}"
                )
            rows.append(f"| `{key}` | `{_shown(field)}` | {meaning.replace('|', chr(92) + '|')} |\n")
    return "".join(rows)


def attributes(kind: type) -> dict[str, str]:
    """The Attributes section of a class's docstring: name → text; `a, b: text` documents both.

    A docstring without that section documents a single attribute as a whole.
    """
    document = inspect.getdoc(kind) or ""
    _, found, section = document.partition("\nAttributes:\n")
    if not found:
        names = [name for name in inspect.get_annotations(kind) if not name.startswith("_")]
        return {names[0]: " ".join(document.split())} if len(names) == 1 else {}
    meanings: dict[str, str] = {}
    # An entry begins at the section's own indentation; what is indented further continues it.
    for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        meanings.update(dict.fromkeys(re.split(r",\s*", names), " ".join(text.split())))
    return meanings


def variable(key: str) -> str:
    """The environment variable of a key."""
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def _shown(field: msgspec.structs.FieldInfo) -> str:
    default: Any = field.default
    if default is msgspec.NODEFAULT:
        default = field.default_factory() if callable(field.default_factory) else None
    return "none" if default is None else json.dumps(default)


if __name__ == "__main__":
    sys.exit(main())

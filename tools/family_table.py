"""The table of families and formats in docs/models.md, measured: takes about two minutes.

tools/family_table.py --write     bring the document up to date
tools/family_table.py             print the table
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "models.md"
BEGIN = "<!-- cells: tools/family_table.py --write -->\n"
END = "<!-- end of cells -->\n"


def main() -> int:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write it into docs/models.md")
    args = parser.parse_args()
    made = table()
    if not args.write:
        print(made, end="")
        return 0
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{DOCUMENT}: the markers {BEGIN.strip()} and {END.strip()} are missing")
    DOCUMENT.write_text(before + begin + made + end + after, encoding="utf-8")
    return 0


def table() -> str:
    """A row for each format, a column for each family."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from family_cells import FAMILIES, FORMATS

    rows = [["format", *FAMILIES], ["---"] * (1 + len(FAMILIES))]
    rows += [[form, *(cell(family, form) for family in FAMILIES)] for form in FORMATS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(family: str, form: str) -> str:
    """Error, and the KL if there is one."""
    from family_cells import measure

    with tempfile.TemporaryDirectory() as directory:
        measured = measure(family, form, Path(directory))
    return f"{measured.error:.1e}" + ("" if measured.kl is None else f" · {measured.kl:.4f}")


if __name__ == "__main__":
    sys.exit(main())

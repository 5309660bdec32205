"""A benchmark's outcome, and the forms it is shown in: for a terminal, Markdown, CSV and JSON.

All forms come from the same rows. People read `columns`, which may join several fields in one cell
(`mean ± sd`); CSV and JSON carry every field by itself, with the facts about the machine beside them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

Row = Mapping[str, Any]
MISSING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """How people see some fields of a row.

    Attributes:
        title: heading, with the unit.
        fields: the row's fields in this cell.
        form: str.format of their values, such as `{:.2f} ± {:.2f}`.
        right: whether the cell is a number, and aligned as one.
    """

    title: str
    fields: tuple[str, ...]
    form: str = "{}"
    right: bool = True

    def cell(self, row: Row) -> str:
        """The cell's text; a dash if a value is missing or not a number."""
        values = [row.get(name) for name in self.fields]
        if any(value is None or (isinstance(value, float) and math.isnan(value)) for value in values):
            return MISSING
        return self.form.format(*values)


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured where.

    Attributes:
        facts: about machine, engine and run; flat, the same for all rows.
        columns: what people see.
        rows: flat maps of text and numbers, all with the same keys; NaN is what could not be measured.
        samples: for each row the repetitions or requests behind it, JSON only.
        notes: sentences for people, below the table.
    """

    facts: Mapping[str, Any]
    columns: Sequence[Column]
    rows: Sequence[Row]
    samples: Sequence[Any] = field(default=())
    notes: Sequence[str] = field(default=())

    def cells(self) -> list[list[str]]:
        """The table's body as text."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]


def to_json(report: Report) -> str:
    """`{"facts": {…}, "rows": [{…, "samples": […]}]}`; what is not a number is null."""
    rows = [
        {**row, "samples": report.samples[index]} if index < len(report.samples) else dict(row)
        for index, row in enumerate(report.rows)
    ]
    document = {"facts": dict(report.facts), "rows": rows, "notes": list(report.notes)}
    return json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(report: Report) -> str:
    """One line per row with a heading; the facts are columns too, so that files can be concatenated."""
    out = io.StringIO()
    names = [*report.facts, *(report.rows[0] if report.rows else ())]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow(_without_nan({**report.facts, **row}))
    return out.getvalue()


def to_markdown(report: Report) -> str:
    """The facts as a list, the table in GitHub's Markdown, the notes."""
    lines = [f"- {name}: {value}" for name, value in report.facts.items()]
    lines += [
        "",
        _markdown_line(column.title for column in report.columns),
        _markdown_line("---:" if column.right else "---" for column in report.columns),
    ]
    lines += [_markdown_line(cells) for cells in report.cells()]
    lines += [line for note in report.notes for line in ("", note)]
    return "\n".join(lines) + "\n"


def to_text(report: Report) -> str:
    """The same with aligned columns and nothing but text, for pipes and logs."""
    width = max((len(name) for name in report.facts), default=0)
    lines = [f"{name:<{width}}  {value}" for name, value in report.facts.items()]
    table = [[column.title for column in report.columns], *report.cells()]
    widths = [max(len(cells[index]) for cells in table) for index in range(len(report.columns))]
    lines.append("")
    for cells in table:
        aligned = (
            cell.rjust(size) if column.right else cell.ljust(size)
            for cell, size, column in zip(cells, widths, report.columns, strict=True)
        )
        lines.append("  ".join(aligned).rstrip())
    lines += [line for note in report.notes for line in ("", note)]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Report], str]] = {
    "json": to_json,
    "csv": to_csv,
    "markdown": to_markdown,
    "text": to_text,
}


def show(report: Report, form: str | None = None, out: TextIO | None = None) -> None:
    """Print a report.

    Args:
        report: what to print.
        form: one of FORMATS; None is a drawn table on a terminal and plain text elsewhere.
        out: where; None is standard output.
    """
    out = out or sys.stdout
    if form is None and out.isatty():
        _draw(report, out)
    else:
        out.write(FORMATS[form or "text"](report))


def _draw(report: Report, out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    for name, value in report.facts.items():
        facts.add_row(name, str(value))
    # Values are not markup: a model may well be called [something].
    console = Console(file=out, markup=False, highlight=False)
    body = report.cells()
    narrow = _width(report, body) > console.width
    if narrow:
        body = [[cell.replace(" / ", "\n") for cell in cells] for cells in body]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if narrow else 1), pad_edge=False)
    for column in report.columns:
        table.add_column(column.title, justify="right" if column.right else "left", vertical="top")
    for cells in body:
        table.add_row(*cells)
    console.print(facts)
    console.print(table)
    for note in report.notes:
        console.print(note)


def _width(report: Report, body: Sequence[Sequence[str]]) -> int:
    """Characters that a line of the drawn table needs with every cell in one line."""
    table = [[column.title for column in report.columns], *body]
    return sum(max(len(cells[index]) for cells in table) + 3 for index in range(len(report.columns)))


def _markdown_line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _without_nan(value: Any) -> Any:
    """NaN as None, everywhere inside: JSON has no NaN, and an empty CSV cell says it better."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value

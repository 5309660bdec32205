"""Reports: the same rows in every form."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench.report import Column, Report, show, to_csv, to_json, to_markdown, to_text

COLUMNS = (
    Column("test", ("test",), right=False),
    Column("tokens/s", ("mean", "sd"), "{:.2f} ± {:.2f}"),
    Column("TTFT ms", ("p50",), "{:.1f}"),
)
FACTS = {"cpu": "Some CPU | 8 cores", "engine": "[red]x", "threads": 2}

rows = st.lists(
    st.fixed_dictionaries(
        {
            "test": st.text(
                st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
            ),
            "mean": st.floats(allow_nan=False, allow_infinity=False, width=32),
            "sd": st.just(math.nan) | st.floats(min_value=0, max_value=100),
            "p50": st.floats(min_value=0, max_value=1e6),
            "errors": st.integers(0, 100),
        }
    ),
    min_size=1,
    max_size=5,
)


def report(body: list[dict[str, Any]], **more: Any) -> Report:
    return Report(facts=FACTS, columns=COLUMNS, rows=body, **more)


def same(read: Any, written: Any) -> bool:
    if isinstance(written, float) and math.isnan(written):
        return read in (None, "")
    return bool(type(written)(read) == written)


@given(rows)
def test_json_gives_back_facts_and_rows(body: list[dict[str, Any]]) -> None:
    document = json.loads(to_json(report(body)), parse_constant=pytest.fail)
    assert document["facts"] == FACTS
    assert len(document["rows"]) == len(body)
    for read, written in zip(document["rows"], body, strict=True):
        assert list(read) == list(written)
        assert all(same(read[name], written[name]) for name in written)


@given(rows)
def test_csv_gives_back_facts_and_rows(body: list[dict[str, Any]]) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(report(body)), newline="")))
    assert len(lines) == len(body)
    for read, written in zip(lines, body, strict=True):
        assert all(same(read[name], value) for name, value in {**FACTS, **written}.items())


@given(rows)
def test_markdown_has_a_line_per_row_and_no_stray_bar(body: list[dict[str, Any]]) -> None:
    lines = [line for line in to_markdown(report(body)).split("\n") if line.startswith("|")]
    assert len(lines) == 2 + len(body)
    for line in lines:
        assert line.replace("\\|", "").count("|") == len(COLUMNS) + 1


def test_text_is_aligned_and_missing_numbers_are_dashes() -> None:
    body = [
        {"test": "pp512", "mean": 1234.5, "sd": 1.25, "p50": 10.0},
        {"test": "tg8", "mean": 5.0, "sd": math.nan, "p50": None},
    ]
    lines = to_text(report(body, notes=["a note"])).splitlines()
    assert lines[4:] == [
        "test         tokens/s  TTFT ms",
        "pp512  1234.50 ± 1.25     10.0",
        "tg8                 –        –",
        "",
        "a note",
    ]


def test_samples_go_with_their_rows() -> None:
    body = [
        {"test": "a", "mean": 1.0, "sd": 0.0, "p50": 1.0},
        {"test": "b", "mean": 2.0, "sd": 0.0, "p50": 1.0},
    ]
    document = json.loads(to_json(report(body, samples=[[1.0, math.nan], [2.0]])))
    assert [row["samples"] for row in document["rows"]] == [[1.0, None], [2.0]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_drawn_table_with_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    drawn, plain = Terminal(), io.StringIO()
    body = [{"test": "tg8 [bold]", "mean": 5.0, "sd": 0.5, "p50": 2.0}]
    show(report(body, notes=["a note"]), out=drawn)
    show(report(body, notes=["a note"]), out=plain)
    for cell in ("tg8 [bold]", "5.00 ± 0.50", "2.0", "[red]x", "a note", "TTFT ms"):
        assert cell in drawn.getvalue()
        assert cell in plain.getvalue()
    assert drawn.getvalue() != plain.getvalue()


def test_a_narrow_terminal_gets_joined_cells_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    column = Column("TTFT ms", ("p50", "p90"), "{:.1f} / {:.1f}")
    narrow = Report(facts={}, columns=[column] * 3, rows=[{"p50": 1000.0, "p90": 2000.0}])
    lines: dict[str, list[str]] = {}
    for width in ("40", "60"):
        monkeypatch.setenv("COLUMNS", width)
        out = Terminal()
        show(narrow, out=out)
        lines[width] = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "1000.0 / 2000.0 1000.0 / 2000.0 1000.0 / 2000.0" in lines["60"]
    assert "1000.0 1000.0 1000.0" in lines["40"]
    assert "2000.0 2000.0 2000.0" in lines["40"]


def test_a_form_that_was_asked_for_wins_over_the_terminal() -> None:
    out = Terminal()
    show(report([{"test": "a", "mean": 1.0, "sd": 0.0, "p50": 1.0}]), "json", out)
    assert json.loads(out.getvalue())["rows"][0]["mean"] == 1.0

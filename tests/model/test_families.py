"""Every cell of docs/models.md's table of families and formats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from family_cells import FAMILIES, FORMATS, measure


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell(family: str, form: str, tmp_path: Path) -> None:
    measured = measure(family, form, tmp_path)
    assert measured.error < 1e-4
    # What is left is the rounding of activations to 8 bits; one wrong order, scale or offset costs over 0.1.
    assert measured.kl is None or measured.kl < 0.03


def test_the_document_names_these_cells() -> None:
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    _, _, rest = document.partition("<!-- cells: tools/family_table.py --write -->\n")
    rows = [row.strip("|\n ").split(" | ") for row in rest.partition("<!-- end of cells -->")[0].splitlines()]
    header, _, *body = rows
    assert header == ["format", *FAMILIES]
    assert [row[0] for row in body] == list(FORMATS)
    for row in body:
        assert len(row) == 1 + len(FAMILIES)
        for cell in row[1:]:
            figures = re.fullmatch(r"(\d\.\de-0\d)(?: · (0\.\d{4}))?", cell)
            assert figures, cell
            assert float(figures[1]) < 1e-4
            assert figures[2] is None or float(figures[2]) < 0.03

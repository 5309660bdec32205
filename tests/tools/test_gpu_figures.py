"""Figures survive a cut, and the table says what each is worth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from figures import H100, Figures, Gate, gates_table, read_figures
from throughput import BATCHED_PROMPTS, PROMPTS, figure_of

from edgellm.bench.workloads import Workload


def test_the_last_of_each_name_counts_and_a_cut_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    assert read_figures(path) == {}
    for value in (1.0, 2.5):
        Figures(path).add("a b", value)
    Figures(path).add("c", 3)
    with path.open("a") as file:
        file.write('{"figure": "c", "val')
    assert read_figures(path) == {"a b": 2.5, "c": 3}
    Figures().add("kept nowhere", 1)


@pytest.mark.parametrize(
    ("gate", "values"),
    [
        (Gate("f", 10, 20), {9.9: "MISSED", 10: "below the goal", 19.9: "below the goal", 20: "goal"}),
        (Gate("f", None, 20), {0: "below the goal", 20: "goal"}),
        (Gate("f", 10), {9.9: "MISSED", 10: "met"}),
        (Gate("f", 0, most=True), {0: "met", 1: "MISSED"}),
    ],
)
def test_verdicts(gate: Gate, values: dict[float, str]) -> None:
    assert {value: gate.verdict(value) for value in values} == values
    assert gate.verdict(None) == "not measured"
    assert gate.verdict(float("nan")) in ("MISSED", "below the goal")


def test_the_table_has_every_gate_whether_measured_or_not() -> None:
    table = gates_table({"qwen3-8b decode 1": 545.2, "real model mean KL": 0.00002})
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == len(H100)
    found = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert found["qwen3-8b decode 1"] == ["545 tok/s", "561", "620", "MISSED |"]
    assert found["real model mean KL"] == ["2e-05 nats", "≤ 0.001", "", "met |"]
    assert found["qwen3-8b prefill 4 × 2048"] == ["–", "", "25,000", "not measured |"]


def test_gates_are_of_figures_that_the_benchmark_measures() -> None:
    workloads = [Workload("tg", 128, 512, batch) for batch in (1, 8, 16)]
    workloads += [Workload("pp", tokens) for tokens in PROMPTS]
    workloads.append(Workload("pp", BATCHED_PROMPTS[1], 0, BATCHED_PROMPTS[0]))
    measured = {
        f"{model} {figure_of(workload, dependent=dependent)}"
        for model in ("qwen3-8b", "smollm2-135m")
        for workload in workloads
        for dependent in (True, False)
    }
    wanted = {gate.figure for gate in H100 if " decode " in gate.figure or " prefill " in gate.figure}
    assert wanted <= measured
    assert len(wanted) == 7

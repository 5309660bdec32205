"""The proof passes an executor that computes the model, and names the case where one does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import tiny_executor
from numpy.typing import NDArray
from tiny_llama import TINY

from edgellm.checkpoint import open_checkpoint
from edgellm.cli import main
from edgellm.doctor.proof import Case, prove
from edgellm.errors import UsageError
from edgellm.executor.base import Feedback, Result, Row, Step, Ticket
from edgellm.executor.cpu import CpuExecutor

SLOTS = 3
PROMPTS = [np.random.default_rng(i).integers(0, 265, 30 + i).astype(np.int32) for i in range(SLOTS)]


@pytest.fixture(scope="module")
def executors(tmp_path_factory: pytest.TempPathFactory) -> tuple[CpuExecutor, CpuExecutor]:
    """Of the same model: activations in 8 bits, and float32."""
    path = tmp_path_factory.mktemp("proof")
    tiny = TINY["3/1 heads of 64, tied"]
    checkpoint = open_checkpoint(tiny.write_gguf(path / "tiny.gguf", "Q4_1", "Q8_0"))
    fast = tiny_executor(checkpoint, path / "int8", compute="int8", slots=SLOTS)
    return fast, tiny_executor(checkpoint, path / "fp32", compute="fp32", slots=SLOTS)


class Faulty:
    """An executor with one fault."""

    def __init__(self, inner: CpuExecutor, fault: str) -> None:
        self._inner = inner
        self._fault = fault

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._inner.copy_prefix(2 if self._fault == "copies another slot" else source, target, length)

    def submit(self, step: Step) -> Ticket:
        rows = list(step.rows)
        if self._fault == "forgets where rows belong" and len(rows) > 1 and len(rows[0].tokens) == 1:
            rows = [
                Row(row.slot, row.past, other.tokens, row.want)
                for row, other in zip(rows, rows[::-1], strict=True)
            ]
        if self._fault == "feeds back another token" and isinstance(rows[0].tokens, Feedback):
            rows = [Row(rows[0].slot, rows[0].past, np.array([3], np.int32), rows[0].want)]
        return self._inner.submit(Step(rows, step.mask))

    def collect(self, ticket: Ticket) -> Result:
        result = self._inner.collect(ticket)
        if self._fault == "returns nothing" and result.logits is not None:
            logits: NDArray[np.float32] = np.full_like(result.logits, np.nan)
            return Result(result.token, result.logprob, result.top_ids, result.top_logprobs, logits)
        return result


def _cases(tested: object, reference: CpuExecutor) -> dict[str, Case]:
    return {case.name: case for case in prove(tested, reference, PROMPTS)}  # type: ignore[arg-type]


def test_an_executor_that_computes_the_model_passes(executors: tuple[CpuExecutor, CpuExecutor]) -> None:
    cases = _cases(*executors)
    assert all(case.passed for case in cases.values()), cases
    assert len(cases) == 9
    assert cases["token by token"].positions == 30
    assert cases["fed back on the device"].max_kl == 0


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        ("copies another slot", {"behind a copied prefix"}),
        ("forgets where rows belong", {"ragged batches", "mixed with a prompt"}),
        ("feeds back another token", {"fed back on the device"}),
        ("returns nothing", {"token by token", "whole prompts"}),
    ],
)
def test_a_fault_is_seen_where_it_is(
    fault: str, seen_in: set[str], executors: tuple[CpuExecutor, CpuExecutor]
) -> None:
    fast, exact = executors
    cases = _cases(Faulty(fast, fault), exact)
    failed = {name for name, case in cases.items() if not case.passed}
    assert seen_in <= failed
    if fault != "returns nothing":
        assert failed == seen_in


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Engine directories of a model, of one with other weights, and of one with another shape."""
    path = tmp_path_factory.mktemp("engines")
    tiny = TINY["3/1 heads of 64, tied"]
    tied = tiny.write_gguf(path / "tied.gguf")
    wrong = replace(tiny, seed=2).write_gguf(path / "wrong.gguf")
    other = TINY["qwen3, tied"].write_gguf(path / "other.gguf")
    sizes = ["--max-seq-len", "48", "--max-batch-size", "2", "--max-num-tokens", "32"]
    built = {}
    for name, file in (("right", tied), ("reference", tied), ("wrong", wrong), ("other", other)):
        built[name] = str(path / name)
        assert main(["build", str(file), "-o", built[name], "--compute", "fp32", *sizes]) == 0
    return built


@pytest.mark.parametrize(("engine", "code", "verdict"), [("right", 0, "passed"), ("wrong", 2, "FAILED")])
def test_the_command_prints_a_table(
    engine: str, code: int, verdict: str, engines: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert (
        main(["doctor", "--prove", "--engine", engines[engine], "--reference", engines["reference"]]) == code
    )
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 9
    # What an executor feeds back to itself is compared with itself.
    assert all(line.endswith(f"| {verdict} |") for line in table[2:-1])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prove"], "--prove compares --engine DIR with --reference DIR"),
        (["--engine", "{right}"], "go with --prove"),
        (["--prove", "--engine", "{right}", "--reference", "{other}"], "not engines of one model"),
        (["--prove", "--engine", "{right}", "--reference", "{reference}", "--length", "3"], "--length 3"),
    ],
)
def test_what_cannot_be_compared_is_said(
    flags: list[str], says: str, engines: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *(flag.format(**engines) for flag in flags)]) == UsageError.exit_code
    assert says in capsys.readouterr().err

"""The proof passes an executor that computes the model, and names the case where one does not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import tiny_executor
from numpy.typing import NDArray
from tiny_llama import TINY

from edgellm.checkpoint import open_checkpoint
from edgellm.cli import main
from edgellm.config import EngineConfig
from edgellm.doctor.proof import Case, prove
from edgellm.doctor.reference import compute_reference, log_softmax, read_reference
from edgellm.enginedir import open_engine
from edgellm.errors import EngineError, UsageError
from edgellm.executor.base import Feedback, Result, Row, Step, Ticket, Want
from edgellm.executor.cpu import CpuExecutor
from edgellm.executor.factory import make_executor
from edgellm.sampling import SamplingParams

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
    return {case.name: case for case in prove(tested, compute_reference(reference, PROMPTS))}  # type: ignore[arg-type]


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


@pytest.fixture(scope="module")
def recorded(engines: dict[str, str]) -> str:
    """A file of four texts of 20 tokens."""
    path = f"{engines['reference']}.npz"
    flags = ["--reference", engines["reference"], "--length", "20", "--seed", "5"]
    assert main(["doctor", "--record", path, *flags]) == 0
    return path


@pytest.mark.parametrize(("engine", "code", "verdict"), [("right", 0, "passed"), ("wrong", 2, "FAILED")])
def test_the_command_prints_a_table(
    engine: str,
    code: int,
    verdict: str,
    engines: dict[str, str],
    recorded: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    for reference in (engines["reference"], recorded):
        assert main(["doctor", "--prove", "--engine", engines[engine], "--reference", reference]) == code
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(table) == 2 + 9
        # What an executor feeds back to itself is compared with itself.
        assert all(line.endswith(f"| {verdict} |") for line in table[2:-1])


def test_a_recorded_reference_says_what_the_engine_says(recorded: str, engines: dict[str, str]) -> None:
    reference, spec = read_reference(Path(recorded))
    directory = open_engine(Path(engines["reference"]))
    assert spec == directory.spec
    assert reference.seed == 5
    assert [len(text) for text in reference.texts] == [20] * 4
    executor = make_executor(directory, EngineConfig())
    executor.load(lambda _part, _done: None)
    executor.bind(0, SamplingParams(temperature=0.0), np.empty(0, np.int32))
    text = reference.texts[3]
    result = executor.collect(executor.submit(Step([Row(0, 0, text, Want.LOGITS)])))
    executor.close()
    assert result.logits is not None
    expected = log_softmax(result.logits[0])
    np.testing.assert_allclose(reference.at(3, 19).astype(np.float64), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "text", "other arrays", "shorter", "missing"])
def test_a_file_that_is_no_reference_is_said(damage: str, recorded: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    raw = Path(recorded).read_bytes()
    if damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "text":
        path.write_text("logits")
    elif damage == "other arrays":
        np.savez(path, tokens=np.zeros(3))
    elif damage == "shorter":
        with np.load(recorded) as file:
            arrays = dict(file)
        np.savez(path, **{**arrays, "logprobs": arrays["logprobs"][:-1]})
    with pytest.raises(EngineError, match=re.escape(str(path))):
        read_reference(path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prove"], "--prove compares --engine DIR with --reference PATH"),
        (["--engine", "{right}"], "go with --prove"),
        (["--prove", "--engine", "{right}", "--reference", "{other}"], "not of one model"),
        (
            ["--prove", "--engine", "{right}", "--reference", "{recorded}", "--seed", "3"],
            "--length and --seed",
        ),
        (["--record", "{right}.npz"], "--record FILE writes what --reference DIR says"),
        (["--record", "{right}", "--reference", "{reference}"], "Is a directory"),
        (["--record", "x", "--prove"], "are two commands"),
        (["--prove", "--engine", "{right}", "--reference", "{reference}", "--length", "3"], "--length 3"),
    ],
)
def test_what_cannot_be_compared_is_said(
    flags: list[str], says: str, engines: dict[str, str], recorded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["doctor", *(flag.format(**engines, recorded=recorded) for flag in flags)])
        == UsageError.exit_code
    )
    assert says in capsys.readouterr().err

"""What does not fit is refused before anything is loaded: for good, or for now."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from footprints import footprint
from ggufs import Llama

from edgellm.cli import main
from edgellm.errors import ConfigError, EngineError, TemporaryShortage
from edgellm.executor.base import MemoryReport
from edgellm.memory.budget import Budget
from edgellm.memory.plan import Line, Plan, Shape, make_plan
from edgellm.memory.promise import compare, require_fit

MIB = 1 << 20
SHAPE = Shape(4, 1024, 256)
BUILT = Shape(8, 2048, 256)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    Llama().write(directory / "tiny.gguf")
    assert main(["build", str(directory / "tiny.gguf"), "-o", str(directory / "engine")]) == 0
    return directory / "engine"


def board(root: Path, *, total: int, available: int) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\n"
    )
    return root


def serve(engine: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter; its last line says whether onnxruntime was imported."""
    arguments = ["serve", str(engine), "--endpoint", f"ipc://{engine.parent}/e.sock"]
    for setting in settings:
        arguments += ["--set", setting]
    code = (
        "import sys\nfrom edgellm.cli import main\ncode = main(sys.argv[1:])\n"
        "print('onnxruntime' in sys.modules)\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("budget", "kind"),
    [
        (Budget(2 << 30, ever=4 << 30, text="auto", automatic=True), None),
        (Budget(100 * MIB, ever=4 << 30, text="auto", automatic=True), TemporaryShortage),
        (Budget(100 * MIB, ever=200 * MIB, text="auto", automatic=True), ConfigError),
        (Budget(400 * MIB, ever=400 * MIB, text="memory.budget = 400MiB", automatic=False), ConfigError),
        (Budget(400 * MIB, ever=None, text="memory.budget = 400MiB", automatic=False), ConfigError),
        (Budget(2 << 30, ever=400 * MIB, text="memory.budget = 2GiB", automatic=False), ConfigError),
        (Budget(470 * MIB, ever=470 * MIB, text="memory.budget = 470MiB", automatic=False), None),
    ],
)
def test_never_or_not_now(budget: Budget, kind: type[Exception] | None) -> None:
    model = footprint()
    plan = make_plan(model, SHAPE, budget.bytes)
    if kind is None:
        require_fit(plan, budget, model, BUILT)
    else:
        with pytest.raises(kind):
            require_fit(plan, budget, model, BUILT)


def test_the_message_has_the_lines_the_knob_and_what_fits() -> None:
    model = footprint()
    budget = Budget(400 * MIB, ever=400 * MIB, text="memory.budget = 400MiB", automatic=False)
    plan = make_plan(model, SHAPE, budget.bytes)
    with pytest.raises(ConfigError) as refused:
        require_fit(plan, budget, model, BUILT)
    text = str(refused.value)
    assert "4 slots of 1024 tokens take" in text
    assert "memory.budget = 400MiB" in text
    assert all(line.name in text for line in plan.lines)
    assert "engine.max_batch_size × engine.max_seq_len: 1 × 2048, 2 × 1" in text
    assert "\n" not in text


def test_nothing_fits_a_budget_below_the_process() -> None:
    model = footprint()
    budget = Budget(50 * MIB, ever=50 * MIB, text="memory.budget = 50MiB", automatic=False)
    with pytest.raises(ConfigError, match="Nothing of this engine fits: one slot of 2 tokens takes"):
        require_fit(make_plan(model, SHAPE, budget.bytes), budget, model, BUILT)


def test_serve_exits_78_for_what_can_never_fit(engine: Path) -> None:
    done = serve(engine, "memory.budget=40MiB")
    assert done.returncode == 78, done.stderr
    assert "memory.budget = 40MiB" in done.stderr
    assert done.stdout == "False\n"
    assert "Traceback" not in done.stderr


def test_serve_exits_75_when_too_little_is_free_now(engine: Path, tmp_path: Path) -> None:
    root = board(tmp_path / "busy", total=4 << 30, available=300 * MIB)
    done = serve(engine, f"sensors.root={root}")
    assert done.returncode == 75, done.stderr
    assert "there may be 44.0 MiB now (memory.budget = auto: MemAvailable 300.0 MiB" in done.stderr
    assert done.stdout == "False\n"


def test_serve_exits_78_on_a_board_that_is_too_small(engine: Path, tmp_path: Path) -> None:
    root = board(tmp_path / "small", total=300 * MIB, available=299 * MIB)
    assert serve(engine, f"sensors.root={root}").returncode == 78


def test_an_engine_that_does_not_say_what_it_weighs(engine: Path, tmp_path: Path) -> None:
    from msgspec.structs import replace

    from edgellm.config import Config
    from edgellm.enginedir import EngineDir, open_engine
    from edgellm.memory.promise import MemoryPromise

    opened = open_engine(engine)
    config = replace(opened.config, edgellm=replace(opened.config.edgellm, weights=()))
    with pytest.raises(EngineError, match="build the engine again"):
        MemoryPromise(EngineDir(engine, config), Config())


@pytest.mark.parametrize(
    ("resident", "level"), [(1049, logging.INFO), (951, logging.INFO), (1060, logging.WARNING)]
)
def test_plan_and_fact_are_compared(resident: int, level: int, caplog: pytest.LogCaptureFixture) -> None:
    lines = (
        Line("weights 4-bit", 500 * MIB, ""),
        Line("weights 8-bit", 100 * MIB, ""),
        Line("kv_cache", 400 * MIB, ""),
        Line("embedding", 50 * MIB, "", "mapped"),
    )
    budget = Budget(2 << 30, ever=None, text="memory.budget = 2GiB", automatic=False)
    with caplog.at_level(logging.DEBUG, logger="edgellm.memory.promise"):
        compare(
            Plan(SHAPE, lines, budget.bytes),
            budget,
            MemoryReport({"weights": 610 * MIB, "kv_cache": 400 * MIB}),
            resident * MIB,
        )
    *parts, total = caplog.records
    assert [(part.levelno, part.getMessage()) for part in parts] == [
        (logging.DEBUG, "memory: weights 610.0 MiB, planned 600.0 MiB"),
        (logging.DEBUG, "memory: kv_cache 400.0 MiB, planned 400.0 MiB"),
    ]
    assert total.levelno == level
    assert f"{resident / 10 - 100:+.1f} %" in total.getMessage()
    assert "at most 1.03 GiB of 2.00 GiB, memory.budget = 2GiB" in total.getMessage()

"""What is measured on a GPU, without one: every step's command exists, and a failure of one ends no other."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


from measure_gpu import (
    LARGE,
    MODELS,
    SHORTEST_S,
    TOOLS,
    Measurement,
    Options,
    Step,
    environment_with,
    steps_of,
)

sys.path.insert(0, str(TOOLS / "gpu"))

from figures import Figures
from limited import Outcome, Say

from edgellm.cuda import driver
from edgellm.errors import DeviceError


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "engines")


class Runs:
    """Runs nothing, and says what it is told to say.

    Attributes:
        outcomes: by the end of a command's script; what is not there passes.
        limits: that each command got, by its script.
        engines: may be waited for; building ends when it is set.
    """

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.limits: list[tuple[str, float]] = []
        self.environments: list[Mapping[str, str]] = []
        self.engines = threading.Event()
        self.engines.set()

    def __call__(
        self, command: Sequence[str], *, limit_s: float, say: Say, environment: Mapping[str, str]
    ) -> Outcome:
        name = Path(command[1]).stem
        if name == "random_engines":
            self.engines.wait()
        self.limits.append((name, limit_s))
        self.environments.append(environment)
        outcome = self.outcomes.get(name, Outcome(0, [f"{name} says"], 2.0))
        for line in outcome.lines:
            say(line)
        return outcome


def measure(options: Options, runs: Runs, steps: Sequence[Step], budget_s: float = 1000) -> tuple[bool, str]:
    measurement = Measurement(options, {"A": "b"}, budget_s=budget_s, say=lambda _line: None, run=runs)
    good = measurement.run(steps)
    return good, (options.output / "summary.md").read_text()


STEPS = [Step("one", ("one.py",), 60), Step("two", ("two.py", "--x"), 60), Step("three", ("three.py",), 60)]


def test_every_step_has_a_file_and_a_line(options: Options) -> None:
    runs = Runs()
    good, summary = measure(options, runs, STEPS)
    assert good
    assert [(options.output / f"{step.name}.txt").read_text() for step in STEPS] == [
        "one says\n",
        "two says\n",
        "three says\n",
    ]
    assert [line for line in summary.splitlines() if line.endswith("| passed | 2 |")] == [
        "| one | passed | 2 |",
        "| two | passed | 2 |",
        "| three | passed | 2 |",
    ]
    assert runs.environments == [{"A": "b"}] * 3


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [(Outcome(3, ["oh"], 1.0), "FAILED (3)"), (Outcome(None, ["half"], 60.0), "ran out of time")],
)
def test_a_step_that_fails_ends_no_other(options: Options, outcome: Outcome, verdict: str) -> None:
    good, summary = measure(options, Runs(one=outcome), STEPS)
    assert not good
    assert f"| one | {verdict} |" in summary
    assert "| three | passed |" in summary


def test_figures_stand_beside_what_they_are_to_reach(options: Options) -> None:
    options.output.mkdir()
    Figures(options.figures).add("qwen3-8b decode 1", 545)
    _, summary = measure(options, Runs(), STEPS[:1])
    assert "| qwen3-8b decode 1 | 545 tok/s | 561 | 620 | MISSED |" in summary


def test_the_summary_is_there_from_the_first_step_on(options: Options) -> None:
    seen = []

    class Looks(Runs):
        def __call__(self, *arguments: Sequence[str], **options_: object) -> Outcome:
            seen.append((options.output / "summary.md").read_text().count("| passed |"))
            return Outcome(0, [], 1.0)

    measure(options, Looks(), STEPS)
    assert seen == [0, 1, 2]


def test_no_step_gets_more_than_is_left_of_the_budget(options: Options) -> None:
    runs = Runs()
    measure(options, runs, STEPS[:1], budget_s=SHORTEST_S + 5)
    ((_, limit),) = runs.limits
    assert SHORTEST_S < limit <= SHORTEST_S + 5
    good, summary = measure(options, runs, STEPS, budget_s=SHORTEST_S / 2)
    assert not good
    assert summary.count("not run: no time was left") == 3


def test_steps_wait_for_the_engines_that_they_need(options: Options) -> None:
    runs = Runs()
    runs.engines.clear()
    threading.Timer(0.2, runs.engines.set).start()
    steps = [STEPS[0], replace(STEPS[1], engines=True), STEPS[2]]
    assert measure(options, runs, steps)[0]
    assert [name for name, _ in runs.limits] == ["one", "random_engines", "two", "three"]
    assert (options.output / "engines.txt").read_text() == "random_engines says\n"


def test_without_engines_the_others_are_run(options: Options) -> None:
    steps = [replace(STEPS[0], engines=True), STEPS[1]]
    good, summary = measure(options, Runs(random_engines=Outcome(1, ["no"], 1.0)), steps)
    assert not good
    assert "| one | not run: its engines could not be built, see engines.txt | 0 |" in summary
    assert "| two | passed |" in summary


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("checkpoint", [None, Path("/models/m.gguf")])
def test_every_steps_command_is_one(
    large: bool, checkpoint: Path | None, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags are known, up to where a device would be opened."""

    def load() -> object:
        raise DeviceError("there is none")

    monkeypatch.setattr(driver, "load_driver", load)
    asked = replace(options, checkpoint=checkpoint, large=large, seed=5, references=Path("/references"))
    steps = steps_of(asked)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        script, *flags = step.command
        assert Path(script).parent in (TOOLS, TOOLS / "gpu")
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, "argv", [script, *flags])
        for name in ("prove", "Neighbour"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _refuses)
        try:
            code = module.main()
        except DeviceError:
            continue
        assert code not in (0, 2), (step.name, flags)
        assert (LARGE in " ".join(flags)) <= large


def test_wheels_are_found_before_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setenv("PYTHONPATH", "/mine")
    (tmp_path / "a.whl").touch()
    found = environment_with(tmp_path, tmp_path / "out", lambda command, check: commands.append(command))
    assert found == {"PYTHONPATH": f"{tmp_path}/out/site:{TOOLS.parent}:/mine"}
    assert commands[0][-1] == str(tmp_path / "a.whl")
    assert "--no-index" in commands[0]
    assert environment_with(None, tmp_path)["PYTHONPATH"] == f"{TOOLS.parent}:/mine"
    assert MODELS[0] == LARGE


def _refuses(*_arguments: object, **_options: object) -> object:
    raise DeviceError("there is none")

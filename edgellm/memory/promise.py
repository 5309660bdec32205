"""The daemon's promise: what it will take is checked before it loads, and compared with fact afterwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from edgellm.config import Config
from edgellm.enginedir import EngineDir
from edgellm.errors import ConfigError, TemporaryShortage
from edgellm.executor.base import MemoryReport
from edgellm.executor.factory import shape_of, threads_of
from edgellm.memory.budget import Budget, find_budget
from edgellm.memory.footprints import footprint_of
from edgellm.memory.plan import Footprint, Plan, Shape, frontier, make_plan
from edgellm.memory.resident import give_back_freed, lock_memory, resident_size
from edgellm.memory.sizes import show_size

log = logging.getLogger(__name__)

TOLERANCE: Final = 0.05
"""Of the plan; more than this beside it is worth a warning."""


class MemoryPromise:
    """What one daemon may take.

    Raises:
        EngineError: the engine does not say what its weights are.
        ConfigError: `engine.*` asks for more than was built, or `auto` cannot be read.
    """

    def __init__(self, directory: EngineDir, config: Config) -> None:
        self._directory = directory
        self._lock = config.memory.lock
        self._footprint = footprint_of(
            directory,
            threads=threads_of(config.engine),
            server=config.server,
            root=Path(config.sensors.root),
        )
        self._budget = find_budget(config.memory, Path(config.sensors.root))
        self._plan = make_plan(self._footprint, shape_of(directory, config.engine), self._budget.bytes)

    def require(self) -> None:
        """See that the plan fits the budget.

        Raises:
            ConfigError: it can never fit.
            TemporaryShortage: it does not fit what is free now.
        """
        build = self._directory.build
        require_fit(
            self._plan,
            self._budget,
            self._footprint,
            Shape(build.max_batch_size, build.max_seq_len, build.max_num_tokens),
        )

    def keep(self, report: MemoryReport) -> None:
        """After loading: give back what loading left, lock the rest if so configured, compare with the plan.

        Raises:
            ConfigError: `memory.lock` is set, and locking is not allowed.
        """
        give_back_freed()
        if self._lock:
            lock_memory()
        compare(self._plan, self._budget, report, resident_size())


def require_fit(plan: Plan, budget: Budget, footprint: Footprint, most: Shape) -> None:
    """Refuse a plan that exceeds the budget, saying what would fit within `most`.

    Raises:
        ConfigError: it can never fit.
        TemporaryShortage: it does not fit what is free now.
    """
    if kind := refusal(plan, budget):
        allowed = budget.bytes if kind is TemporaryShortage or budget.ever is None else budget.ever
        raise kind(_explanation(plan, budget, allowed, footprint, most))


def refusal(plan: Plan, budget: Budget) -> type[ConfigError] | type[TemporaryShortage] | None:
    """The kind of error that a plan is for a budget: it can never fit, or not now; None: it fits."""
    if budget.ever is not None and plan.total > budget.ever:
        return ConfigError
    if plan.total > budget.bytes:
        return TemporaryShortage if budget.automatic else ConfigError
    return None


def compare(plan: Plan, budget: Budget, report: MemoryReport, resident: int) -> None:
    """Log the plan against fact: a line in all, and at debug one for each part that the executor measured."""
    planned = {line.name: line.bytes for line in plan.lines}
    for part, measured in report.lines.items():
        # `weights` stands for all lines that begin so, and for the graph that holds them.
        size = sum(each for name, each in planned.items() if name.split()[0] == part)
        log.debug("memory: %s %s, planned %s", part, show_size(measured), show_size(size))
    # What the driver maps, device memory and page-locked, is no part of the resident set.
    expected = sum(line.bytes for line in plan.lines if line.kind == "resident")
    difference = resident / expected - 1
    log.log(
        logging.INFO if abs(difference) <= TOLERANCE else logging.WARNING,
        "memory: %s resident, planned %s (%+.1f %%); at most %s of %s, %s",
        show_size(resident),
        show_size(expected),
        100 * difference,
        show_size(plan.total),
        show_size(budget.bytes),
        budget.text,
    )


def _explanation(plan: Plan, budget: Budget, allowed: int, footprint: Footprint, most: Shape) -> str:
    shape = plan.shape
    lines = ", ".join(f"{line.name} {show_size(line.bytes)}" for line in plan.lines)
    fitting = frontier(
        footprint,
        budget=allowed,
        longest=most.max_seq_len,
        max_num_tokens=shape.max_num_tokens,
        batches=_batches(most.max_batch_size),
    )
    now = " now" if budget.automatic and allowed == budget.bytes else ""
    return (
        f"{shape.max_batch_size} slots of {shape.max_seq_len} tokens take {show_size(plan.total)}, and there "
        f"may be {show_size(allowed)}{now} ({budget.text}). Parts: {lines}. {_remedy(fitting, footprint)}"
    )


def _remedy(fitting: Sequence[Shape], footprint: Footprint) -> str:
    if not fitting:
        least = make_plan(footprint, Shape(1, 2, 1)).total
        return (
            f"Nothing of this engine fits: one slot of 2 tokens takes {show_size(least)}. "
            "Raise memory.budget or free memory"
        )
    shapes = ", ".join(f"{each.max_batch_size} × {each.max_seq_len}" for each in fitting)
    return (
        f"What fits, engine.max_batch_size × engine.max_seq_len: {shapes}. Lower these, or raise "
        "memory.budget or free memory; `edgellm plan` shows how it adds up"
    )


def _batches(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < most]
    return [*powers, most]

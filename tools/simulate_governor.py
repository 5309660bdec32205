#!/usr/bin/env python3
"""The governor in a closed loop: the real policy against a thermal model, with a fake clock.

    tools/simulate_governor.py [--hours 3] [--seed 0] [--scenario NAME …] [--random N] [--png FILE]

The plant has two nodes, junction and heatsink:

    Cj·dTj/dt = P − (Tj − Th)/Rjs          Ch·dTh/dt = (Tj − Th)/Rjs − (Th − Ta)/Rha(t)
    P = idle + leak·(Tj − 25 °C) + neighbour(t) + demand(t)·duty·(step + row·rows)

and makes duty·rows / (t0 + t1·rows) tokens a second. The sensor lags by a first-order second, has Gaussian
noise, and is read once a second. All figures in the table are of the true junction temperature.

The rival is the best *constant* (cap, duty), chosen with knowledge of the whole scenario: the one that makes
the most tokens and never lets the true temperature above the governor's own target. The model is linear in
the duty, so the largest duty for each cap follows from two runs, and no search is needed. The rival knows of
heat alone.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.governor.causes import MEBIBYTE, Settings, State
from edgellm.governor.config import GovernorConfig
from edgellm.governor.platform import ORIN_CRITICAL_C, ORIN_PASSIVE_C
from edgellm.governor.policy import PolicyState, step
from edgellm.governor.sensors import Memory, Readings, Zone

Profile = Callable[[float], float]
SUBSTEPS = 4
"""Euler steps a second: the fastest time constant is about 3 s."""
WARM_UP_S = 3600.0
"""Transitions are counted after this: what is promised is for the steady state."""
SENSOR_LAG_S = 1.0


def always(value: float) -> Profile:
    """A profile that does not change."""
    return lambda _: value


def between(begin: float, end: float, inside: float, outside: float) -> Profile:
    """One value from `begin` to `end`, in seconds, another before and after."""
    return lambda t: inside if begin <= t < end else outside


def every(period: float, on: float, high: float, low: float) -> Profile:
    """`high` for the first `on` seconds of every period."""
    return lambda t: high if t % period < on else low


def ramp(duration: float, first: float, last: float) -> Profile:
    """From one value to another in `duration` seconds, then the other."""
    return lambda t: first + (last - first) * min(1.0, t / duration)


@dataclass(frozen=True)
class Plant:
    """A board in its box. Temperatures °C, powers W, resistances K/W, capacities J/K.

    Attributes:
        idle, leak: power without a model running, and what it gains per °C of the junction above 25.
        step, row: power of running steps back to back, and what each row adds.
        t0, t1: seconds of a step, and what each row adds.
    """

    idle: float
    leak: float
    step: float
    row: float
    t0: float
    t1: float
    junction_sink: float
    sink_ambient: float
    junction_capacity: float
    sink_capacity: float

    def power(self, rows: int) -> float:
        """Watts above idle at duty 1."""
        return self.step + self.row * rows

    def rate(self, rows: int) -> float:
        """Tokens a second at duty 1."""
        return rows / (self.t0 + self.t1 * rows)

    def advance(
        self, junction: float, sink: float, watts: float, ambient: float, resistance: float
    ) -> tuple[float, float]:
        """One second; `watts` without leakage, `resistance` sink to ambient."""
        dt = 1.0 / SUBSTEPS
        for _ in range(SUBSTEPS):
            flow = (junction - sink) / self.junction_sink
            heat = watts + self.leak * (junction - 25.0)
            junction += dt * (heat - flow) / self.junction_capacity
            sink += dt * (flow - (sink - ambient) / resistance) / self.sink_capacity
        return junction, sink


# Orders of magnitude of an AGX Orin with its fan at 50 W, and of an Orin NX on a cold plate at 20 W.
FAN = Plant(8.0, 0.06, 30.0, 0.2, 0.030, 0.0005, 0.30, 0.60, 15.0, 350.0)
FANLESS = Plant(5.0, 0.03, 13.0, 0.1, 0.045, 0.0008, 0.60, 2.4, 8.0, 450.0)
BATCH_HEATS = Plant(5.0, 0.03, 6.0, 1.2, 0.045, 0.0008, 0.60, 2.4, 8.0, 450.0)


@dataclass(frozen=True)
class Scenario:
    """What happens to a plant.

    Attributes:
        name: shown in the table.
        ambient, neighbour, demand: °C; W of another load on the same chip; share of time in which there is
            something to run.
        airflow: factor on the resistance from sink to ambient.
        available: MiB of available memory.
        blind: when no zone is readable.
        soak: whether the box begins at idle equilibrium, rather than at ambient temperature.
    """

    name: str
    plant: Plant
    ambient: Profile
    neighbour: Profile = field(default_factory=lambda: always(0.0))
    demand: Profile = field(default_factory=lambda: always(1.0))
    airflow: Profile = field(default_factory=lambda: always(1.0))
    available: Profile = field(default_factory=lambda: always(4096.0))
    blind: Profile = field(default_factory=lambda: always(0.0))
    soak: bool = True


def _shrinking(t: float) -> float:
    """Another process grows from 4,000 s on, is ended at 5,000 s."""
    if 4000 <= t < 4500:
        return 400.0
    return 200.0 if 4500 <= t < 5000 else 4096.0


SCENARIOS = (
    Scenario("fan, 25 °C", FAN, always(25.0)),
    Scenario("fan, 55 °C", FAN, always(55.0)),
    Scenario("fan, 70 °C", FAN, always(70.0)),
    Scenario("fanless, 25 °C", FANLESS, always(25.0)),
    Scenario("fanless, 45 °C", FANLESS, always(45.0)),
    Scenario("fanless, 60 °C", FANLESS, always(60.0)),
    Scenario("fanless, 70 °C", FANLESS, always(70.0)),
    Scenario("power grows with batch, 50 °C", BATCH_HEATS, always(50.0)),
    Scenario("cold start at −20 °C, sun to 60 °C", FANLESS, ramp(3600.0, -20.0, 60.0), soak=False),
    Scenario("neighbour 15 W, 5 of 15 min", FAN, always(55.0), neighbour=every(900.0, 300.0, 15.0, 0.0)),
    Scenario("fan blocked for 45 min", FAN, always(40.0), airflow=between(2700.0, 5400.0, 2.2, 1.0)),
    Scenario("bursts, 40 of 120 s", FANLESS, always(60.0), demand=every(120.0, 40.0, 1.0, 0.0)),
    Scenario("no zone readable for 10 min", FANLESS, always(45.0), blind=between(4000.0, 4600.0, 1.0, 0.0)),
    Scenario("memory 400, then 200 MiB", FAN, always(40.0), available=_shrinking),
)


def random_scenario(number: int) -> Scenario:
    """A box nobody chose: any power, resistances, capacities and ambient within reason; every other one has a
    neighbour that comes and goes. The number is its seed."""
    draw = random.Random(number)
    watts = draw.uniform(8.0, 50.0)
    share = min(1.0, 25.0 / watts)  # a stronger board comes with a better cooler
    plant = Plant(
        idle=draw.uniform(3.0, 12.0),
        leak=draw.uniform(0.0, 0.05),
        step=watts,
        row=draw.uniform(0.0, watts / 10.0),
        t0=0.04,
        t1=draw.uniform(0.0003, 0.01),
        junction_sink=share * draw.uniform(0.1, 0.7),
        sink_ambient=share * draw.uniform(0.3, 3.0),
        junction_capacity=draw.uniform(4.0, 25.0),
        sink_capacity=draw.uniform(100.0, 900.0),
    )
    ambient = draw.uniform(25.0, 70.0)
    neighbour = always(0.0)
    if number % 2:
        period = draw.uniform(200.0, 1500.0)
        neighbour = every(period, draw.uniform(0.1, 0.5) * period, draw.uniform(0.1, 0.4) * watts, 0.0)
    return Scenario(f"random {number}, {ambient:.0f} °C", plant, always(ambient), neighbour=neighbour)


@dataclass
class Trace:
    """A run, one entry a second: °C, W and so on as in the Decision."""

    junction: NDArray[np.float64]
    duty: NDArray[np.float64]
    cap: NDArray[np.int64]
    state: NDArray[np.int64]
    tokens: NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """A scenario's line in the table. `share` is None where no constant keeps the margin."""

    name: str
    seconds_above: int
    peak: float
    above_target: float
    transitions_per_hour: float
    worst: State
    mean_duty: float
    rival: tuple[int, float] | None
    share: float | None
    idle_allows: bool


def run(scenario: Scenario, settings: Settings, *, seconds: int, seed: int) -> Trace:
    """The policy in the loop."""
    noise = random.Random(seed)
    plant = scenario.plant
    junction, sink = _begin(scenario)
    felt = junction
    memory = PolicyState()
    trace = Trace(*(np.zeros(seconds) for _ in range(5)))  # type: ignore[arg-type]
    for t in range(seconds):
        readings = _sense(scenario, felt + noise.gauss(0.0, 0.4), float(t))
        memory, decision = step(settings, memory, readings, float(t))
        rows, demand = decision.batch_cap, scenario.demand(t)
        running = demand * decision.duty if rows else 0.0
        watts = plant.idle + scenario.neighbour(t) + running * plant.power(rows)
        junction, sink = plant.advance(
            junction, sink, watts, scenario.ambient(t), plant.sink_ambient * scenario.airflow(t)
        )
        felt += (junction - felt) * (1.0 - math.exp(-1.0 / SENSOR_LAG_S))
        trace.junction[t], trace.duty[t], trace.cap[t] = junction, decision.duty, rows
        trace.state[t] = decision.state
        trace.tokens[t] = running * plant.rate(rows) if rows else 0.0
    return trace


def _sense(scenario: Scenario, celsius: float, t: float) -> Readings:
    # Jetson's zones resolve 1/32 °C.
    known = None if scenario.blind(t) else round(celsius * 32) / 32
    return Readings(
        at=t,
        zones=(Zone("tj-thermal", known, ORIN_PASSIVE_C, ORIN_CRITICAL_C),),
        memory=Memory(available=int(scenario.available(t)) * MEBIBYTE),
    )


def _begin(scenario: Scenario) -> tuple[float, float]:
    ambient = scenario.ambient(0.0)
    if not scenario.soak:
        return ambient, ambient
    junction = sink = ambient
    for _ in range(7200):
        resistance = scenario.plant.sink_ambient * scenario.airflow(0.0)
        junction, sink = scenario.plant.advance(junction, sink, scenario.plant.idle, ambient, resistance)
    return junction, sink


def open_loop(scenario: Scenario, seconds: int, watts: float) -> NDArray[np.float64]:
    """Junction temperature, °C, with `watts` times the demand on top of idle and neighbour."""
    plant = scenario.plant
    junction, sink = _begin(scenario)
    out = np.empty(seconds)
    for t in range(seconds):
        power = plant.idle + scenario.neighbour(t) + watts * scenario.demand(t)
        junction, sink = plant.advance(
            junction, sink, power, scenario.ambient(t), plant.sink_ambient * scenario.airflow(t)
        )
        out[t] = junction
    return out


def best_constant(
    scenario: Scenario, slots: int, seconds: int, line: float
) -> tuple[tuple[int, float] | None, NDArray[np.float64]]:
    """The (cap, duty) with the most tokens whose true temperature never passes `line`, and the idle curve."""
    idle = open_loop(scenario, seconds, 0.0)
    per_watt = open_loop(scenario, seconds, 1.0) - idle
    heated = per_watt > 1e-9
    if bool((idle > line).any()):
        return None, idle
    best: tuple[int, float] | None = None
    for cap in range(1, slots + 1):
        power = scenario.plant.power(cap)
        duty = min(1.0, float(((line - idle[heated]) / (power * per_watt[heated])).min()))
        if best is None or duty * scenario.plant.rate(cap) > best[1] * scenario.plant.rate(best[0]):
            best = (cap, duty)
    return best, idle


def assess(
    scenario: Scenario, config: GovernorConfig, *, slots: int = 8, seconds: int = 10_800, seed: int = 0
) -> tuple[Outcome, Trace]:
    """Run a scenario and compare."""
    settings = Settings(slots=slots, governor=config, required=("tj",), thermal=True)
    trace = run(scenario, settings, seconds=seconds, seed=seed)
    line = ORIN_PASSIVE_C - config.target_below_c
    rival, idle = best_constant(scenario, slots, seconds, line)
    share = None
    if rival is not None:
        demand = sum(scenario.demand(t) for t in range(seconds))
        share = float(trace.tokens.sum()) / (rival[1] * scenario.plant.rate(rival[0]) * demand)
    counted = trace.state[min(int(WARM_UP_S), seconds // 2) :]
    outcome = Outcome(
        name=scenario.name,
        seconds_above=int((trace.junction >= ORIN_PASSIVE_C).sum()),
        peak=float(trace.junction.max()),
        above_target=float(np.percentile(trace.junction, 99)) - line,
        transitions_per_hour=float((np.diff(counted) != 0).sum()) * 3600.0 / len(counted),
        worst=State(int(trace.state.max())),
        mean_duty=float(trace.duty.mean()),
        rival=rival,
        share=share,
        idle_allows=bool((idle < ORIN_PASSIVE_C).all()),
    )
    return outcome, trace


HEADER = (
    "| scenario | s above trip | peak °C | 99 % vs target | transitions/h | worst state | mean duty "
    "| best constant | tokens vs it |\n|---|---|---|---|---|---|---|---|---|"
)


def line_of(outcome: Outcome) -> str:
    """The outcome as a line of the table, in Markdown."""
    rival = "–" if outcome.rival is None else f"cap {outcome.rival[0]}, duty {outcome.rival[1]:.2f}"
    share = "–" if outcome.share is None else f"{100 * outcome.share:.0f} %"
    return (
        f"| {outcome.name} | {outcome.seconds_above} | {outcome.peak:.1f} | {outcome.above_target:+.1f} °C "
        f"| {outcome.transitions_per_hour:.1f} | {outcome.worst.name} | {outcome.mean_duty:.2f} "
        f"| {rival} | {share} |"
    )


def draw(traces: dict[str, Trace], config: GovernorConfig, path: Path) -> None:
    """Temperature, duty, cap and throughput of each run over time. Needs matplotlib (the extra `report`)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    columns = 3
    rows = math.ceil(len(traces) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(12, 2.3 * rows), squeeze=False, sharex=True)
    for axis in grid.flat[len(traces) :]:
        axis.axis("off")
    for axis, (name, trace) in zip(grid.flat, traces.items(), strict=False):
        minutes = np.arange(0, len(trace.duty), 10) / 60
        axis.plot(minutes, trace.junction[::10], color="tab:red", linewidth=0.9)
        axis.axhline(ORIN_PASSIVE_C, color="black", linewidth=0.7)
        axis.axhline(ORIN_PASSIVE_C - config.target_below_c, color="gray", linewidth=0.7, linestyle=":")
        axis.set_title(name, fontsize=9)
        axis.set_ylim(min(40.0, float(trace.junction.min()) - 2), 105)
        axis.tick_params(labelsize=7)
        other = axis.twinx()
        other.fill_between(minutes, trace.duty[::10], color="tab:blue", alpha=0.25, linewidth=0, step="post")
        other.plot(minutes, trace.cap[::10] / max(1, trace.cap.max()), color="tab:green", linewidth=0.7)
        minute = np.convolve(trace.tokens, np.ones(60) / 60, mode="same")[::10]
        other.plot(minutes, minute / max(1e-9, minute.max()), color="tab:purple", linewidth=0.7)
        other.set_ylim(0, 1.02)
        other.tick_params(labelsize=7)
    figure.suptitle(
        "junction °C (red; line: passive trip, dotted: target), duty (blue), "
        "batch cap as a share of the slots (green), tokens as a share of the most (purple), over minutes",
        fontsize=9,
    )
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=80)
    plt.close(figure)
    # Few colours: a third of the size, and nothing that a reader would miss.
    Image.open(picture).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> int:
    """Print the table, and draw if asked to; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", action="append", help="part of a name; may be repeated; default: all")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random boxes as well")
    parser.add_argument("--png", type=Path, help="draw into this file")
    arguments = parser.parse_args()
    config = GovernorConfig()
    traces: dict[str, Trace] = {}
    missed = False
    print(HEADER)
    for scenario in (*SCENARIOS, *map(random_scenario, range(arguments.random))):
        if arguments.scenario and not any(part in scenario.name for part in arguments.scenario):
            continue
        outcome, trace = assess(scenario, config, seconds=int(arguments.hours * 3600), seed=arguments.seed)
        traces[scenario.name] = trace
        missed |= not meets_goals(outcome)
        print(line_of(outcome) + ("" if meets_goals(outcome) else " ← misses a goal"), flush=True)
    if arguments.png:
        draw(traces, config, arguments.png)
    return int(missed)


def meets_goals(outcome: Outcome) -> bool:
    """0 s above the trip wherever idling stays below it; ≥ 85 % of the rival; ≤ 12 transitions an hour."""
    cool = outcome.seconds_above == 0 or not outcome.idle_allows
    fast = outcome.share is None or outcome.share >= 0.85
    return cool and fast and outcome.transitions_per_hour <= 12


if __name__ == "__main__":
    sys.exit(main())

"""Each cause by itself: what enters a state, what leaves it, and what the reason says."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from edgellm.governor.causes import MEBIBYTE, Limit, Settings, State, module_watts
from edgellm.governor.config import GovernorConfig, LimitsConfig, SensorsConfig
from edgellm.governor.platform import Board, Expectations, Family
from edgellm.governor.policy import Decision, PolicyState, step, with_limit, without_limit
from edgellm.governor.sensors import Gpu, Memory, Readings, Zone
from edgellm.scheduler.request import Priority

TRIP = 99.0
PLENTY = Memory(available=8192 * MEBIBYTE, swap_total=4096 * MEBIBYTE, swap_free=4096 * MEBIBYTE)
GPU_FAST = Gpu(hertz=9e8, min_hertz=3e8, max_hertz=9e8, load=1.0)


def board_at(celsius: float | None = 50.0) -> Readings:
    """A board with one zone, and nothing else wrong."""
    return Readings(at=0.0, zones=(Zone("tj-thermal", celsius, TRIP, 104.5),), memory=PLENTY, gpu=GPU_FAST)


class Governor:
    """The policy, second by second."""

    def __init__(self, **changes: object) -> None:
        self.settings = replace(Settings(slots=8, required=("tj",), thermal=True), **changes)  # type: ignore[arg-type]
        self.state = PolicyState()
        self.now = 0.0

    def see(self, readings: Readings | None, *, seconds: int = 1) -> Decision:
        """The same sweep, anew each second; the last decision."""
        for _ in range(seconds):
            self.now += 1.0
            sweep = None if readings is None else replace(readings, at=self.now)
            self.state, decision = step(self.settings, self.state, sweep, self.now)
        return decision


# ── heat ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("celsius", "state"),
    [
        (86.9, State.NORMAL),
        (87.0, State.THROTTLED),
        (92.9, State.THROTTLED),
        (93.0, State.SHED),
        (98.9, State.SHED),
        (99.0, State.CRITICAL),
        (150.0, State.CRITICAL),
    ],
)
def test_heat_enters_at_its_lines(celsius: float, state: State) -> None:
    decision = Governor().see(board_at(celsius))
    assert decision.state is state
    if state is not State.NORMAL:
        assert decision.reason == "heat"
        assert f"tj-thermal {celsius:.1f} °C" in decision.detail


@pytest.mark.parametrize(
    ("entered_at", "stays_at", "leaves_at", "then"),
    [
        (87.0, 83.0, 82.9, State.NORMAL),
        (93.0, 89.0, 88.9, State.THROTTLED),
        (99.0, 87.0, 86.9, State.THROTTLED),
    ],
)
def test_heat_is_left_below_another_line_after_the_dwell(
    entered_at: float, stays_at: float, leaves_at: float, then: State
) -> None:
    governor = Governor()
    entered = governor.see(board_at(entered_at)).state
    assert governor.see(board_at(stays_at), seconds=300).state is entered
    assert governor.see(board_at(leaves_at), seconds=30).state is entered  # 29 s of calm
    assert governor.see(board_at(leaves_at), seconds=60).state is then


@pytest.mark.parametrize("swing", [(75.0, 88.0), (75.0, 94.0), (86.0, 94.0), (75.0, 100.0)])
@pytest.mark.parametrize("half_period", [40, 300])
def test_whatever_swings_there_are_at_most_twelve_transitions_an_hour(
    swing: tuple[float, float], half_period: int
) -> None:
    governor = Governor()
    states = []
    for second in range(2 * 3600):
        celsius = swing[second // half_period % 2]
        states.append(governor.see(board_at(celsius)).state)
    last_hour = states[-3600:]
    assert sum(a is not b for a, b in pairwise(last_hour)) <= 12


def test_the_hottest_zone_relative_to_its_own_trip_counts() -> None:
    zones = (Zone("cpu-thermal", 90.0, 110.0), Zone("tj-thermal", 80.0, 85.0), Zone("nvme", 200.0, None))
    decision = Governor().see(replace(board_at(), zones=zones))
    assert decision.state is State.SHED
    assert "tj-thermal 80.0 °C, 5.0 °C below its trip" in decision.detail


def test_a_rise_that_would_reach_the_shed_line_throttles_early() -> None:
    slow, fast = Governor(), Governor()
    slow.see(board_at(70.0), seconds=5)
    fast.see(board_at(70.0), seconds=5)
    assert slow.see(board_at(71.0)).state is State.NORMAL
    fast.see(board_at(78.0))
    assert fast.see(board_at(86.0)).state is State.THROTTLED


def test_in_throttled_the_duty_falls_above_the_target_and_rises_below_it() -> None:
    governor = Governor()
    above = [governor.see(board_at(92.0)).duty for _ in range(200)]
    assert above == sorted(above, reverse=True)
    assert GovernorConfig().duty_floor < above[-1] < above[0]
    below = [governor.see(board_at(86.0)).duty for _ in range(60)]
    assert above[-1] < below[10] < below[-1] < 1.0
    assert governor.state.state is State.THROTTLED


def test_heat_takes_the_duty_first_and_rows_only_at_the_floor() -> None:
    governor = Governor()
    while governor.see(board_at(92.0)).duty > GovernorConfig().duty_floor:
        assert governor.see(board_at(92.0)).batch_cap == 8
        assert governor.now < 1000
    caps = [governor.see(board_at(92.0)).batch_cap for _ in range(60)]
    assert caps == sorted(caps, reverse=True)
    assert caps[-1] == 1


def test_shed_runs_one_row_at_the_floor_and_takes_only_urgent_requests() -> None:
    decision = Governor().see(board_at(94.0))
    assert (decision.batch_cap, decision.duty) == (1, GovernorConfig().duty_floor)
    taken = {priority for priority in Priority if decision.admits(priority)}
    assert taken == {Priority.CRITICAL, Priority.HIGH}


def test_critical_runs_and_takes_nothing() -> None:
    decision = Governor().see(board_at(99.5))
    assert (decision.batch_cap, decision.duty) == (0, 0.0)
    assert not any(decision.admits(priority) for priority in Priority)


def test_shed_that_does_not_stop_the_rise_becomes_critical_before_the_trip() -> None:
    rising, steady = Governor(), Governor()
    for tenths in range(40):
        last = rising.see(board_at(93.5 + tenths * 0.1))
        steady.see(board_at(93.5))
    assert last.state is State.CRITICAL
    assert steady.see(board_at(93.5), seconds=300).state is State.SHED


# ── unknown ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("readings", "reason", "says"),
    [
        (None, "sensors_stale", "no sensor reading yet"),
        (board_at(None), "sensor_unknown", "no thermal zone is readable"),
        (replace(board_at(), zones=()), "sensor_unknown", "no thermal zone is readable"),
        (replace(board_at(), zones=(Zone("cpu-thermal", 40.0, TRIP),)), "sensor_unknown", "not readable: tj"),
    ],
)
def test_a_board_that_should_have_sensors_fails_closed(
    readings: Readings | None, reason: str, says: str
) -> None:
    decision = Governor().see(readings)
    assert (decision.state, decision.reason, decision.duty) == (State.THROTTLED, reason, 0.25)
    assert says in decision.detail
    assert decision.admits(Priority.BACKGROUND)


def test_readings_that_are_not_renewed_become_unknown() -> None:
    governor = Governor()
    fresh = replace(board_at(), at=1.0)
    for now, state in [(1.0, State.NORMAL), (6.0, State.NORMAL), (6.1, State.THROTTLED)]:
        governor.state, decision = step(governor.settings, governor.state, fresh, now)
        assert decision.state is state
    assert (decision.reason, decision.detail) == ("sensors_stale", "sensor readings are 5 s old")


def test_a_host_without_zones_runs_normal_and_says_so() -> None:
    governor = Governor(required=(), thermal=False)
    decision = governor.see(Readings(at=0.0, memory=PLENTY), seconds=10)
    assert (decision.state, decision.batch_cap, decision.duty) == (State.NORMAL, 8, 1.0)
    assert decision.detail == "no thermal zone governs on this host: heat is not watched"


def test_a_hot_zone_that_becomes_unreadable_counts_as_hot_for_a_while() -> None:
    governor = Governor()
    both = replace(board_at(60.0), zones=(Zone("tj-thermal", 60.0, TRIP), Zone("gpu-thermal", 94.0, TRIP)))
    lost = replace(both, zones=(Zone("tj-thermal", 60.0, TRIP), Zone("gpu-thermal", None, TRIP)))
    governor.see(both)
    decision = governor.see(lost, seconds=100)
    assert decision.state is State.SHED
    assert "gpu-thermal 94.0 °C, unreadable for 100 s" in decision.detail
    assert governor.see(lost, seconds=250).state is State.NORMAL


def test_a_zone_that_was_cool_and_is_powered_down_is_no_cause() -> None:
    governor = Governor()
    zones = (Zone("tj-thermal", 60.0, TRIP), Zone("gpu-thermal", 55.0, TRIP))
    governor.see(replace(board_at(), zones=zones))
    off = (zones[0], Zone("gpu-thermal", None, TRIP))
    assert governor.see(replace(board_at(), zones=off), seconds=60).state is State.NORMAL


@pytest.mark.parametrize(
    ("required", "expected_names", "expected_thermal"),
    [(None, ("tj",), True), ([], (), False), (["VDD_IN"], ("VDD_IN",), False)],
)
def test_a_configured_list_replaces_what_the_board_is_expected_to_have(
    required: list[str] | None, expected_names: tuple[str, ...], expected_thermal: bool
) -> None:
    board = Board("x", Family.AGX_ORIN, expects=Expectations(thermal=True, required=("tj",)))
    made = Settings.of(GovernorConfig(), LimitsConfig(), SensorsConfig(required=required), board, 4)
    assert (made.required, made.thermal, made.slots) == (expected_names, expected_thermal, 4)


# ── the board throttles ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wrong", "reason", "says"),
    [
        (
            {"throttling": {"cpu-throttle-alert": 0, "gpu-throttle-alert": 1}},
            "throttle_alert",
            "gpu-throttle",
        ),
        ({"throttling": {"devfreq-17000000.gpu": 3}}, "throttle_alert", "devfreq-17000000.gpu"),
        ({"gpu": replace(GPU_FAST, hertz=5e8)}, "gpu_clock", "500 of 900 MHz"),
        ({"rails": {"VDD_IN": 31.0, "VDD_SOC": 4.0}}, "power", "31.0 W, more than 30.0 W"),
    ],
)
def test_signs_of_throttling_lower_the_duty_step_by_step_and_give_it_back(
    wrong: dict[str, object], reason: str, says: str
) -> None:
    governor = Governor(governor=GovernorConfig(power_limit_w=30.0))
    governor.see(board_at())
    bad = replace(board_at(), **wrong)  # type: ignore[arg-type]
    duties = [governor.see(bad) for _ in range(100)]
    assert duties[9].state is State.THROTTLED
    assert duties[9].reason == reason
    assert says in duties[9].detail
    values = [decision.duty for decision in duties]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 5  # step by step
    assert values[-1] == GovernorConfig().duty_floor
    assert duties[-1].batch_cap == 8
    assert governor.see(board_at(), seconds=31).state is State.THROTTLED
    assert governor.see(board_at(), seconds=120).state is State.NORMAL


def test_an_unknown_alert_is_no_alert() -> None:
    readings = replace(board_at(), throttling={"gpu-throttle-alert": None})
    assert Governor().see(readings).state is State.NORMAL


@pytest.mark.parametrize(
    "gpu",
    [
        replace(GPU_FAST, hertz=3e8, load=0.5),  # idle: its governor lowers the clock
        replace(GPU_FAST, hertz=8e8),
        Gpu(None, None, None, None),
        None,
    ],
)
def test_a_gpu_that_is_idle_fast_enough_or_unknown_is_no_cause(gpu: Gpu | None) -> None:
    assert Governor().see(replace(board_at(), gpu=gpu), seconds=20).state is State.NORMAL


def test_a_short_dip_of_the_gpu_clock_is_no_cause() -> None:
    governor = Governor()
    governor.see(replace(board_at(), gpu=replace(GPU_FAST, hertz=3e8)), seconds=3)
    assert governor.see(board_at(), seconds=10).state is State.NORMAL


def test_over_current_is_a_counter_that_goes_up() -> None:
    governor = Governor()

    def count(value: int | None) -> Decision:
        return governor.see(replace(board_at(), over_current={"oc3_event_cnt": value}))

    assert count(117).state is State.NORMAL  # since boot: nothing is known to have happened now
    assert count(117).state is State.NORMAL
    assert count(None).state is State.NORMAL
    assert count(2).state is State.NORMAL  # it was reset: the board, or the driver, started again
    decision = count(3)
    assert (decision.state, decision.reason) == (State.THROTTLED, "over_current")
    assert decision.duty < 1.0
    for _ in range(200):
        decision = count(3)
    assert (decision.state, decision.duty) == (State.NORMAL, 1.0)


@pytest.mark.parametrize(
    ("rails", "watts"),
    [
        ({"VDD_IN": 12.0, "VDD_CPU_GPU_CV": 5.0, "VDD_SOC": 3.0}, 12.0),
        ({"VDD_GPU_SOC": 6.0, "VDD_CPU_CV": 2.0, "VIN_SYS_5V0": 5.0, "VDDQ_VDD2_1V8AO": 1.0}, 13.0),
        ({"VDD_GPU_SOC": 6.0, "VDD_CPU_CV": None, "VIN_SYS_5V0": 5.0}, None),
        ({"VDD_IN": None, "VDD_SOC": 3.0}, None),
        ({}, None),
    ],
)
def test_the_power_of_a_module_does_not_count_a_rail_twice(
    rails: dict[str, float | None], watts: float | None
) -> None:
    assert module_watts(Readings(at=0.0, rails=rails)) == watts


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("memory", "state", "reason"),
    [
        (replace(PLENTY, available=511 * MEBIBYTE), State.THROTTLED, "memory"),
        (replace(PLENTY, available=255 * MEBIBYTE), State.SHED, "memory"),
        (replace(PLENTY, psi_some=21.0, psi_full=0.0), State.THROTTLED, "memory_pressure"),
        (replace(PLENTY, psi_some=21.0, psi_full=11.0), State.SHED, "memory_pressure"),
        (replace(PLENTY, psi_some=19.0, psi_full=9.0), State.NORMAL, "none"),
        (replace(PLENTY, available=512 * MEBIBYTE), State.NORMAL, "none"),
        (Memory(), State.NORMAL, "none"),
    ],
)
def test_memory_lines(memory: Memory, state: State, reason: str) -> None:
    decision = Governor().see(replace(board_at(), memory=memory))
    assert (decision.state, decision.reason) == (state, reason)


def test_short_memory_lowers_the_cap_step_by_step_not_the_duty_and_gives_it_back() -> None:
    governor = Governor()
    governor.see(board_at())
    short = replace(board_at(), memory=replace(PLENTY, available=400 * MEBIBYTE))
    caps = [governor.see(short) for _ in range(60)]
    assert list(dict.fromkeys(decision.batch_cap for decision in caps)) == [6, 5, 4, 3, 2, 1]
    assert {decision.duty for decision in caps} == {1.0}
    nearly = replace(board_at(), memory=replace(PLENTY, available=600 * MEBIBYTE))
    assert governor.see(nearly, seconds=120).state is State.THROTTLED  # a line is left 25 % above it
    assert governor.see(board_at(), seconds=20).batch_cap in {4, 5}
    decision = governor.see(board_at(), seconds=60)
    assert (decision.state, decision.batch_cap) == (State.NORMAL, 8)


def test_swapping_out_is_a_cause_while_it_goes_on() -> None:
    governor = Governor()
    governor.see(board_at())
    for used in (30, 60, 90):
        memory = replace(PLENTY, swap_free=(4096 - used) * MEBIBYTE)
        decision = governor.see(replace(board_at(), memory=memory))
    assert (decision.state, decision.reason) == (State.THROTTLED, "swap")
    assert decision.detail == "90 MiB were swapped out within a minute"
    settled = replace(board_at(), memory=replace(PLENTY, swap_free=4000 * MEBIBYTE))
    assert governor.see(settled, seconds=200).state is State.NORMAL


def test_slow_swapping_is_no_cause() -> None:
    governor = Governor()
    for second in range(600):
        memory = replace(PLENTY, swap_free=(4096 * MEBIBYTE) - second * MEBIBYTE // 2)  # 30 MiB a minute
        assert governor.see(replace(board_at(), memory=memory)).state is State.NORMAL


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_limit_holds_at_once_is_named_and_is_taken_back() -> None:
    governor = Governor()
    governor.see(board_at())
    governor.state = with_limit(governor.state, Limit("perception", batch=3, duty=0.5))
    decision = governor.see(board_at())
    assert (decision.state, decision.batch_cap, decision.duty) == (State.THROTTLED, 3, 0.5)
    assert (decision.reason, decision.detail) == ("limit", "limited by perception: batch 3, duty 0.50")
    governor.state = without_limit(governor.state, "perception")
    decision = governor.see(board_at())
    assert (decision.batch_cap, decision.duty) == (8, 1.0)  # what was asked for is given back at once
    assert governor.see(board_at(), seconds=31).state is State.NORMAL


def test_a_limit_ends_by_itself() -> None:
    governor = Governor()
    governor.state = with_limit(governor.state, Limit("perception", duty=0.5, until=10.0))
    assert governor.see(board_at(), seconds=9).duty == 0.5
    assert governor.see(board_at()).duty == 1.0


def test_limits_of_several_add_up_to_the_least_and_each_has_one() -> None:
    governor = Governor()
    for limit in (Limit("a", duty=0.5), Limit("b", batch=2), Limit("a", duty=0.7)):
        governor.state = with_limit(governor.state, limit)
    decision = governor.see(board_at())
    assert (decision.batch_cap, decision.duty) == (2, 0.7)
    governor.state = without_limit(governor.state, None)
    decision = governor.see(board_at())
    assert (decision.batch_cap, decision.duty) == (8, 1.0)


@pytest.mark.parametrize("limit", [Limit("perception", batch=0), Limit("perception", duty=0.0)])
def test_suspend_pauses_everything_and_still_queues(limit: Limit) -> None:
    governor = Governor()
    governor.state = with_limit(with_limit(governor.state, Limit("a", duty=0.9)), limit)
    decision = governor.see(board_at())
    assert (decision.state, decision.batch_cap, decision.duty) == (State.THROTTLED, 0, 0.0)
    assert (decision.reason, decision.detail) == ("suspend", "suspended by perception")
    assert decision.admits(Priority.BACKGROUND)


def test_permanent_ceilings_are_normal() -> None:
    governor = Governor(limits=LimitsConfig(batch=2, duty=0.4))
    decision = governor.see(board_at(), seconds=5)
    assert (decision.state, decision.batch_cap, decision.duty) == (State.NORMAL, 2, 0.4)


def test_a_reload_takes_effect_with_the_next_step() -> None:
    governor = Governor()
    assert governor.see(board_at(80.0)).state is State.NORMAL
    config = GovernorConfig(throttle_below_c=20.0, normal_below_c=25.0)
    governor.settings = replace(governor.settings, governor=config, limits=LimitsConfig(batch=4))
    decision = governor.see(board_at(80.0))
    assert (decision.state, decision.batch_cap) == (State.THROTTLED, 4)


def test_switched_off_only_limits_act() -> None:
    governor = Governor(governor=GovernorConfig(enabled=False))
    decision = governor.see(board_at(120.0))
    assert (decision.state, decision.duty) == (State.NORMAL, 1.0)
    assert decision.detail == "the governor is switched off: only limits act"
    governor.state = with_limit(governor.state, Limit("perception", duty=0.2))
    assert governor.see(None).duty == 0.2


def test_the_worst_cause_is_named_and_all_are_listed() -> None:
    bad = replace(board_at(90.0), memory=Memory(available=1), throttling={"gpu-throttle-alert": 1})
    decision = Governor().see(bad)
    assert (decision.state, decision.reason) == (State.SHED, "memory")
    assert [cause.name for cause in decision.causes] == ["heat", "throttle_alert", "memory"]
    governor = Governor()
    governor.see(board_at(94.0))
    assert governor.see(board_at(60.0)).detail.startswith("recovering: tj-thermal 94.0 °C")


# ── the controller beside other ceilings ────────────────────────────────────────────────────────────────────


def test_the_controller_does_not_wind_up_while_a_limit_holds_the_duty_down() -> None:
    governor = Governor()
    throttled = governor.see(board_at(92.0), seconds=150).duty
    governor.state = with_limit(governor.state, Limit("perception", duty=0.1))
    governor.see(
        board_at(86.0), seconds=300
    )  # cooler than the target: because of the limit, not of the controller
    governor.state = without_limit(governor.state, None)
    assert governor.see(board_at(86.0)).duty <= throttled + 0.05


def test_the_controller_goes_on_falling_from_where_a_limit_holds_the_duty() -> None:
    governor = Governor()
    governor.see(board_at(88.0))
    governor.state = with_limit(governor.state, Limit("perception", duty=0.5))
    governor.see(board_at(88.0), seconds=5)
    assert governor.see(board_at(92.0), seconds=20).duty < 0.5


def test_the_duty_falls_no_faster_than_its_rate_limit_within_throttled() -> None:
    governor = Governor()
    governor.see(board_at(40.0), seconds=2)
    duties = [1.0, *(governor.see(board_at(92.0)).duty for _ in range(3))]
    assert duties[1] == pytest.approx(0.8)
    assert all(before - after <= 0.2 + 1e-9 for before, after in pairwise(duties))


def test_after_shed_the_controller_begins_at_half_of_what_was_too_much() -> None:
    governor = Governor()
    before = governor.see(board_at(88.0)).duty
    governor.see(board_at(94.0))
    governor.see(board_at(88.0), seconds=30)
    decision = governor.see(board_at(88.0))
    assert decision.state is State.THROTTLED
    assert decision.duty == pytest.approx(before / 2, abs=0.05)


def test_nothing_is_given_back_without_a_new_sweep() -> None:
    governor = Governor()
    governor.see(board_at())
    alerted = replace(board_at(), throttling={"gpu-throttle-alert": 1})
    governor.see(alerted, seconds=10)
    stale = replace(board_at(), at=governor.now)
    duties = []
    for _ in range(100):
        governor.now += 1.0
        governor.state, decision = step(governor.settings, governor.state, stale, governor.now)
        duties.append(governor.state.stress_duty)
    assert decision.reason == "sensors_stale"
    assert set(duties) == {duties[0]}
    assert duties[0] < 1.0


def test_memory_pressure_is_left_below_its_line_by_a_margin() -> None:
    def pressed(some: float, full: float) -> Readings:
        return replace(board_at(), memory=replace(PLENTY, psi_some=some, psi_full=full))

    governor = Governor()
    assert governor.see(pressed(21.0, 11.0)).state is State.SHED
    assert governor.see(pressed(21.0, 9.0), seconds=60).state is State.SHED  # 9 is not below 10 / 1.25
    assert governor.see(pressed(21.0, 7.0), seconds=60).state is State.THROTTLED
    assert governor.see(pressed(17.0, 0.0), seconds=60).state is State.THROTTLED
    assert governor.see(pressed(15.0, 0.0), seconds=120).state is State.NORMAL

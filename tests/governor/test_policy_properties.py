"""What holds of the policy whatever the board says: safety is monotone, ceilings hold, dwell is kept."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.governor.causes import MEBIBYTE, Limit, Settings, State
from edgellm.governor.config import GovernorConfig, LimitsConfig
from edgellm.governor.policy import Decision, PolicyState, step, with_limit
from edgellm.governor.sensors import Gpu, Memory, Readings, Zone

NAMES = ("tj-thermal", "gpu-thermal", "cpu-thermal")

temperatures = st.one_of(
    st.none(),
    st.floats(-40, 150, allow_nan=False),
    st.floats(80, 100, allow_nan=False),  # where the lines are
    st.sampled_from([83.0, 87.0, 89.0, 93.0, 99.0]),  # on the lines
)


@st.composite
def sweeps(draw: st.DrawFn) -> Readings:
    """A sweep without its time. Most have only heat to report, so that the rest does not drown it."""
    zones = tuple(Zone(name, draw(temperatures), 99.0, 104.5) for name in NAMES)
    if draw(st.integers(0, 3)):
        return Readings(at=0.0, zones=zones, memory=Memory(available=4096 * MEBIBYTE))
    return Readings(
        at=0.0,
        zones=zones,
        throttling={"gpu-throttle-alert": draw(st.sampled_from([None, 0, 0, 1]))},
        over_current={"oc3_event_cnt": draw(st.one_of(st.none(), st.integers(0, 3)))},
        gpu=draw(st.sampled_from([None, Gpu(3e8, 3e8, 9e8, 1.0), Gpu(9e8, 3e8, 9e8, 1.0)])),
        memory=Memory(
            available=draw(st.sampled_from([None, 100 * MEBIBYTE, 300 * MEBIBYTE, 600 * MEBIBYTE, 1 << 32])),
            swap_free=draw(st.sampled_from([None, 0, 1 << 30])),
            psi_some=draw(st.sampled_from([None, 0.0, 50.0])),
            psi_full=draw(st.sampled_from([None, 0.0, 50.0])),
        ),
    )


limits = st.builds(
    Limit,
    by=st.sampled_from(["perception", "fleet"]),
    batch=st.one_of(st.none(), st.integers(0, 4)),
    duty=st.one_of(st.none(), st.floats(0, 1)),
    until=st.one_of(st.none(), st.floats(0, 600)),
)
moments = st.tuples(
    st.sampled_from([0.1, 1.0, 1.0, 1.0, 4.0, 31.0, 130.0]),
    st.one_of(st.none(), sweeps(), sweeps(), sweeps()),
    st.one_of(st.none(), st.none(), st.none(), limits),
)
walks = st.lists(moments, max_size=25)
boards = st.builds(
    Settings,
    slots=st.integers(1, 8),
    governor=st.sampled_from([GovernorConfig(), GovernorConfig(duty_floor=0.5, smooth_s=0.0, step_s=1.0)]),
    limits=st.builds(LimitsConfig, batch=st.integers(0, 10), duty=st.sampled_from([1.0, 0.6, 0.05])),
    required=st.sampled_from([(), ("tj",)]),
    thermal=st.booleans(),
)


class Walk:
    """The policy driven through moments: (seconds since the last, a new sweep or None, a limit or None)."""

    def __init__(self, board: Settings) -> None:
        self.board = board
        self.state = PolicyState()
        self.readings: Readings | None = None
        self.now = 0.0
        self.history: list[tuple[float, Decision]] = []

    def go(self, walk: list[tuple[float, Readings | None, Limit | None]]) -> Walk:
        for seconds, sweep, limit in walk:
            self.now += seconds
            if sweep is not None:
                self.readings = replace(sweep, at=self.now)
            if limit is not None:
                self.state = with_limit(self.state, limit)
            self.state, decision = step(self.board, self.state, self.readings, self.now)
            self.history.append((self.now, decision))
        return self

    def peek(self, sweep: Readings) -> Decision:
        """What one more sweep, a second later, would give."""
        return step(self.board, self.state, replace(sweep, at=self.now + 1), self.now + 1)[1]


@settings(max_examples=150, deadline=None)
@given(boards, walks, sweeps(), st.lists(st.floats(0, 60), min_size=3, max_size=3))
def test_hotter_never_gives_more(
    board: Settings,
    walk: list[tuple[float, Readings | None, Limit | None]],
    sweep: Readings,
    more: list[float],
) -> None:
    walked = Walk(board).go(walk)
    hotter = tuple(
        zone if zone.celsius is None else replace(zone, celsius=min(150.0, zone.celsius + rise))
        for zone, rise in zip(sweep.zones, more, strict=True)
    )
    cool, hot = walked.peek(sweep), walked.peek(replace(sweep, zones=hotter))
    assert hot.batch_cap <= cool.batch_cap
    assert hot.duty <= cool.duty
    assert hot.state >= cool.state


@settings(max_examples=150, deadline=None)
@given(boards, walks, sweeps(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_unknown_is_never_better_than_known_and_cool(
    board: Settings,
    walk: list[tuple[float, Readings | None, Limit | None]],
    sweep: Readings,
    lost: list[bool],
) -> None:
    walked = Walk(board).go(walk)
    cool = tuple(replace(zone, celsius=40.0) for zone in sweep.zones)
    gone = tuple(replace(z, celsius=None) if lose else z for z, lose in zip(cool, lost, strict=True))
    known, unknown = (walked.peek(replace(sweep, zones=zones)) for zones in (cool, gone))
    assert unknown.batch_cap <= known.batch_cap
    assert unknown.duty <= known.duty
    assert unknown.state >= known.state


@settings(max_examples=80, deadline=None)
@given(boards, walks)
def test_ceilings_hold_and_states_mean_what_they_say(
    board: Settings, walk: list[tuple[float, Readings | None, Limit | None]]
) -> None:
    walked = Walk(board)
    for moment in walk:
        walked.go([moment])
        now, decision = walked.history[-1]
        active = [entry for entry in walked.state.limits if entry.until is None or now < entry.until]
        assert (
            0 <= decision.batch_cap <= min([board.batch, *(e.batch for e in active if e.batch is not None)])
        )
        assert 0 <= decision.duty <= min([board.limits.duty, *(e.duty for e in active if e.duty is not None)])
        assert (decision.batch_cap == 0) == (decision.duty == 0)
        if decision.state is State.CRITICAL:
            assert (decision.batch_cap, decision.duty) == (0, 0.0)
        if decision.state is State.SHED:
            assert decision.batch_cap <= 1
            assert decision.duty <= board.governor.duty_floor
        if decision.state is State.NORMAL:
            assert (decision.batch_cap, decision.duty) == (board.batch, board.limits.duty)
            assert decision.causes == ()
        else:
            assert decision.reason != "none"
        assert decision.detail


@settings(max_examples=80, deadline=None)
@given(boards, walks)
def test_a_state_is_left_for_a_better_one_after_the_dwell_only(
    board: Settings, walk: list[tuple[float, Readings | None, Limit | None]]
) -> None:
    history = Walk(board).go(walk).history
    changed_at, asked_at, before = 0.0, 0.0, State.NORMAL
    for now, decision in history:
        if decision.state < before:
            assert now - changed_at >= board.governor.dwell_s
            assert now - asked_at >= board.governor.dwell_s  # nothing asked for the state since
            assert decision.state >= State.THROTTLED or before is State.THROTTLED
        if any(cause.state >= before for cause in decision.causes) and before > State.NORMAL:
            asked_at = now
        if decision.state is not before:
            changed_at = asked_at = now
        before = decision.state


@settings(max_examples=60, deadline=None)
@given(boards, walks)
def test_the_same_gives_the_same_and_asking_again_changes_nothing(
    board: Settings, walk: list[tuple[float, Readings | None, Limit | None]]
) -> None:
    once, again = Walk(board).go(walk), Walk(board).go(walk)
    assert once.history == again.history
    assert once.state == again.state
    if once.history:
        _, repeated = step(board, once.state, once.readings, once.now)
        assert repeated == once.history[-1][1]


@settings(max_examples=30, deadline=None)
@given(boards, walks)
def test_everything_recovers_once_the_board_is_well(
    board: Settings, walk: list[tuple[float, Readings | None, Limit | None]]
) -> None:
    walked = Walk(board).go(walk)
    walked.state = replace(walked.state, limits=())
    well = Readings(
        at=0.0,
        zones=tuple(Zone(name, 40.0, 99.0, 104.5) for name in NAMES),
        memory=Memory(available=1 << 33, swap_free=1 << 30, psi_some=0.0, psi_full=0.0),
    )
    walked.go([(5.0, well, None)] * 300)  # the longest dwell is 600 s, twice from CRITICAL
    _, decision = walked.history[-1]
    assert (decision.state, decision.batch_cap, decision.duty) == (
        State.NORMAL,
        board.batch,
        board.limits.duty,
    )


def test_asking_again_does_not_take_a_rise_for_over() -> None:
    board, state = Settings(slots=1), PolicyState()

    def sweep(at: float, celsius: float) -> Readings:
        return Readings(
            at=at,
            zones=(Zone("cpu-thermal", celsius, 99.0, 104.5),),
            memory=Memory(available=4096 * MEBIBYTE),
        )

    state, _ = step(board, state, sweep(1.0, 20.0), 1.0)
    state, hotter = step(board, state, sweep(1.1, 60.0), 1.1)
    assert hotter.state is State.THROTTLED  # far from its trip, but it will not be for long
    _, again = step(board, state, sweep(1.1, 60.0), 1.1)
    assert again == hotter

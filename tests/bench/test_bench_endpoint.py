"""Latencies and rates from traces made by hand: every figure is one that can be worked out on paper."""

from __future__ import annotations

import itertools
import math

import pytest

from edgellm.bench.endpoint import (
    Objectives,
    columns,
    errors_of,
    latencies,
    row_of,
    sample_of,
    steady_decode_rate,
)
from edgellm.bench.load import Trace, poisson_arrivals
from edgellm.bench.prompts import Prompts
from edgellm.bench.report import Column
from edgellm.errors import UsageError


def trace(
    sent: float, deltas: list[tuple[float, int]], ended: float | None = None, *, error: str | None = None
) -> Trace:
    """Accepted after 1 ms; done 1 ms after the last delta unless told otherwise."""
    return Trace(
        prompt_tokens=100,
        sent=sent,
        accepted=sent + 0.001,
        deltas=deltas,
        ended=ended if ended is not None else deltas[-1][0] + 0.001,
        error=error,
        completion_tokens=sum(tokens for _, tokens in deltas),
        cached_tokens=3,
    )


def test_latencies_are_differences_of_arrivals() -> None:
    # A first token after 200 ms, then after 10 and 30 ms, the last delta with two tokens.
    found = latencies(trace(5.0, [(5.2, 1), (5.21, 1), (5.24, 2)]))
    assert found["accepted_ms"] == pytest.approx([1.0])
    assert found["ttft_ms"] == pytest.approx([200.0])
    assert found["itl_ms"] == pytest.approx([10.0, 30.0])
    assert found["tpot_ms"] == pytest.approx([40 / 3])
    assert found["e2e_ms"] == pytest.approx([241.0])


def test_one_delta_has_no_latency_between_tokens() -> None:
    found = latencies(trace(0.0, [(0.1, 4)]))
    assert found["itl_ms"] == []
    assert found["tpot_ms"] == []


def test_a_request_that_was_refused_has_its_end_only() -> None:
    refused = Trace(prompt_tokens=4, sent=1.0, ended=1.5, error="overloaded")
    assert {name: values for name, values in latencies(refused).items() if values} == {
        "e2e_ms": pytest.approx([500.0])
    }


def test_a_row_counts_failures_and_leaves_them_out_of_everything_else() -> None:
    traces = [
        trace(0.0, [(1.0, 1), (2.0, 1)], 2.0),
        trace(0.0, [(1.5, 1), (2.5, 1), (4.0, 1)], 4.0),
        trace(0.0, [(3.0, 7)], 3.5, error="internal"),
    ]
    row = row_of({"concurrency": 3}, traces, Objectives(ttft_ms=1200))
    assert row["concurrency"] == 3
    assert (row["requests"], row["errors"]) == (3, 1)
    assert row["seconds"] == 4.0
    assert row["tokens_per_s"] == pytest.approx(5 / 4)
    assert row["requests_per_s"] == pytest.approx(2 / 4)
    assert row["prompt_tokens_per_s"] == pytest.approx(200 / 4)
    assert row["goodput_per_s"] == pytest.approx(1 / 4), "one was late, one failed"
    assert row["cached_tokens"] == 6
    assert row["tokens_per_delta"] == pytest.approx(1.0)
    assert row["ttft_ms_p50"] == pytest.approx(1250.0)
    assert row["ttft_ms_max"] == pytest.approx(1500.0)
    assert row["itl_ms_mean"] == pytest.approx((1000 + 1000 + 1500) / 3)
    assert errors_of(traces) == {"internal": 1}


def test_a_level_where_all_failed_is_a_row_of_dashes() -> None:
    row = row_of({"concurrency": 1}, [Trace(4, 0.0, ended=1.0, error="overloaded")], Objectives())
    cells = [column.cell(row) for column in columns(Column("concurrency", ("concurrency",)), Objectives())]
    assert cells[:4] == ["1", "1", "1", "0.0"]
    assert set(cells[5:]) == {"–"}
    assert math.isnan(row["ttft_ms_p50"])


@pytest.mark.parametrize(
    ("objectives", "met"),
    [
        (Objectives(), True),
        (Objectives(ttft_ms=100.5), True),
        (Objectives(ttft_ms=99.5), False),
        # 10 and 30 ms: 20 on average. A single slow token does not spoil a request.
        (Objectives(itl_ms=20.5), True),
        (Objectives(itl_ms=19.5), False),
        (Objectives(ttft_ms=100.5, itl_ms=19.5), False),
    ],
)
def test_objectives_are_each_requests_own(objectives: Objectives, met: bool) -> None:
    assert objectives.met(trace(0.0, [(0.1, 1), (0.11, 1), (0.14, 1)])) is met


def test_failed_requests_meet_no_objective() -> None:
    assert not Objectives().met(trace(0.0, [(0.1, 1)], error="internal"))


def test_goodput_is_a_column_only_if_there_are_objectives() -> None:
    label = Column("concurrency", ("concurrency",))
    assert "good/s" in [column.title for column in columns(label, Objectives(ttft_ms=1))]
    assert "good/s" not in [column.title for column in columns(label, Objectives())]


def test_a_sample_keeps_each_requests_own_figures() -> None:
    sample = sample_of(trace(0.0, [(0.25, 1), (0.5, 1)]))
    assert sample["ttft_ms"] == pytest.approx(250.0)
    assert sample["itl_ms"] == pytest.approx([250.0])
    assert sample["error"] is None


def test_the_steady_rate_is_that_of_the_time_when_all_were_generating() -> None:
    # The second starts at 2.0, the first ends at 4.0: in (2, 4] two tokens of the first, four of the second.
    first = trace(0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)])
    second = trace(0.0, [(2.0, 1), (2.5, 1), (3.0, 1), (3.5, 1), (4.0, 1), (9.0, 1)])
    assert steady_decode_rate([first, second]) == pytest.approx(6 / 2)
    assert steady_decode_rate([first]) == pytest.approx(3 / 3)


def test_there_is_no_steady_rate_of_requests_that_never_ran_together() -> None:
    assert math.isnan(steady_decode_rate([]))
    assert math.isnan(steady_decode_rate([trace(0, [(1, 1), (2, 1)]), trace(0, [(3, 1), (4, 1)])]))
    assert math.isnan(steady_decode_rate([trace(0, [(1, 1), (2, 1)], error="internal")]))


def test_poisson_arrivals_have_exponential_gaps() -> None:
    arrivals = poisson_arrivals(4.0, 20_001, seed=1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(gaps) >= 0
    # Mean 1/4 within four standard errors, and the tail of an exponential: P(gap > 1/4) = 1/e.
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, abs=4 * 0.25 / math.sqrt(20_000))
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.014)
    assert arrivals == poisson_arrivals(4.0, 20_001, seed=1)
    assert poisson_arrivals(4.0, 0, seed=1) == []


def test_prompts_are_of_exact_length_and_share_only_the_prefix() -> None:
    prompts = Prompts(list(range(1000, 1200)), length=32, shared_prefix=20, seed=3)
    taken = [tuple(prompt.tolist()) for prompt in prompts.take(50) + prompts.take(50)]
    assert all(len(prompt) == 32 for prompt in taken)
    assert len({prompt[:20] for prompt in taken}) == 1
    assert len({prompt[20:] for prompt in taken}) == 100
    assert {token for prompt in taken for token in prompt} <= set(range(1000, 1200))


def test_the_seed_decides_the_prompts() -> None:
    def take(seed: int) -> list[list[int]]:
        return [prompt.tolist() for prompt in Prompts(list(range(200)), length=16, seed=seed).take(3)]

    assert take(1) == take(1)
    assert take(1) != take(2)


def test_a_prefix_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--shared-prefix 8 .*--prompt-tokens 8: at most 7"):
        Prompts([1, 2], length=8, shared_prefix=8, seed=0)

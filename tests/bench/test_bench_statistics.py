"""Statistics against the standard library's and against definitions written out."""

from __future__ import annotations

import math
import statistics as standard

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench.statistics import goodput, median_interval, ratio_of_medians, summarize

values = st.floats(min_value=1e-3, max_value=1e6, allow_nan=False)
samples = st.lists(values, min_size=2, max_size=60)


@given(samples)
def test_summary_is_the_standard_librarys(sample: list[float]) -> None:
    summary = summarize(sample)
    # method="inclusive" is definition 7, written in the standard library independently of numpy.
    cuts = standard.quantiles(sample, n=100, method="inclusive")
    assert summary.n == len(sample)
    assert summary.mean == pytest.approx(standard.fmean(sample))
    assert summary.sd == pytest.approx(standard.stdev(sample), abs=1e-6 * summary.most)
    assert summary.median == pytest.approx(standard.median(sample))
    assert (summary.p50, summary.p90, summary.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))
    assert (summary.least, summary.most) == (min(sample), max(sample))


def test_percentiles_of_a_sample_done_by_hand() -> None:
    # Ranks 1 … 11: p90 is at rank 1 + 10·0.9 = 10, p99 at rank 10.9, between 10 and 100.
    summary = summarize([9, 2, 3, 4, 5, 6, 7, 8, 1, 10, 100])
    assert summary.p50 == 6
    assert summary.p90 == 10
    assert summary.p99 == pytest.approx(10 + 0.9 * 90)


def test_one_value_has_no_spread_and_none_has_no_numbers() -> None:
    one = summarize([3.5])
    assert (one.mean, one.sd, one.p99) == (3.5, 0.0, 3.5)
    none = summarize([])
    assert none.n == 0
    assert all(math.isnan(value) for value in (none.mean, none.sd, none.p50, none.p90, none.p99, none.least))


@given(samples, st.integers(0, 2**32 - 1))
def test_intervals_hold_their_value_and_stay_inside_the_sample(sample: list[float], seed: int) -> None:
    interval = median_interval(sample, resamples=200, seed=seed)
    assert min(sample) <= interval.low <= interval.high <= max(sample)
    assert interval.value == pytest.approx(standard.median(sample))
    assert interval == median_interval(sample, resamples=200, seed=seed)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # The bootstrap interval of a median of 25 covers in about 95 % of all samples; 200 samples, so ± 4 sd.
    import random

    source = random.Random(7)
    covered = 0
    for trial in range(200):
        sample = [source.gauss(10, 2) for _ in range(25)]
        interval = median_interval(sample, resamples=400, seed=trial)
        covered += interval.low <= 10 <= interval.high
    assert 0.88 <= covered / 200 <= 1.0


@given(samples, st.floats(min_value=0.1, max_value=10))
def test_a_constant_ratio_has_no_uncertainty(below: list[float], factor: float) -> None:
    # Rounds are drawn in pairs: what is k times as fast in every round is so whatever the noise.
    interval = ratio_of_medians([factor * value for value in below], below, resamples=100)
    assert (interval.value, interval.low, interval.high) == pytest.approx((factor, factor, factor))


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_that_are_no_pairs_are_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        ratio_of_medians(above, below)


@given(st.lists(st.booleans(), max_size=50), st.floats(min_value=0.1, max_value=100))
def test_goodput_counts_what_met_its_objectives(met: list[bool], seconds: float) -> None:
    assert goodput(met, seconds) == pytest.approx(len([one for one in met if one]) / seconds)

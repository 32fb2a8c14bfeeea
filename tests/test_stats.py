"""Histograms: percentiles within 1/32 of the truth, whatever the values."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelcache import Summary
from modelcache.stats import Histogram

TOLD_APART = st.floats(2**-24, 2**16)
PERCENTS = st.integers(1, 100)


def filled(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(values=st.lists(st.floats(0, sys.float_info.max / 1000) | TOLD_APART, max_size=200))
@example(values=[0.0, 2**-30, 2**-24, 1.0, float(np.nextafter(1.0, 0.0)), 2.0**16, 2.0**17] * 20)
def test_many_values_at_once_count_like_one_after_another(values: list[float]) -> None:
    """NumPy puts each into the bucket that it would go to by itself."""
    histogram = Histogram()
    histogram.record_all(values)
    together, apart = histogram.summary(), filled(values).summary()
    assert together.sum == pytest.approx(apart.sum)
    assert replace(together, sum=0.0) == replace(apart, sum=0.0)


def true_percentile(values: list[float], percent: int) -> float:
    """Return the smallest of the values that so many per cent do not exceed."""
    return float(np.percentile(np.array(values), percent, method="inverted_cdf"))


@given(values=st.lists(TOLD_APART, min_size=1, max_size=60), percent=PERCENTS)
@example(values=[2**-24], percent=50)
@example(values=[2.0**16], percent=50)
@example(values=[float(np.nextafter(1.0, 0.0)), 1.0], percent=50)
@example(values=[40_000.0, 50_000.0, 65_000.0], percent=50)
def test_percentiles_are_off_by_a_thirty_second_at_most(values: list[float], percent: int) -> None:
    """From 60 nanoseconds to 18 hours, against NumPy."""
    true = true_percentile(values, percent)
    assert filled(values).percentile(percent) == pytest.approx(true, rel=1 / 32 + 1e-9)


@given(values=st.lists(st.floats(0, sys.float_info.max / 100), min_size=1, max_size=60), percent=PERCENTS)
def test_percentiles_never_leave_the_range_of_the_values(values: list[float], percent: int) -> None:
    """Whatever is recorded, a percentile lies between the smallest and the largest."""
    histogram = filled(values)
    assert min(values) <= histogram.percentile(percent) <= max(values)


@given(values=st.lists(TOLD_APART, max_size=60))
def test_a_summary_counts_exactly(values: list[float]) -> None:
    """Count, sum, smallest and largest are no estimates, and percentiles are in order."""
    summary = filled(values).summary()
    assert summary.count == len(values)
    assert summary.sum == pytest.approx(sum(values))
    assert (summary.min, summary.max) == ((min(values), max(values)) if values else (0.0, 0.0))
    assert summary.p50 <= summary.p90 <= summary.p99


@given(values=st.lists(st.floats(0, 2**20, width=32), min_size=1, max_size=60))
@example(values=[0.0, 2**-24, float(np.nextafter(np.float32(1), np.float32(0))), 1.0, 2.0**16])
def test_a_summary_counts_what_is_below_each_bound(values: list[float]) -> None:
    """Exactly, but for what differs from a bound by less than a millionth: exporters give distributions that add up."""
    summary = filled(values).summary()
    assert summary.below == tuple(sum(value < bound for value in values) for bound in Summary.bounds)


def test_an_empty_histogram_is_all_zeros() -> None:
    """Nothing recorded: no infinity shows."""
    assert Histogram().summary() == Summary()
    assert Histogram().summary().mean == 0.0


def test_zeros_are_zeros() -> None:
    """A hit ratio is made of zeros and ones, and its median is one of them."""
    mostly_misses = filled([0.0] * 6 + [1.0] * 4)
    assert mostly_misses.percentile(50) == 0.0
    assert mostly_misses.percentile(90) == pytest.approx(1.0, rel=1 / 32)
    assert mostly_misses.summary().mean == pytest.approx(0.4)


@pytest.mark.parametrize("value", [2.0**16 + 1, 1e9, 1e300])
def test_what_is_huge_counts_as_the_maximum(value: float) -> None:
    """Beyond 18 hours values are not told apart, and none is reported that was not seen."""
    histogram = filled([1.0, value, value])
    assert histogram.percentile(90) == value
    assert histogram.percentile(30) == pytest.approx(1.0, rel=1 / 32)


@pytest.mark.parametrize("value", [5e-324, 1e-30, 1e-9])
def test_what_is_tiny_counts_as_the_minimum(value: float) -> None:
    """Below 60 nanoseconds likewise."""
    assert filled([value, value, 1.0]).percentile(50) == value


def test_a_histogram_does_not_grow() -> None:
    """Its size is that of its buckets, whatever it has seen."""
    histogram = Histogram()
    before = len(histogram._buckets)
    for exponent in range(-300, 300):
        histogram.record(10.0**exponent)
    assert len(histogram._buckets) == before < 1000
    assert sum(histogram._buckets) == histogram.count == 600

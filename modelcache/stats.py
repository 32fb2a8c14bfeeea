"""Counting without keeping: histograms of logarithmic buckets, and the counters of a registry."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import frexp, inf
from typing import TYPE_CHECKING

import numpy as np

from modelcache.records import Summary

if TYPE_CHECKING:
    from collections.abc import Sequence

_SUB = 16
"""Buckets per power of two: a percentile is off by at most 1/32 of its value."""

_LOWEST, _HIGHEST = -24, 16
"""Powers of two that are told apart: 60 nanoseconds to 18 hours, when values are seconds.

What is smaller counts as the minimum (mostly 0), what is larger as the maximum."""
_BUCKETS = _SUB * (_HIGHEST - _LOWEST + 1) + 1

_MANY = 48
"""Values from which NumPy is faster."""


class Histogram:
    """Values >= 0 in buckets whose width grows with the value; 5 kB, whatever it has seen.

    The layout is that of HdrHistogram: exponent first, then the leading bits of the mantissa. The first and the last
    bucket take what lies outside.
    """

    __slots__ = ("_buckets", "count", "max", "min", "sum")

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self.min, self.max = inf, 0.0
        self._buckets = [0] * _BUCKETS

    def record(self, value: float) -> None:
        """Count one value."""
        self.count += 1
        self.sum += value
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value
        mantissa, exponent = frexp(value)
        bucket = int((exponent - _LOWEST + 2 * mantissa - 1) * _SUB) if value else 0
        if not 0 <= bucket < _BUCKETS:
            bucket = 0 if bucket < 0 else _BUCKETS - 1
        self._buckets[bucket] += 1

    def record_all(self, values: Sequence[float]) -> None:
        """Count ``values``; many take a third of the time that :meth:`record` takes for each of them."""
        if len(values) < _MANY:
            for value in values:
                self.record(value)
            return
        array = np.asarray(values)
        self.count += len(array)
        self.sum += float(array.sum())
        self.min = min(self.min, float(array.min()))
        self.max = max(self.max, float(array.max()))
        mantissas, exponents = np.frexp(array)
        places = (exponents - _LOWEST + 2 * mantissas - 1) * _SUB * (array > 0)
        for bucket in places.clip(0, _BUCKETS - 1).astype(int).tolist():
            self._buckets[bucket] += 1

    def percentile(self, percent: float) -> float:
        """Return the value that ``percent`` of the values do not exceed; 0.0 without any."""
        return self._percentile(percent, tuple(accumulate(self._buckets)))

    def summary(self) -> Summary:
        """Return the figures as a record."""
        sums = tuple(accumulate(self._buckets))
        return Summary(
            count=self.count,
            sum=self.sum,
            min=self.min if self.count else 0.0,
            max=self.max,
            p50=self._percentile(50, sums),
            p90=self._percentile(90, sums),
            p99=self._percentile(99, sums),
            below=sums[_SUB - 1 :: _SUB] if self.count else (),
        )

    def _percentile(self, percent: float, sums: tuple[int, ...]) -> float:
        if not self.count:
            return 0.0
        bucket = bisect_left(sums, self.count * percent / 100)
        return min(max(self._middle(bucket), self.min), self.max)

    def _middle(self, bucket: int) -> float:
        if bucket == 0:
            return self.min
        if bucket == len(self._buckets) - 1:
            return self.max
        exponent, position = divmod(bucket + 0.5, _SUB)
        return float((1 + position / _SUB) / 2 * 2 ** (exponent + _LOWEST))

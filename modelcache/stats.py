"""Counting without keeping: histograms of logarithmic buckets, and the counters of a registry."""

from __future__ import annotations

from math import frexp, inf

from modelcache.records import Summary

_SUB = 16
"""Buckets per power of two: a percentile is off by at most 1/32 of its value."""

_LOWEST, _HIGHEST = -24, 16
"""Powers of two that are told apart: 60 nanoseconds to 18 hours, when values are seconds.

What is smaller counts as the minimum (mostly 0), what is larger as the maximum."""
_BUCKETS = _SUB * (_HIGHEST - _LOWEST + 1) + 1


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

    def percentile(self, percent: float) -> float:
        """Return the value that ``percent`` of the values do not exceed; 0.0 without any."""
        rank, seen = self.count * percent / 100, 0
        for bucket, count in enumerate(self._buckets):
            seen += count
            if count and seen >= rank:
                return min(max(self._middle(bucket), self.min), self.max)
        return 0.0

    def summary(self) -> Summary:
        """Return the figures as a record."""
        return Summary(
            count=self.count,
            sum=self.sum,
            min=self.min if self.count else 0.0,
            max=self.max,
            p50=self.percentile(50),
            p90=self.percentile(90),
            p99=self.percentile(99),
        )

    def _middle(self, bucket: int) -> float:
        if bucket == 0:
            return self.min
        if bucket == len(self._buckets) - 1:
            return self.max
        exponent, position = divmod(bucket + 0.5, _SUB)
        return float((1 + position / _SUB) / 2 * 2 ** (exponent + _LOWEST))

"""What a model will take, learned from those loaded so far.

Bytes are reserved before a model is parsed, so the estimate has to be an upper bound; too high a one evicts models in
vain. It rests on the unpacked size, which the header of an archive tells with its first bytes: the mean ratio of
measured heap to unpacked bytes of a format plus two standard deviations, and never below 1.
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import NamedTuple

_FEW = 8

_FIRST_RATIO = 1.7
"""Heap per unpacked byte before anything is learned: the upper end of 25 to 500 trees of depth 5 to 10."""

_FIXED = 32 << 10
"""Bytes that a small model may take beyond its ratio."""

_SURELY = 0.8
"""Heap per unpacked byte below which no model has been seen: JSON begins at 0.98, UBJSON at 1.28."""


class Bounds(NamedTuple):
    """What a model takes, in bytes."""

    least: int
    most: int


class _Spread:
    """Running mean and deviation (Welford's algorithm)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        delta = value - self._mean
        self._mean += delta / self.count
        self._squares += delta * (value - self._mean)

    @property
    def upper(self) -> float:
        return self._mean + 2 * sqrt(self._squares / max(1, self.count - 1))


class SizeBook:
    """Bounds for loads to come."""

    def __init__(self) -> None:
        self._ratios: dict[str, _Spread] = {}

    def bounds(self, unpacked: int, suffix: str) -> Bounds:
        """Return what a model of ``unpacked`` bytes takes; the upper bound is what to reserve."""
        return Bounds(int(unpacked * _SURELY), ceil(unpacked * self._ratio(suffix)) + _FIXED)

    def unpacked_within(self, reserved: int, suffix: str) -> int:
        """Return the unpacked size that ``reserved`` bytes are enough for."""
        return max(1, int((reserved - _FIXED) / self._ratio(suffix)))

    def learn(self, suffix: str, *, unpacked: int, measured: int) -> None:
        """Take note of a load."""
        self._ratios.setdefault(suffix, _Spread()).add(max(0, measured - _FIXED) / max(1, unpacked))

    def _ratio(self, suffix: str) -> float:
        spread = self._ratios.get(suffix)
        return max(1.0, spread.upper) if spread and spread.count >= _FEW else _FIRST_RATIO

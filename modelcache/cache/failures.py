"""Memory of failed loads, so that callers of a broken model do not hammer the store."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, NamedTuple

from cachetools import LRUCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.errors import ModelCacheError

_LONGEST = 30.0
_REMEMBERED = 1000
"""Each with its traceback, and all that the load had in its hands: 15 KB."""
_JITTER = 0.25
_MOST_DOUBLINGS = 32
"""By then the longest time is long reached; a float would overflow at some thousand."""


class _Failure(NamedTuple):
    error: ModelCacheError
    until: float
    in_a_row: int


class FailureMemory:
    """Remembers a failure for ``ttl`` seconds, twice as long for each further one, with jitter, up to 30 s."""

    def __init__(self, ttl: float, *, clock: Callable[[], float], seed: int | None = None) -> None:
        self._ttl = ttl
        self._clock = clock
        self._random = Random(seed)  # noqa: S311 - spreads retries, protects nothing
        self._failures: LRUCache[str, _Failure] = LRUCache(_REMEMBERED)

    def remember(self, key: str, error: ModelCacheError, *, doubling: bool = True) -> None:
        """Refuse ``key`` with ``error`` for a while; with ``doubling`` longer each time."""
        if not self._ttl:
            return
        last = self._failures.get(key)
        in_a_row = last.in_a_row + 1 if last and doubling else 1
        doubled = self._ttl * 2 ** min(in_a_row - 1, _MOST_DOUBLINGS)
        seconds = min(doubled, _LONGEST) * self._random.uniform(1 - _JITTER, 1)
        self._failures[key] = _Failure(error, self._clock() + seconds, in_a_row)

    def recall(self, key: str) -> ModelCacheError | None:
        """Return the error to refuse ``key`` with, or None; it says when a new attempt will be made."""
        failure = self._failures.get(key)
        if failure is None or self._clock() >= failure.until:
            return None
        failure.error.retry_after = failure.until - self._clock()
        return failure.error

    def forget(self, key: str) -> None:
        """``key`` has loaded, or may have changed: its next load is tried at once."""
        self._failures.pop(key, None)

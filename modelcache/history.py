"""What is remembered of names that are not resident: for ``explain``, and for their next load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from modelcache.cache.recent import Recent

if TYPE_CHECKING:
    from modelcache.cache.entry import Entry
    from modelcache.errors import ModelCacheError
    from modelcache.resident import Resident

_NAMES_REMEMBERED = 100_000


class Took(NamedTuple):
    """What a version took when it was loaded before, in bytes."""

    size: int
    """On the heap, measured."""
    unpacked: int
    steady: bool = False
    """True if another reading would say the same."""


@dataclass(slots=True, eq=False)
class Past:
    """What is remembered of a name: of its last load, eviction and failure."""

    version: str | None = None
    size: int = 0
    unpacked: int = 0
    steady: bool = False
    cost: float | None = None
    """Seconds its loads take: a moving average; None if none has succeeded."""
    load_seconds: float = 0.0
    evicted_at: float | None = None
    cause: str = ""
    displaced_by: str | None = None
    hits: int = 0
    all_hits: int = 0
    """Those of earlier versions and stays, too."""
    idle: float = 0.0
    failed_at: float | None = None
    error: str = ""


class History:
    """The names that left last, or failed last.

    A name that is resident has none: all that there is to know of it is in its entry. So each model is paid for once.
    """

    def __init__(self) -> None:
        self._past: Recent[str, Past] = Recent(_NAMES_REMEMBERED)

    def of(self, key: str) -> Past | None:
        """Return what is remembered of ``key``."""
        return self._past.get(key)

    def took(self, key: str, version: str) -> Took | None:
        """Return what this version took when it was loaded before."""
        past = self._past.get(key)
        known = past is not None and past.version == version
        return Took(past.size, past.unpacked, past.steady) if past is not None and known else None

    def measured(self, key: str, version: str, took: Took) -> None:
        """Take note of a load, which may yet come to nothing since its bytes are not to be had."""
        past = self._of(key)
        past.version, (past.size, past.unpacked, past.steady) = version, took

    def settled(self, key: str) -> None:
        """Forget what is resident now."""
        self._past.pop(key, None)

    def evicted(self, entry: Entry[Resident], idle: float, now: float) -> None:
        """Take note of an eviction, ``idle`` seconds after the last use."""
        past, place, arrival = self._of(entry.key), entry.value, entry.value.arrival
        past.version, past.unpacked = place.version, arrival.unpacked_bytes
        past.size = entry.size - place.rare.engine_bytes
        past.steady = place.facts.is_steady(past.size)
        past.cost, past.load_seconds = entry.cost, arrival.load_seconds
        past.evicted_at, past.cause, past.displaced_by = now, entry.cause, entry.displaced_by
        past.hits, past.idle = entry.hits, idle
        # What leaves last need not be what was used last: a version may have been held for longer than its successor.
        past.all_hits = max(past.all_hits, entry.past_hits + entry.hits)

    def failed(self, key: str, error: ModelCacheError, now: float) -> None:
        """Take note of a failed load."""
        past = self._of(key)
        past.failed_at, past.error = now, f"{type(error).__name__}: {error}"

    def _of(self, key: str) -> Past:
        past = self._past.get(key) or Past()
        self._past.note(key, past)
        return past

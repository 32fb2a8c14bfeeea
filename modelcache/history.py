"""What happened to each name last, for ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachetools import LRUCache

if TYPE_CHECKING:
    from modelcache.cache.entry import Entry
    from modelcache.errors import ModelCacheError
    from modelcache.residency import Resident

_NAMES_REMEMBERED = 100_000


@dataclass(slots=True)
class Past:
    """What is remembered of a name."""

    loads: int = 0
    load_seconds: float = 0.0
    evicted_at: float | None = None
    cause: str = ""
    displaced_by: str | None = None
    size: int = 0
    hits: int = 0
    idle: float = 0.0
    failed_at: float | None = None
    error: str = ""


class History:
    """The last load, eviction and failure of the names used most recently."""

    def __init__(self) -> None:
        self._past: LRUCache[str, Past] = LRUCache(_NAMES_REMEMBERED)

    def of(self, key: str) -> Past | None:
        """Return what is remembered of ``key``."""
        past: Past | None = self._past.get(key)
        return past

    def loaded(self, key: str, seconds: float) -> None:
        """Take note of a load."""
        past = self._of(key)
        past.loads += 1
        past.load_seconds = seconds
        past.evicted_at = past.failed_at = None

    def evicted(self, entry: Entry[Resident], idle: float, now: float) -> None:
        """Take note of an eviction, ``idle`` seconds after the last use."""
        past = self._of(entry.key)
        past.evicted_at, past.cause, past.displaced_by = now, entry.cause, entry.displaced_by
        past.size, past.hits, past.idle = entry.size, entry.hits, idle

    def failed(self, key: str, error: ModelCacheError, now: float) -> None:
        """Take note of a failed load."""
        past = self._of(key)
        past.failed_at, past.error = now, f"{type(error).__name__}: {error}"

    def _of(self, key: str) -> Past:
        past = self._past.get(key)
        if past is None:
            past = self._past[key] = Past()
        return past

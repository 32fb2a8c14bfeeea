"""What a registry counts on its way, so that ``stats()`` has nothing to add up."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from modelcache.records import EvictionCause, Summary
from modelcache.stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelcache.errors import ModelCacheError
    from modelcache.pool.lost import Epitaph
    from modelcache.resident import Resident


class Counters:
    """Running figures; the six with long names are those of SageMaker multi-model endpoints."""

    def __init__(self) -> None:
        self.model_loading_wait_time = Histogram()
        self.model_downloading_time = Histogram()
        self.model_loading_time = Histogram()
        self.model_unloading_time = Histogram()
        self.loaded_model_count = Histogram()
        self.age_at_eviction = Histogram()
        self.hits = 0
        self.misses = 0
        self.joins = 0
        self.loads = 0
        self.loads_from_disk = 0
        self.refreshes = 0
        self.copies_made = 0
        self.rejected = 0
        self._evictions: Counter[EvictionCause] = Counter()
        self._load_failures: Counter[str] = Counter()
        self._worker_deaths: Counter[str] = Counter()

    def loaded(self, place: Resident, resident: int) -> None:
        """A model has become resident, one of ``resident``."""
        self.loads += 1
        self.loads_from_disk += place.tier == "disk"
        self.model_downloading_time.record(place.arrival.downloading)
        self.model_loading_time.record(place.arrival.loading)
        self.loaded_model_count.record(resident)

    def evicted(self, cause: EvictionCause, idle: float, resident: int) -> None:
        """A model has left for ``cause`` after ``idle`` seconds without use; ``resident`` remain."""
        self._evictions[cause] += 1
        self.loaded_model_count.record(resident)
        if cause == "budget":
            self.age_at_eviction.record(idle)

    def load_failed(self, error: ModelCacheError) -> None:
        """A load has ended in ``error``."""
        self._load_failures[type(error).__name__] += 1

    def worker_died(self, epitaph: Epitaph) -> None:
        """A worker process has ended, and nobody has told it to leave."""
        self._worker_deaths[epitaph.how] += 1

    @property
    def load_failures(self) -> int:
        """Loads that failed."""
        return self._load_failures.total()

    @property
    def load_failures_by_error(self) -> Mapping[str, int]:
        """Loads that failed, by the name of the error's class."""
        return dict(self._load_failures)

    @property
    def worker_deaths(self) -> Mapping[str, int]:
        """Workers that died, by what ended them."""
        return dict(self._worker_deaths)

    @property
    def evictions(self) -> Mapping[EvictionCause, int]:
        """Evictions by cause."""
        return dict(self._evictions)

    @property
    def model_cache_hit(self) -> Summary:
        """The distribution of a figure that is 1 for a hit and 0 for a miss."""
        count = self.hits + self.misses
        return Summary(
            count=count,
            sum=float(self.hits),
            min=float(count > 0 and not self.misses),
            max=float(self.hits > 0),
            p50=self._hit_at(50),
            p90=self._hit_at(90),
            p99=self._hit_at(99),
        )

    def _hit_at(self, percent: float) -> float:
        return float(self.hits > 0 and self.misses < (self.hits + self.misses) * percent / 100)

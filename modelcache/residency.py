"""The state of one registry, and the I/O that follows from each step of it.

The parts under ``cache/`` decide and do nothing; this is where their decisions become orders to workers, and where the
workers' reports become steps. No function here awaits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from modelcache.cache.entry import State
from modelcache.cache.failures import FailureMemory
from modelcache.cache.flight import Flights
from modelcache.cache.ledger import Ledger
from modelcache.cache.sizes import SizeBook
from modelcache.counters import Counters
from modelcache.errors import BudgetTimeoutError, ModelNotFoundError
from modelcache.history import History
from modelcache.records import (
    Event,
    LoadFailed,
    ModelEvicted,
    ModelInfo,
    ModelLoaded,
    ModelRefreshed,
    RegistryStats,
)
from modelcache.resident import Resident
from modelcache.sizing import show_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from modelcache.cache.entry import Entry
    from modelcache.cache.flight import Flight
    from modelcache.cache.policies import EvictionPolicy
    from modelcache.errors import ModelCacheError
    from modelcache.pool.pool import Pool, Worker
    from modelcache.stores.disk_tier import DiskTier

logger = logging.getLogger("modelcache")


class Residency:
    """Which models are resident, are being loaded, and are leaving."""

    def __init__(
        self,
        budget: int,
        policy: EvictionPolicy,
        *,
        failure_ttl: float,
        refresh_after: float | None,
        retain: bool,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self._failure_ttl = failure_ttl
        self._refresh_after = inf if refresh_after is None else refresh_after
        self._retain = retain
        self.ledger = Ledger(budget, policy, clock=clock)
        self.flights = Flights()
        self.failures = FailureMemory(failure_ttl, clock=clock)
        self.sizes = SizeBook()
        self.counters = Counters()
        self.history = History()
        self.pinned: set[str] = set()
        """Names to be kept resident, whatever happens to the worker that holds them."""
        self.subscribers: list[Callable[[Event], None]] = []
        self._ordered_out: dict[Entry[Any], float] = {}
        """When the entries that are leaving were ordered to."""
        self._left: dict[Entry[Any], asyncio.Future[None]] = {}
        """Resolved when the bytes of an entry are free; made by whoever waits for that."""

    def cost_of(self, key: str, seconds: float) -> float:
        """Return the moving average of what loads of ``key`` take, the newest weighing half."""
        older, past = self.ledger.table.get(key), self.history.of(key)
        before = older.cost if older is not None else past.cost if past is not None else None
        return seconds if before is None else (before + seconds) / 2

    def hits_of(self, key: str) -> int:
        """Return how many calls ``key`` has answered without a load, as far as is remembered."""
        older, past = self.ledger.table.get(key), self.history.of(key)
        if older is not None:
            return older.past_hits + older.hits
        return past.all_hits if past is not None else 0

    def settled(self, entry: Entry[Resident]) -> None:
        """A model has become resident."""
        place = entry.value
        place.worker.held[place.number] = entry
        place.trusted_until = self._trusted_until(place)
        self.counters.loaded(place, len(self.ledger.table))
        self.history.settled(entry.key)
        replaced = place.rare.replaced
        self.counters.refreshes += replaced is not None
        if self.subscribers:  # a first call waits for this, and nobody may want to know
            info = self.info(entry)
            self.emit(ModelLoaded(info) if replaced is None else ModelRefreshed(info, replaced))

    def copied(self, copy: Entry[Resident]) -> None:
        """A model has come into a further worker."""
        place = copy.value
        place.worker.held[place.number] = copy
        place.trusted_until = self._trusted_until(place)
        self.counters.copies_made += 1
        self.history.settled(copy.key)

    def release(self, entry: Entry[Resident]) -> None:
        """End a lease; without ``retain`` the model leaves with the last one."""
        retired = self.ledger.release(entry)
        if retired:
            self.retire(retired)
        if not self._retain and not entry.pins and entry.state is State.READY and entry.original is None:
            self.retire(self.ledger.detach(entry.key, "retain"))

    # Versions

    def confirm(self, flight: Flight) -> bool:
        """The store still has the version that ``flight`` renews; False if that has left meanwhile."""
        entry = flight.renews
        if entry is None or entry.state is not State.READY:
            return False
        self.trust(entry.value)
        for waiter in self.flights.land(flight):
            self.ledger.lease(entry)
            waiter.set_result(entry)
        return True

    def trust(self, place: Resident) -> None:
        """The store has this version now."""
        place.check(self.clock())
        if place.rare.doubt is not None:
            place.rare = replace(place.rare, doubt=None)
        place.trusted_until = self._trusted_until(place)

    def _trusted_until(self, place: Resident) -> float:
        # Not the sum of something and infinity, which would be another object for each model.
        return inf if self._refresh_after == inf else place.arrival.checked_at + self._refresh_after

    def note_end_of_renewal(self, flight: Flight) -> None:
        """A flight has ended: if nothing came of it, what it was to renew is as old as it was."""
        if flight.renews is not None and flight.renews.value.trusted_until == inf:
            place: Resident = flight.renews.value
            place.trusted_until = self._trusted_until(place)

    def not_renewed(self, flight: Flight, error: ModelCacheError) -> bool:
        """A renewal has failed: say whether the version that was to be replaced serves on."""
        entry = flight.renews
        if entry is None or self.ledger.table.get(entry.key) is not entry:
            return False
        if isinstance(error, ModelNotFoundError):
            self.retire(self.ledger.detach(entry.key, "deleted"))
            return False
        place: Resident = entry.value
        place.rare = replace(place.rare, doubt=f"{type(error).__name__}: {error}")
        place.trusted_until = self.clock() + max(self._refresh_after, self._failure_ttl)
        return True

    def give_up_renewal(self, flight: Flight) -> None:
        """The version that ``flight`` renews leaves: nothing is to be loaded for the registry alone."""
        if not flight.wanted:
            self.flights.drop(flight)
            flight.task.cancel()

    def retire(self, entries: Iterable[Entry[Any]]) -> None:
        """Order the bytes of ``entries`` to be freed, as the ledger has decided."""
        for entry in entries:
            place = entry.value
            self._ordered_out[entry] = time.perf_counter()
            place.worker.held[place.number] = entry
            place.worker.unload(place.number)
            if isinstance(place, Resident) and entry.original is None:
                self._note_eviction(entry)

    def acknowledged(self, worker: Worker, number: int) -> None:
        """A worker reports that bytes are free."""
        entry = worker.held.pop(number, None)
        if entry is None:
            return
        worker.charged -= entry.size
        self.counters.model_unloading_time.record(time.perf_counter() - self._ordered_out[entry])
        self._announce_left(entry)
        self.retire(self.ledger.acknowledge(entry))

    def lose(self, worker: Worker) -> tuple[str, ...]:
        """A worker has ended, and all that it held is gone: return the names of that."""
        entries = list(worker.held.values())
        worker.held.clear()
        # Of those that were leaving already, their eviction was told when it was ordered.
        resident = [e for e in entries if isinstance(e.value, Resident) and e.state is not State.UNLOADING]
        retired = self.ledger.lose(entries, "worker")
        for entry in entries:
            self._announce_left(entry)
        gone = [entry for entry in resident if entry.original is None]
        for entry in resident:
            if entry.original is not None:
                self._pass_on_renewal(entry, entry.original)
        for entry in gone:
            self._note_eviction(entry)
        self.retire(retired)
        return tuple(entry.key for entry in gone)

    def _pass_on_renewal(self, lost: Entry[Resident], heir: Entry[Resident]) -> None:
        """Let what was to renew a model that is lost renew the copy which has taken its place."""
        flight = self.flights.by_key.get(lost.key)
        if flight is not None and flight.renews is lost:
            flight.renews = heir

    def failed(self, key: str, error: ModelCacheError, *, serves_on: bool = False) -> None:
        """A load has failed; ``serves_on`` says that it was to renew a version that is still there."""
        self.counters.load_failed(error)
        if not serves_on:
            self.history.failed(key, error, self.clock())
        self.emit(LoadFailed(key, error))

    def no_room(self, name: str, needed: int, time: str) -> BudgetTimeoutError:
        """Return the error for bytes that leases and pins have held for all of ``time``."""
        holders = self.ledger.holders()
        return BudgetTimeoutError(
            f"No room for the {show_bytes(needed)} of {name} within {time}: the bytes are held by leases and pins of "
            f"{', '.join(holders[:10]) or 'models that are being loaded'}. Release or unpin one, or raise "
            "memory_budget.",
            model=name, needed=needed, holders=holders,
        )  # fmt: skip

    def info(self, entry: Entry[Resident]) -> ModelInfo:
        """Describe a resident model."""
        entry = entry.original or entry
        place, facts, arrival = entry.value, entry.value.facts, entry.value.arrival
        return ModelInfo(
            name=entry.key,
            version=place.version,
            state=entry.state.value,
            size_bytes=entry.size,
            artifact_bytes=arrival.artifact_bytes,
            n_features=facts.n_features,
            feature_names=facts.feature_names,
            n_outputs=facts.n_outputs,
            workers=tuple(holder.value.worker.pid for holder in (entry, *entry.copies)),
            pinned=entry.pinned,
            loaded_at=arrival.loaded_at,
            last_used=time.time() - (self.clock() - entry.last_used),
            hits=entry.hits,
            total_hits=entry.past_hits + entry.hits,
            load_seconds=arrival.load_seconds,
            format=facts.format,
            container=facts.container,
            objective=facts.objective,
            booster=facts.booster,
            n_trees=facts.n_trees,
            best_iteration=facts.best_iteration,
            engine=place.rare.engine,
        )

    def emit(self, event: Event) -> None:
        """Tell the subscribers; one that fails is logged and harms nobody."""
        for subscriber in tuple(self.subscribers):
            try:
                subscriber(event)
            except (Exception, asyncio.CancelledError):
                logger.exception("a subscriber failed on %s", type(event).__name__)

    def _note_eviction(self, entry: Entry[Resident]) -> None:
        idle = self.clock() - entry.last_used
        self.counters.evicted(entry.cause, idle, len(self.ledger.table))
        if entry.key not in self.ledger.table:
            self.history.evicted(entry, idle, self.clock())
        flight = self.flights.by_key.get(entry.key)
        if flight is not None and flight.renews is entry and entry.displaced_by != entry.key:
            self.give_up_renewal(flight)
        self.emit(ModelEvicted(entry.key, entry.value.version, entry.cause, entry.size))

    def left(self, entry: Entry[Any]) -> asyncio.Future[None]:
        """Return a future that is resolved when the bytes of ``entry`` are free."""
        future = self._left.get(entry)
        if future is None:
            future = self._left[entry] = asyncio.get_running_loop().create_future()
        return future

    def _announce_left(self, entry: Entry[Any]) -> None:
        self._ordered_out.pop(entry, None)
        waiter = self._left.pop(entry, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def stats(self, pool: Pool, tier: DiskTier | None) -> RegistryStats:
        """Return all figures, most of them running sums."""
        counters, ledger, now = self.counters, self.ledger, self.clock()
        oldest = next(iter(ledger.table.values()), None)
        return RegistryStats(
            model_loading_wait_time=counters.model_loading_wait_time.summary(),
            model_downloading_time=counters.model_downloading_time.summary(),
            model_loading_time=counters.model_loading_time.summary(),
            model_unloading_time=counters.model_unloading_time.summary(),
            model_cache_hit=counters.model_cache_hit,
            loaded_model_count=counters.loaded_model_count.summary(),
            requests=counters.hits + counters.misses,
            hits=counters.hits,
            joins=counters.joins,
            loads=counters.loads,
            loads_from_disk=counters.loads_from_disk,
            load_failures=counters.load_failures,
            load_failures_by_error=counters.load_failures_by_error,
            refreshes=counters.refreshes,
            rejected=counters.rejected,
            evictions=counters.evictions,
            models=len(ledger.table),
            loading=len(self.flights.airborne),
            copies=len(ledger.copies),
            copies_made=counters.copies_made,
            budget=ledger.budget,
            bytes_resident=ledger.resident,
            bytes_reserved=ledger.reserved,
            bytes_unloading=ledger.unloading,
            bytes_on_disk=tier.bytes if tier is not None else 0,
            lru_age=now - oldest.last_used if oldest is not None else 0.0,
            age_at_eviction=counters.age_at_eviction.summary(),
            workers=tuple(worker.stats() for worker in pool.workers),
            worker_restarts=pool.restarts,
            worker_deaths=counters.worker_deaths,
        )

"""Hot copies: a model whose calls wait in line at a worker that never rests is loaded into a further one.

So is one whose rows do: those of calls that take long, and are sent in slices.

A copy takes only bytes that nobody else needs, and is the first to be evicted when somebody does. It has the version of
its original and leaves with it. Calls are spread by consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2018), the order of the workers being fixed: each call goes to the first whose line is no more than a
quarter longer than the average, so that copies, and the caches of their workers, are left alone when they are not
needed. Slices are for all who have time: see slicing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelcache.attempt import Attempt
from modelcache.cache.entry import Entry, State
from modelcache.cache.flight import DesertedError

if TYPE_CHECKING:
    from modelcache.cache.claims import Claim
    from modelcache.cache.sizes import Bounds
    from modelcache.loader import Loader
    from modelcache.pool.artifacts import LoadedFacts
    from modelcache.pool.pool import Pool, Worker
    from modelcache.residency import Residency
    from modelcache.resident import Resident

_LONG = 8
"""Calls that wait for a worker when its line is called long."""
_MOSTLY = 0.5
"""Share of its time which slices of one model take of a worker that is there for these above all."""
_BUSY, _FREE = 0.8, 0.5
"""Share of the time for which a worker has calls to answer, from which it is what they wait for; and up to which
another can do some of its work."""
_FIRST_PAUSE, _LONGEST_PAUSE = 2, 256
"""Looks between two tries to copy a model: the store is asked each time."""
_TOLERANCE = 1.25
"""How much longer than the average a line may be."""


class Copier:
    """Looks for models whose line stays long, and has them copied."""

    def __init__(self, state: Residency, loader: Loader, pool: Pool) -> None:
        self._state = state
        self._loader = loader
        self._pool = pool
        self._crowded: set[Worker] = set()
        """Those which had too much to do at the last look."""
        self._looks = 0
        self._next_try: dict[Entry[Resident], tuple[int, int]] = {}
        """For models that were to be copied: the look from which on again, and how many to wait after that."""

    def look(self) -> None:
        """Take one look; what is so at two of them in a row has stayed so."""
        self._looks += 1
        self._next_try = {entry: then for entry, then in self._next_try.items() if entry.state is State.READY}
        crowded = {worker for worker in self._pool.up() if worker.busy >= _BUSY and _is_wanted(worker)}
        for worker in crowded & self._crowded:
            entry = self._most_wanted(worker)
            if entry is not None and self._has_room(entry) and self._is_due(entry):
                self._loader.copy(entry)
        self._crowded = crowded

    def _has_room(self, entry: Entry[Resident]) -> bool:
        """Say whether there are bytes that nobody needs, and a worker with time."""
        ledger, target = self._state.ledger, pick_worker(self._pool, entry)
        return ledger.free >= entry.size and not ledger.queue and target is not None and target.busy <= _FREE

    def _is_due(self, entry: Entry[Resident]) -> bool:
        """Say whether it is time to try; each try is followed by twice the pause before it, whatever comes of it."""
        due, pause = self._next_try.get(entry, (0, _FIRST_PAUSE))
        if self._looks < due or self._is_under_way(entry):
            return False
        self._next_try[entry] = self._looks + pause, min(2 * pause, _LONGEST_PAUSE)
        return True

    def _most_wanted(self, worker: Worker) -> Entry[Resident] | None:
        """Return the model that is to be copied, if it is to blame for half of what there is to do, or more."""
        entry = _most_sliced(worker) or _most_waited_for(worker)
        if entry is None:
            return None
        original = entry.original or entry
        return original if original.state is State.READY else None

    def _is_under_way(self, entry: Entry[Resident]) -> bool:
        return any(flight.copies is entry for flight in self._state.flights.airborne)


def _is_wanted(worker: Worker) -> bool:
    return worker.line >= _LONG or max(worker.slices.values(), default=0.0) >= _MOSTLY


def _most_sliced(worker: Worker) -> Entry[Resident] | None:
    """Return the model whose slices kept the worker busy most of the time, if there is one."""
    number = max(worker.slices, key=worker.slices.__getitem__, default=0)
    return worker.held.get(number) if worker.slices.get(number, 0.0) >= _MOSTLY else None


def _most_waited_for(worker: Worker) -> Entry[Resident] | None:
    """Return the model that half of the calls wait for, or more, if there is one."""
    waited_for = [worker.held[number] for number in worker.requests.models_waiting() & worker.held.keys()]
    entry: Entry[Resident] | None = max(waited_for, key=_line, default=None)
    return entry if entry is not None and 2 * _line(entry) >= worker.requests.waiting else None


def _line(entry: Entry[Resident]) -> int:
    return entry.value.waiting


def pick_worker(pool: Pool, entry: Entry[Resident]) -> Worker | None:
    """Return the worker with the most time for a copy of ``entry``, None if all have one."""
    holders = {holder.value.worker for holder in (entry, *entry.copies)}
    others = [worker for worker in pool.up() if worker not in holders]
    return min(others, key=lambda worker: worker.busy, default=None)


def pick_seat(entry: Entry[Resident], limit: int) -> Entry[Resident]:
    """Return which of ``entry`` and its copies the next call is to go to, where ``limit`` calls may wait."""
    seats = (entry, *entry.copies)
    lines = [seat.value.worker.requests.waiting for seat in seats]
    bound = min(limit, _TOLERANCE * (sum(lines) + 1) / len(seats))
    return next((seat for seat, line in zip(seats, lines, strict=True) if line < bound), entry)


class CopyAttempt(Attempt):
    """An attempt at a copy: it displaces nobody, and ends where that would be needed."""

    async def load(self) -> None:
        """Load the copy and put it beside its original."""
        if self.found.source.version != self._original.value.version:
            self._give_way()
        await super().load()

    @property
    def _original(self) -> Entry[Resident]:
        original = self._flight.copies
        assert original is not None
        return original

    async def _claim(self, bounds: Bounds) -> Claim:
        if self._state.ledger.queue or bounds.most > self._state.ledger.free:
            self._give_way()
        return await super()._claim(bounds)

    async def _grow(self, bounds: Bounds) -> None:
        claim = self._flight.claim
        if claim is not None and bounds.most > claim.bytes + self._state.ledger.free:
            self._give_way()
        await super()._grow(bounds)

    async def _choose_worker(self) -> Worker:
        return pick_worker(self._pool, self._original) or self._give_way()

    def _land(self, facts: LoadedFacts) -> None:
        original, claim, worker = self._original, self._flight.claim, self._worker
        assert claim is not None and worker is not None
        if original.state is not State.READY or original.original is not None:
            self._give_way()
        self.place = self._place(facts)
        copy = Entry(original.key, self.place, size=facts.size, cost=original.cost)
        self._state.flights.end(self._flight)
        worker.charged += facts.size - self._charged
        retired = self._state.ledger.settle_copy(claim, copy, original)
        self._state.copied(copy)
        self._state.retire(retired)

    def _give_way(self) -> Any:
        self._state.flights.drop(self._flight)
        raise DesertedError

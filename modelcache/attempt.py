"""One attempt at a load: from an artifact that the store is ready to deliver to a model for everyone who waits.

The steps, each of which may fail or be cancelled, and then gives back what those before it took:

1. for an archive from the store, send its first chunk to a worker, which answers how large the model in it is;
2. claim bytes from the ledger; only now, when the load is known to be possible, may others be evicted for it;
3. stream the rest to the worker as it comes, growing the claim if the artifact is larger than it announced;
4. let the worker parse it, in turn with others where there are calls to be answered;
5. when the worker has loaded and measured it, settle the claim and hand a lease to each waiter, in one step.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from modelcache.cache.entry import Entry
from modelcache.cache.flight import Phase
from modelcache.cache.sizes import Bounds
from modelcache.errors import ModelTooLargeError, StoreUnavailableError
from modelcache.history import Took
from modelcache.origin import Saving
from modelcache.pool.turns import BRIEF
from modelcache.resident import Arrival, Place, Resident
from modelcache.stores.disk_tier import DiskCopy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from modelcache.cache.claims import Claim
    from modelcache.cache.flight import Flight
    from modelcache.calls import Call
    from modelcache.origin import Found
    from modelcache.pool.artifacts import LoadedFacts, Loading
    from modelcache.pool.pool import Pool, Worker
    from modelcache.residency import Residency
_COPY = "copy"

_RAW = (".ubj", ".json", _COPY)
"""Kinds of artifacts whose own size is that of the model."""

_PEEK = 64 << 10
"""Bytes of an archive sent before its bytes are claimed: enough for its headers."""

_LAST = 256 << 10
"""Bytes that may wait for the store to say that they were the last: they travel with the order to load them."""


async def _no_chunks() -> AsyncIterator[bytes]:
    """Nothing passes through here of a local copy, which the worker reads by itself."""
    return
    yield


class OutgrownError(Exception):
    """The claim is too small and must not wait to grow: start again with one of ``needed`` bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class NoRoomError(Exception):
    """Pins leave less than ``needed`` bytes: start again when there is room, holding nothing meanwhile."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class Attempt:
    """What one attempt knows and holds.

    ``needed`` is the number of bytes that an earlier attempt found necessary, 0 if there was none. ``started`` and
    ``asked_at`` say when the store was asked: in seconds of ``perf_counter``, and by the registry's clock.
    """

    def __init__(
        self,
        state: Residency,
        pool: Pool,
        flight: Flight,
        found: Found,
        *,
        needed: int,
        started: float,
        asked_at: float,
        copy_to: Path | None,
    ) -> None:
        self.found = found
        self.saving: Saving | None = None
        """The copy that a worker has been told to make."""
        self.place: Resident
        """What has been loaded, once it is."""
        self._state = state
        self._pool = pool
        self._flight = flight
        self._source = source = found.source
        self._copy_to = copy_to
        self._kind = _COPY if isinstance(source, DiskCopy) else source.suffix
        """What its size is estimated by."""
        self._chunks: AsyncIterator[bytes] = _no_chunks() if isinstance(source, DiskCopy) else aiter(source.chunks)
        self._needed = needed
        self._started = started
        self._asked_at = asked_at
        self._worker: Worker | None = None
        self._loading: Loading | None = None
        self._ahead: Call | None = None
        """Whose row has been sent: the flight's may be another's by the time it is answered."""
        self._charged = 0
        """Bytes that the worker's account shows for it."""
        self._held_back = b""
        """What is left of the first chunk until its bytes are claimed."""
        self._received = source.artifact_bytes if isinstance(source, DiskCopy) else 0
        """Bytes that the store has delivered, now or when the copy was made."""
        self._queued = 0.0
        """Seconds of waiting for bytes: no cost of the model."""
        self._downloading = 0.0

    async def scout(self) -> Bounds:
        """Find out what the model takes, without claiming anything for it."""
        took = self._state.history.took(self._flight.key, self._source.version)
        if took is not None:
            return Bounds(took.size, took.size)
        return self._bounds(await self._unpacked_bytes())

    async def load(self) -> None:
        """Load the model and give everyone who waits a lease."""
        await self._prepare()
        last = await self._stream()
        asked = time.perf_counter()
        async with self._turn():
            self._queued += time.perf_counter() - asked
            self._finish(last)
            facts = await self._outcome()
        took = Took(facts.size, facts.unpacked_bytes, facts.model.is_steady(facts.size))
        self._state.history.measured(self._flight.key, self._source.version, took)
        self._state.sizes.learn(self._kind, unpacked=took.unpacked, measured=took.size)
        await self._grow(Bounds(facts.size, facts.size))
        assert self._worker is not None
        self._worker.check_alive()  # it may have ended while the claim waited to grow
        self._land(facts)

    # Bytes

    async def _prepare(self) -> None:
        """Claim the bytes that the load needs, and begin it."""
        sizes, kind = self._state.sizes, self._kind
        took = self._state.history.took(self._flight.key, self._source.version)
        known, unpacked, is_steady = took or (0, 0, False)
        if known or self._needed:
            claim = await self._claim(Bounds(known, max(known, self._needed)))
            # What a small model takes beyond its ratio is in the measured bytes already: without the second figure
            # the worker would ask for more than was measured, and others would be evicted for it in vain.
            # The same version in as many bytes is the same model, and need not be weighed again.
            weighed = known if is_steady and unpacked == self._source.size else 0
            await self._begin(max(sizes.unpacked_within(claim.bytes, kind), unpacked), weighed)
            return
        unpacked = await self._unpacked_bytes()
        await self._claim(self._bounds(unpacked))
        if self._loading is None:
            await self._begin(unpacked)
        else:
            self._grant(unpacked)

    async def _unpacked_bytes(self) -> int:
        """Return the size of the model as the artifact announces it; of an archive, the worker reads it."""
        if self._kind in _RAW and self._source.size:
            return self._source.size
        loading = await self._begin(0)
        chunk = await anext(self._chunks, b"")
        await self._feed(chunk[:_PEEK])
        self._held_back = chunk[_PEEK:]
        await loading.news()
        if loading.error is not None:
            raise loading.error
        return loading.needed

    def _bounds(self, unpacked: int) -> Bounds:
        return self._state.sizes.bounds(unpacked, self._kind)

    async def _claim(self, bounds: Bounds) -> Claim:
        """Wait for the upper bound, or for all the bytes there are if the model may yet fit into them."""
        flight = self._flight
        granted = False
        while not granted:  # again, if a group has claimed for it, or there is less room than there was
            self._check_fits(bounds.least, "Nothing was evicted for it.")
            if flight.reserve is not None:
                flight.claim, flight.reserve = flight.reserve, None
                flight.needed = flight.claim.bytes
                await self._grow(Bounds(bounds.least, bounds.least))
                granted = True
            else:
                granted = await self._queue_for(bounds)
        flight.phase = Phase.LOADING
        self._charge()
        assert flight.claim is not None
        return flight.claim

    async def _queue_for(self, bounds: Bounds) -> bool:
        ledger, flight = self._state.ledger, self._flight
        flight.needed = min(bounds.most, self._room_for(bounds.least))
        promise: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        flight.claim, retired = ledger.claim(flight.key, flight.needed, promise, flight.renews)
        self._state.retire(retired)
        if not promise.done():
            self._state.flights.wait(flight, Phase.STARVED)
        return await self._wait_for(promise)

    async def _grow(self, bounds: Bounds) -> None:
        """Enlarge the claim to the upper bound, as far as there is room beside what is pinned."""
        claim, ledger = self._flight.claim, self._state.ledger
        assert claim is not None
        self._check_fits(bounds.least)
        size = min(bounds.most, self._room_for(bounds.least))
        if size > claim.bytes:
            promise: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._state.retire(ledger.grow(claim, size, promise))
            if not await self._wait_for(promise):
                raise OutgrownError(size)
        self._charge()

    def _room_for(self, least: int) -> int:
        """Return the most it can get, ``least`` or more, beside the version it renews if there is room for both."""
        room, older = self._state.ledger.room, self._flight.renews
        if least > room:
            raise NoRoomError(least)
        beside = room - (older.size if older is not None and not older.pinned else 0)
        return beside if least <= beside else room

    async def _wait_for(self, promise: asyncio.Future[bool]) -> bool:
        started = time.perf_counter()
        result = await promise
        self._queued += time.perf_counter() - started
        return result

    def _check_fits(self, least: int, remark: str = "") -> None:
        budget, key = self._state.ledger.budget, self._flight.key
        if least > budget:
            raise ModelTooLargeError(
                f"{key} takes {least:,} bytes or more, and the whole memory budget is {budget:,}: "
                f"raise memory_budget. {remark}".rstrip(),
                model=key, needed=least, budget=budget,
            )  # fmt: skip

    def _charge(self) -> None:
        """Show the claim in the worker's account, by which others are placed."""
        claim = self._flight.claim
        if self._worker is not None and claim is not None:
            self._worker.charged += claim.bytes - self._charged
            self._charged = claim.bytes

    # The worker

    async def _begin(self, allowed: int, weighed: int = 0) -> Loading:
        self._worker = await self._choose_worker()
        number, source = self._pool.next_number(), self._source
        if isinstance(source, DiskCopy):
            self._loading = self._worker.open_copy(number, allowed, source.location, source.digest, weighed)
        else:
            save = str(self._copy_to) if self._copy_to is not None else None
            self._loading = self._worker.begin_load(number, allowed, source.digest, save)
        if self._loading.saved is not None and self._copy_to is not None:
            self.saving = Saving(self._copy_to, self._loading.saved)
        self._charge()
        return self._loading

    async def _choose_worker(self) -> Worker:
        return await self._pool.place()

    def _grant(self, unpacked: int) -> None:
        assert self._loading is not None and self._flight.claim is not None
        within = self._state.sizes.unpacked_within(self._flight.claim.bytes, self._kind)
        self._loading.grant(max(unpacked, within))

    async def _feed(self, chunk: bytes) -> None:
        assert self._loading is not None
        self._received += len(chunk)
        if self._source.size is not None and self._received > self._source.size:
            raise StoreUnavailableError(
                f"The store delivers more than the {self._source.size:,} bytes it announced.",
                model=self._flight.key,
            )
        self._downloading = self._elapsed()
        await self._loading.feed(chunk)

    async def _stream(self) -> bytes:
        """Pass the chunks on as they come, all of them, or the load fails; return what is to be sent with the end."""
        loading, size = self._loading, self._source.size
        assert loading is not None
        if isinstance(self._source, DiskCopy):  # the worker reads it by itself, and checks it
            return b""
        if self._held_back:
            await self._feed(self._held_back)
        last = b""
        async for chunk in self._chunks:
            if chunk and len(chunk) <= _LAST and self._received + len(chunk) == size:
                self._received, last = size, bytes(chunk)  # if nothing follows, as it should
                continue
            await self._feed(chunk)
            await self._satisfy()
            if loading.decided:
                return b""
        self._check_complete()
        return last

    def _turn(self) -> AbstractAsyncContextManager[None]:
        """Return what lets the worker parse a small model when it is its turn."""
        assert self._flight.claim is not None
        return self._pool.turns.turn() if self._flight.claim.bytes <= BRIEF else nullcontext()

    def _finish(self, last: bytes) -> None:
        """Let the worker parse the model, and try it on the row of a call that waits for it."""
        assert self._loading is not None
        if self._loading.decided:
            return
        call = self._flight.call
        self._ahead = call if call is not None and not call.expired else None
        self._loading.finish(last, self._ahead.matrix if self._ahead is not None else None)

    def _check_complete(self) -> None:
        """Refuse what is shorter than announced."""
        self._downloading = self._elapsed()
        size = self._source.size
        if size is not None and self._received != size:
            raise StoreUnavailableError(
                f"The store delivered {self._received:,} of the {size:,} bytes it announced.", model=self._flight.key
            )

    async def _outcome(self) -> LoadedFacts:
        loading = self._loading
        assert loading is not None
        while not loading.decided:
            await loading.news()
            await self._satisfy()
        if loading.error is not None:
            raise loading.error
        assert loading.result is not None
        return loading.result

    async def _satisfy(self) -> None:
        """Grow the claim if the worker has asked for it."""
        loading = self._loading
        if loading is not None and loading.needed and not loading.decided:
            needed, asked = loading.needed, loading.asked
            await self._grow(Bounds(self._bounds(needed).least, self._bounds(asked).most))
            self._grant(needed)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started - self._queued

    # The end

    def _land(self, facts: LoadedFacts) -> None:
        """Make the model resident and hand everyone who waits a lease; one step."""
        state, flight, claim = self._state, self._flight, self._flight.claim
        assert self._worker and self._loading and claim
        self.place = place = self._place(facts)
        older = state.ledger.table.get(flight.key)
        if flight.listed and older is not None:
            place.rare = replace(place.rare, replaced=older.value.version)
        waiters = state.flights.land(flight)
        entry = Entry(flight.key, place, size=facts.size, cost=state.cost_of(flight.key, place.arrival.load_seconds))
        entry.past_hits = state.hits_of(flight.key)
        entry.leases = len(waiters)
        entry.pinned = flight.listed and flight.key in state.pinned
        self._worker.charged += facts.size - self._charged
        retired = state.ledger.settle(claim, entry, listed=flight.listed)
        state.failures.forget(flight.key)
        if self._ahead is not None and self._loading.answer is not None:
            self._ahead.answer(self._loading.answer, entry)
        for waiter in waiters:
            waiter.set_result(entry)
        state.settled(entry)  # tells the subscribers, who may do anything, such as cancel one of those who waited
        state.retire(retired)

    def _place(self, facts: LoadedFacts) -> Resident:
        assert self._worker and self._loading
        source = self._source
        arrival = Arrival(
            self._received, facts.unpacked_bytes, self._downloading, self._elapsed(), time.time(),
            checked_at=self._asked_at - self.found.age,
        )  # fmt: skip
        place = Resident(
            self._worker, self._loading.model, source.version, source.suffix, facts.model, arrival.pack(),
            tier=self.found.tier,
        )  # fmt: skip
        if self.found.doubt is not None:
            place.rare = replace(place.rare, doubt=self.found.doubt)
        return place

    @property
    def blame(self) -> float:
        """Its share in the crash of its worker, if there was one."""
        return self._loading.blame if self._loading is not None else 0.0

    def end_parsing(self) -> bool:
        """Kill the worker if its parser is at this artifact still, past load_timeout; return whether it was.

        Nothing else ends a parser, and whatever that worker is to load after it would wait in vain.
        """
        loading = self._loading
        if self._worker is None or loading is None or not loading.parsing or loading.decided:
            return False
        self._worker.process.kill(f"it was still parsing {self._flight.key} after load_timeout")
        return True

    def give_up(self) -> None:
        """Give back what it took; bytes that a worker may hold, only when it has freed them."""
        state, flight, worker, loading = self._state, self._flight, self._worker, self._loading
        claim = flight.claim
        in_worker = worker is not None and loading is not None and loading.error is None and not worker.gone
        if worker is not None and loading is not None and in_worker:
            worker.forget_load(loading)
            if claim is not None and claim.granted:
                self._charge()  # it may have grown in the tick of the cancellation
                flight.claim = None
                state.retire(state.ledger.abandon(claim, Place(worker, loading.model)))
                return
            worker.unload(loading.model)
        if worker is not None:
            worker.charged -= self._charged
        if claim is not None:
            flight.claim = None
            state.retire(state.ledger.give_back(claim))

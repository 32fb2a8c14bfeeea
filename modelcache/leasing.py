"""Leases: how a call comes to hold a model, at once when it is resident and by a flight when it is not."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from modelcache.cache.entry import Entry, State
from modelcache.cache.flight import Flight, Phase
from modelcache.copying import pick_seat
from modelcache.errors import LoadTimeoutError, ModelCacheError
from modelcache.names import SUFFIXES, check_name, spellings, split_suffix

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelcache.cache.claims import Claim
    from modelcache.cache.sizes import Bounds
    from modelcache.calls import Call
    from modelcache.lifecycle import Lifecycle
    from modelcache.loader import Loader
    from modelcache.residency import Residency
    from modelcache.resident import Resident


class Boarding(NamedTuple):
    """One who waits for a flight."""

    flight: Flight
    waiter: asyncio.Future[Entry[Resident]]


class Leasing:
    """Gives out leases and takes them back."""

    def __init__(self, state: Residency, loader: Loader, life: Lifecycle) -> None:
        self._state = state
        self._loader = loader
        self._life = life
        self._quiet: asyncio.Future[None] | None = None
        """Resolved when the last lease ends, while the registry closes."""

    def take_resident(self, name: str, call: Call | None = None) -> Entry[Resident] | None:
        """Lease ``name`` if it is resident: so a warm call begins, without an await.

        The hit is counted; by ``call``, if it is given, when its rows are on their way.
        """
        if asyncio.get_running_loop() is not self._life.loop:
            return None  # not started, closed, or another loop: the cold path finds out which
        ledger = self._state.ledger
        try:
            entry = ledger.table.get(name) or self.find(name)
        except TypeError:
            return None  # no text, and not even hashable: the cold path says so
        if entry is not None:
            ledger.lease(entry)
            if call is None:
                self.count_hit(entry)
            else:
                call.hit = self.count_hit
        return entry

    def count_hit(self, entry: Entry[Resident]) -> None:
        """A call uses a resident model, which may have to be asked about again."""
        self._state.ledger.hit(entry)
        self._state.counters.hits += 1
        if entry.last_used >= entry.value.trusted_until:
            self._revalidate(entry)

    async def take(self, name: str, deadline: float = 0.0) -> Entry[Resident]:
        """Lease ``name``, loading it if it is not resident; ``deadline`` is monotonic, 0.0 for none."""
        return self.take_resident(name) or await self.take_cold(name, deadline)

    async def take_cold(self, name: str, deadline: float, call: Call | None = None) -> Entry[Resident]:
        """Join the flight of ``name``, or start one, and return the lease it gives. The registry has started.

        ``call`` may be answered with it: then it knows.
        """
        check_name(name)
        self._check_not_refused(name)
        started = time.perf_counter()
        entry = await self._wait_for_flight(name, deadline, call)
        self._state.counters.model_loading_wait_time.record(time.perf_counter() - started)
        return entry

    def release(self, entry: Entry[Resident]) -> None:
        """End a lease."""
        self._state.release(entry)
        if self._quiet is not None and not self._state.ledger.leases and not self._quiet.done():
            self._quiet.set_result(None)

    def seat(self, entry: Entry[Resident], limit: int) -> Entry[Resident]:
        """Lease ``entry`` or one of its copies, whichever is to answer the next call."""
        seat = pick_seat(entry, limit)
        self._state.ledger.lease(seat)
        return seat

    def helpers(self, seat: Entry[Resident]) -> Helpers:
        """Return the workers that hold what ``seat`` does, for a call that is asked there and takes long."""
        return Helpers(self._state, seat, self.release)

    def find(self, name: str) -> Entry[Resident] | None:
        """Return the resident model that ``name`` means, also when it is listed with, or without, its suffix."""
        if not isinstance(name, str):
            return None
        table = self._state.ledger.table
        entry: Entry[Resident] | None = table.get(name)
        if entry is not None:
            return entry
        stem, suffix = split_suffix(name)
        if not suffix:
            return table.get(name + SUFFIXES[0])  # the first that a store looks for
        if split_suffix(stem)[1]:
            return None  # "a.ubj.ubj" is another file than "a.ubj"
        entry = table.get(stem)
        return entry if entry is not None and entry.value.suffix == suffix else None

    def spellings(self, name: str) -> list[str]:
        """Return the names under which the artifact of ``name`` may be resident or loading."""
        stem, suffix = split_suffix(name)
        other = self._state.ledger.table.get(stem)
        return [name] if suffix and other is not None and other.value.suffix != suffix else spellings(name)

    async def drained(self, seconds: float) -> None:
        """Wait until no lease is left, for ``seconds`` at most."""
        if self._state.ledger.leases:
            self._quiet = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._quiet,), timeout=seconds)

    def board(self, name: str, part: Claim | None = None, call: Call | None = None) -> Boarding:
        """Wait for the flight of ``name``, which is started if there is none.

        ``part``: the bytes that a group, which holds other models meanwhile, has been granted for it. ``call`` is what
        the model is wanted for: the first that may go ahead, and whose time is not over, is answered as the flight
        lands.
        """
        flights, counters = self._state.flights, self._state.counters
        counters.misses += 1
        counters.joins += name in flights.by_key
        boarding = self._join(name, call=call)
        if part is not None:
            boarding.flight.group_waiters.add(boarding.waiter)
            self._loader.endow(boarding.flight, part)
        return boarding

    def _join(
        self,
        name: str,
        *,
        fresh: bool = False,
        renews: Entry[Resident] | None = None,
        wanted: bool = True,
        call: Call | None = None,
    ) -> Boarding:
        waiter: asyncio.Future[Entry[Resident]] = asyncio.get_running_loop().create_future()
        flight, is_new = self._state.flights.join(name, waiter)
        flight.fresh = flight.fresh or fresh
        flight.renews = renews or flight.renews
        if call is not None and call.may_go_ahead and (flight.call is None or flight.call.expired):
            flight.call = call
        flight.wanted = flight.wanted or wanted
        if is_new:  # an eager task runs at once: it has to know all this by now
            self._loader.start(flight)
        return Boarding(flight, waiter)

    async def refresh(self, name: str) -> Entry[Resident]:
        """Ask the store for ``name`` now, and return a lease on the version it has."""
        waited_for: str | None = None
        """A key: what flies under it by now has asked after this call."""
        while True:
            self._life.check()
            resident = self.find(name) or self._find_by_any_spelling(name)
            key = name if resident is None else resident.key
            flight = self._state.flights.by_key.get(key)
            if flight is None or not flight.has_asked or (flight.fresh and key == waited_for):
                return await self._wait_to_the_end(self._board_refresh(key, resident))
            if flight.fresh:  # its answer may be older than this call: let it land, and ask again
                waited_for = key
                with suppress(ModelCacheError):
                    self.release(await self._wait_to_the_end(self._join(key)))
            else:
                self._state.flights.detach(key)

    def _find_by_any_spelling(self, name: str) -> Entry[Resident] | None:
        table = self._state.ledger.table
        return next((table[key] for key in self.spellings(name) if key in table), None)

    def _board_refresh(self, key: str, resident: Entry[Resident] | None, *, wanted: bool = True) -> Boarding:
        """Wait for what the store has of ``key`` now; a model that is resident serves on meanwhile.

        ``wanted``: also if it is resident no more by then.
        """
        self._state.failures.forget(key)
        if resident is not None:
            resident.value.trusted_until = inf  # while it is being asked about
        return self._join(key, fresh=True, renews=resident, wanted=wanted)

    def _revalidate(self, entry: Entry[Resident]) -> None:
        """Ask the store for a newer version in the background; this call, and those that come, have ``entry``."""
        if entry.state is not State.READY or entry.key in self._state.flights.by_key:
            return

        def end(waiter: asyncio.Future[Entry[Resident]]) -> None:
            if waiter.exception() is None:
                self.release(waiter.result())

        self._board_refresh(entry.key, entry, wanted=False).waiter.add_done_callback(end)

    async def scout(self, name: str) -> Bounds:
        """Return what ``name`` takes, as far as the store's first bytes tell; raises what a load of it would."""
        self._check_not_refused(name)
        waiter: asyncio.Future[Bounds] = asyncio.get_running_loop().create_future()
        flight = self._state.flights.scout(name, waiter)
        self._loader.start(flight)
        try:
            return await waiter
        finally:
            if self._state.flights.leave(flight, waiter):
                flight.task.cancel()

    def leave(self, boarding: Boarding) -> None:
        """Wait no more; a lease that was handed over already is the caller's to keep."""
        if self._state.flights.leave(boarding.flight, boarding.waiter):
            boarding.flight.task.cancel()

    def give_up(self, boarding: Boarding) -> None:
        """Wait no more, and release the lease if it was handed over already."""
        waiter = boarding.waiter
        if not waiter.cancel() and not waiter.cancelled() and waiter.exception() is None:
            self.release(waiter.result())
        self.leave(boarding)

    def _check_not_refused(self, name: str) -> None:
        refused = self._state.failures.recall(name)
        if refused is not None:
            raise refused.fresh()

    async def _wait_for_flight(self, name: str, deadline: float, call: Call | None) -> Entry[Resident]:
        boarding = self.board(name, call=call)
        if not deadline:
            return await self._wait_to_the_end(boarding)
        seconds = max(0.0, deadline - time.monotonic())
        timer = asyncio.get_running_loop().call_later(seconds, self._expire, boarding)
        try:
            return await self._wait_to_the_end(boarding)
        finally:
            timer.cancel()

    async def _wait_to_the_end(self, boarding: Boarding) -> Entry[Resident]:
        try:
            return await boarding.waiter
        except asyncio.CancelledError:
            self.give_up(boarding)
            raise
        finally:
            self.leave(boarding)

    def _expire(self, boarding: Boarding) -> None:
        flight, waiter = boarding
        if waiter.done():
            return
        if flight.phase is Phase.STARVED:
            waiter.set_exception(self._state.no_room(flight.key, flight.needed, "the timeout"))
            return
        goes_on = flight.phase is Phase.LOADING or len(flight.live_waiters()) > 1
        what_follows = "the load goes on, and a later call may find it resident" if goes_on else "the load is given up"
        past = self._state.history.of(flight.key)
        waiter.set_exception(
            LoadTimeoutError(
                f"{flight.key} is still {flight.phase.value}; {what_follows}. "
                "Give the first call more time, or preload().",
                model=flight.key,
                retry_after=past.load_seconds if past else None,
            )
        )


class Helpers:
    """The other workers that hold the model of a ``seat``, which come and go; see slicing.py."""

    def __init__(self, state: Residency, seat: Entry[Resident], release: Callable[[Entry[Resident]], None]) -> None:
        self._ledger = state.ledger
        self._seat = seat
        self.release = release

    def free(self) -> list[Entry[Resident]]:
        """Return what is in them, nothing where bytes are waited for: copies are the first to give way."""
        if self._ledger.queue or self._ledger.free < 0:
            return []
        original = self._seat.original or self._seat
        seats = (original, *original.copies)
        return [other for other in seats if other is not self._seat and other.state is State.READY]

    def lease(self, entry: Entry[Resident]) -> None:
        """Keep it where it is."""
        self._ledger.lease(entry)

"""Flies flights: from a load slot and the store's answer to attempts, until the load is decided.

What one attempt does is told in attempt.py. A flight that can get no bytes because of pins parks: it gives up its slot
and its artifact, and makes another attempt when there is room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from modelcache.attempt import Attempt, NoRoomError, OutgrownError
from modelcache.cache.entry import State
from modelcache.cache.flight import DesertedError, Phase
from modelcache.copying import CopyAttempt
from modelcache.errors import (
    ArtifactChangedError,
    BudgetTimeoutError,
    LoadTimeoutError,
    ModelCacheError,
    ModelLoadError,
    ModelNotFoundError,
    ModelTooLargeError,
    RegistryClosedError,
    StoreError,
    WorkerCrashedError,
)
from modelcache.origin import MEANT_FOR_ALL, DamagedCopyError, is_being_cancelled
from modelcache.pool.lost import WorkerLostError
from modelcache.quarantine import CRASHES_FORGIVEN, Quarantine
from modelcache.slots import Slots
from modelcache.stores.base import NotModified
from modelcache.stores.disk_tier import DiskCopy

if TYPE_CHECKING:
    from modelcache.cache.claims import Claim
    from modelcache.cache.entry import Entry
    from modelcache.cache.flight import Flight
    from modelcache.origin import Origin
    from modelcache.pool.pool import Pool
    from modelcache.residency import Residency
    from modelcache.resident import Resident

logger = logging.getLogger("modelcache")

_NEVER_REMEMBERED = (ModelTooLargeError, BudgetTimeoutError, RegistryClosedError)

_CHANGES_FOLLOWED = 5
"""So many times a load begins again because the artifact was replaced meanwhile."""

_LOSSES_FORGIVEN = 8
"""So many workers may end while a load waits for their parser or is streamed to them. Nearly always that is over
something else; but unpacking may exhaust the memory there is, and must not end one worker after the other."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a load is tried in a third worker, and the most that the doubling pauses after it grow to."""


class LeftMeanwhileError(Exception):
    """The version that was to be renewed is current, and has left the memory while the store was asked."""


class Loader:
    """Brings models from their ``origin`` into the workers of ``pool``; ``timeout`` is in seconds, for one load."""

    def __init__(self, state: Residency, origin: Origin, pool: Pool, *, concurrency: int, timeout: float) -> None:
        self._state = state
        self._origin = origin
        self._pool = pool
        self._slots = Slots(concurrency, state.flights)
        self._slots_to_renew = Slots(max(1, concurrency // 4), state.flights)
        """Apart, so that a store which does not answer questions about resident models holds up no cold one. Copies
        take theirs from here, too."""
        self.timeout = timeout
        self.quarantine = Quarantine()
        self.tasks: set[asyncio.Task[None]] = set()
        """All that fly, or have landed and still have to let go of their artifact, or to keep a copy of it."""

    def start(self, flight: Flight) -> None:
        """Fly ``flight`` in a task of its own."""
        task = flight.task = asyncio.create_task(self._fly(flight), name=f"modelcache load {flight.key}")
        self.tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            # Here, as a task that is cancelled at once never runs.
            self._state.note_end_of_renewal(flight)
            if flight.reserve is not None:  # in vain
                self._state.retire(self._state.ledger.give_back(flight.reserve))

        task.add_done_callback(ended)

    def copy(self, entry: Entry[Resident]) -> None:
        """Bring ``entry`` into a further worker, if there are bytes for it that nobody needs."""
        self.start(self._state.flights.copy(entry))

    def endow(self, flight: Flight, part: Claim) -> None:
        """Give ``flight`` bytes that a group has been granted for it, unless it has some already."""
        ledger = self._state.ledger
        if flight.reserve is not None:
            self._state.retire(ledger.give_back(part))
            return
        flight.reserve = part
        self._slots.exempt(flight)
        self._slots_to_renew.exempt(flight)
        if flight.claim is not None:
            self._state.retire(ledger.refuse(flight.claim))

    def cancel(self) -> None:
        """Ask all loads to end."""
        for flight in self._state.flights.airborne:
            flight.task.cancel()

    async def ended(self, patience: float) -> None:
        """Wait until they have, and no longer than ``patience`` seconds for a store that does not let go of one."""
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=patience)
        for flight in tuple(self._state.flights.airborne):
            self._state.flights.fail(flight, _closed(flight))

    async def _fly(self, flight: Flight) -> None:
        landed = await self._try_to_land(flight)
        if landed is not None and landed.saving is not None:
            found, arrival = landed.found, landed.place.arrival
            received, cost = arrival.artifact_bytes, arrival.load_seconds
            await self._origin.keep(flight.key, found, landed.saving, received=received, cost=cost)

    async def _try_to_land(self, flight: Flight) -> Attempt | None:
        try:
            return await self._bring(flight)
        except asyncio.CancelledError as error:
            if not is_being_cancelled():
                self._fail(flight, _store_error(flight.key, error))
                return None
            self._state.flights.fail(flight, _closed(flight))
            raise
        except DesertedError:
            pass
        except ModelCacheError as error:
            self._fail(flight, error)
        except BaseException as error:  # a store is anybody's code
            self._fail(flight, _store_error(flight.key, error))
            if isinstance(error, MEANT_FOR_ALL):
                raise
        return None

    def _fail(self, flight: Flight, error: ModelCacheError) -> None:
        if error.model is None:
            error.model = flight.key
        self._state.flights.fail(flight, error)
        serves_on = flight.copies is not None or self._state.not_renewed(flight, error)
        if (flight.listed or flight.scouts) and not serves_on and not isinstance(error, _NEVER_REMEMBERED):
            # A name that is not there yet may be about to be copied in: never wait long before looking again.
            doubling = not isinstance(error, ModelNotFoundError)
            self._state.failures.remember(flight.key, error, doubling=doubling)
        self._state.failed(flight.key, error, serves_on=serves_on)

    async def _bring(self, flight: Flight) -> Attempt | None:
        """Attempt the load until it is decided, within the load timeout; return what has landed a model, if any has."""
        needed = losses = crashes = 0
        deadline = 0.0
        while True:
            try:
                slots = self._slots if flight.renews is None and flight.copies is None else self._slots_to_renew
                async with slots.slot(flight):
                    deadline = deadline or asyncio.get_running_loop().time() + self.timeout
                    return await self._attempt_by(deadline, flight, needed)
            except OutgrownError as outgrown:
                needed = outgrown.needed
            except NoRoomError as full:
                await self._park(flight, full.needed, deadline)
            except WorkerLostError as lost:
                losses += 1
                crashes += lost.parsing
                if crashes > CRASHES_FORGIVEN or losses > _LOSSES_FORGIVEN:
                    raise _crashed(flight.key, lost, losses) from lost
                await asyncio.sleep(_pause(losses))

    async def _attempt_by(self, deadline: float, flight: Flight, needed: int) -> Attempt | None:
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await self._attempt_current(flight, needed, limit)
        except TimeoutError as error:
            if not limit.expired():
                raise  # the store's own
            raise self._timed_out(flight) from error

    async def _park(self, flight: Flight, needed: int, deadline: float) -> None:
        """Wait, with nothing in hand, until pins leave room for ``needed`` bytes."""
        flight.needed = needed
        self._state.flights.wait(flight, Phase.STARVED)
        ledger = self._state.ledger
        promise: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        ledger.wait_for_room(needed, promise)
        try:
            async with asyncio.timeout_at(deadline):
                await promise
        except TimeoutError as error:
            raise self._timed_out(flight) from error
        finally:
            ledger.parked.pop(promise, None)

    async def _attempt_current(self, flight: Flight, needed: int, limit: asyncio.Timeout) -> Attempt | None:
        """Attempt the load of the version that is current, again if that is replaced or gone meanwhile."""
        for _ in range(_CHANGES_FOLLOWED):
            with suppress(ArtifactChangedError, DamagedCopyError, LeftMeanwhileError):
                return await self._attempt(flight, needed, limit)
        return await self._attempt(flight, needed, limit)

    async def _attempt(self, flight: Flight, needed: int, limit: asyncio.Timeout) -> Attempt | None:
        """Return the attempt if it has landed a model; None if the flight has ended without one."""
        started, asked_at = time.perf_counter(), self._state.clock()
        flight.phase = Phase.LOADING
        held = flight.renews.value.version if flight.renews and flight.renews.state is State.READY else None
        found = await self._origin.find(flight.key, held=held, fresh=flight.fresh)
        if isinstance(found, NotModified):
            self._confirm(flight)
            return None
        try:
            self.quarantine.check(flight.key, found.source.version)
            if found.source.version == held:
                self._confirm(flight)
                return None
            attempt = (Attempt if flight.copies is None else CopyAttempt)(
                self._state, self._pool, flight, found, needed=needed, started=started, asked_at=asked_at,
                copy_to=self._origin.incoming(found),
            )  # fmt: skip
            return await self._carry_out(flight, attempt, limit)
        finally:
            await found.let_go()

    async def _carry_out(self, flight: Flight, attempt: Attempt, limit: asyncio.Timeout) -> Attempt | None:
        """Return the attempt if it has landed a model; None if it was to find out what that takes."""
        try:
            if not flight.scouts:
                await attempt.load()
                return attempt
            bounds = await attempt.scout()
            attempt.give_up()
            self._state.flights.report(flight, bounds)
        except BaseException as error:
            # A load that is cancelled, as the registry is being closed, is no endless one.
            if limit.expired() and attempt.end_parsing():
                self.quarantine.blame(flight.key, attempt.found.source.version, 1.0)
            await self._give_up(flight, attempt, error)
            raise
        return None

    def _confirm(self, flight: Flight) -> None:
        """End the flight with the version that it was to renew."""
        if not self._state.confirm(flight):
            raise LeftMeanwhileError

    async def _give_up(self, flight: Flight, attempt: Attempt, error: BaseException) -> None:
        attempt.give_up()
        if attempt.saving is not None:
            self._origin.abandon(attempt.saving)
        source = attempt.found.source
        if isinstance(error, WorkerLostError) and attempt.blame:
            self.quarantine.blame(flight.key, source.version, attempt.blame)
        if isinstance(error, ModelLoadError) and isinstance(source, DiskCopy):
            await self._origin.drop(source, error)

    def _timed_out(self, flight: Flight) -> ModelCacheError:
        if flight.phase is Phase.STARVED:
            return self._state.no_room(flight.key, flight.needed, f"{self.timeout:g} s (load_timeout)")
        return LoadTimeoutError(
            f"Loading {flight.key} took more than {self.timeout:g} s (load_timeout).", model=flight.key
        )


def _store_error(key: str, error: BaseException) -> StoreError:
    wrapped = StoreError(f"The store failed: {type(error).__name__}: {error}.", model=key)
    wrapped.__cause__ = error
    return wrapped


def _closed(flight: Flight) -> RegistryClosedError:
    return RegistryClosedError("The registry was closed while this model was loading.", model=flight.key)


def _pause(losses: int) -> float:
    """Return the seconds to wait after so many workers: nothing after the first, as others are up or nearly so."""
    return min(_FIRST_PAUSE * 2 ** (losses - 2), _LONGEST_PAUSE) if losses > 1 else 0.0


def _crashed(key: str, lost: WorkerLostError, losses: int) -> WorkerCrashedError:
    epitaph = lost.epitaph
    return WorkerCrashedError(
        f"{'Two' if lost.parsing else losses} workers ended while {key} was loading: {epitaph}.",
        model=key, pid=epitaph.pid, signal=epitaph.signal, exit_code=epitaph.exit_code,
    )  # fmt: skip

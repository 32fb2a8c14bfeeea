"""Flies flights: from a load slot and the store's answer to attempts, until the load is decided.

What one attempt does is told in attempt.py. A flight that can get no bytes because of pins parks: it gives up its slot
and its artifact, and makes another attempt when there is room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from modelcache.attempt import Attempt, NoRoomError, OutgrownError
from modelcache.cache.entry import State
from modelcache.cache.flight import DesertedError, Phase
from modelcache.errors import (
    BudgetTimeoutError,
    LoadTimeoutError,
    ModelCacheError,
    ModelNotFoundError,
    ModelTooLargeError,
    RegistryClosedError,
    StoreError,
    WorkerCrashedError,
)
from modelcache.pool.lost import WorkerLostError
from modelcache.quarantine import CRASHES_FORGIVEN, Quarantine
from modelcache.slots import Slots
from modelcache.stores.base import Artifact, NotModified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modelcache.cache.claims import Claim
    from modelcache.cache.flight import Flight
    from modelcache.pool.pool import Pool
    from modelcache.residency import Residency
    from modelcache.stores.base import ArtifactStore

logger = logging.getLogger("modelcache")

_NEVER_REMEMBERED = (ModelTooLargeError, BudgetTimeoutError, RegistryClosedError)

_MEANT_FOR_ALL = (KeyboardInterrupt, SystemExit)

_ACLOSE_TIMEOUT = 10.0
"""Seconds for a store to let go of an artifact."""


class Loader:
    """Brings models from ``store`` into the workers of ``pool``; ``timeout`` is in seconds, for one load."""

    def __init__(self, state: Residency, store: ArtifactStore, pool: Pool, *, concurrency: int, timeout: float) -> None:
        self._state = state
        self._store = store
        self._pool = pool
        self._slots = Slots(concurrency, state.flights)
        self.timeout = timeout
        self.quarantine = Quarantine()
        self.tasks: set[asyncio.Task[None]] = set()
        """All that fly, or have landed and still have to let go of their artifact."""

    def start(self, flight: Flight) -> None:
        """Fly ``flight`` in a task of its own."""
        task = flight.task = asyncio.create_task(self._fly(flight), name=f"modelcache load {flight.key}")
        self.tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            # Here, as a task that is cancelled at once never runs.
            self._state.unshield(flight)
            if flight.reserve is not None:  # in vain
                self._state.retire(self._state.ledger.give_back(flight.reserve))

        task.add_done_callback(ended)

    def endow(self, flight: Flight, part: Claim) -> None:
        """Give ``flight`` bytes that a group has been granted for it, unless it has some already."""
        ledger = self._state.ledger
        if flight.reserve is not None:
            self._state.retire(ledger.give_back(part))
            return
        flight.reserve = part
        self._slots.exempt(flight)
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
        try:
            await self._bring(flight)
        except asyncio.CancelledError as error:
            if not _is_being_cancelled():
                self._fail(flight, _store_error(flight.key, error))
                return
            self._state.flights.fail(flight, _closed(flight))
            raise
        except DesertedError:
            pass
        except ModelCacheError as error:
            self._fail(flight, error)
        except BaseException as error:  # a store is anybody's code
            self._fail(flight, _store_error(flight.key, error))
            if isinstance(error, _MEANT_FOR_ALL):
                raise

    def _fail(self, flight: Flight, error: ModelCacheError) -> None:
        if error.model is None:
            error.model = flight.key
        serves_on = self._state.not_renewed(flight, error)
        if (flight.listed or flight.scouts) and not serves_on and not isinstance(error, _NEVER_REMEMBERED):
            # A name that is not there yet may be about to be copied in: never wait long before looking again.
            doubling = not isinstance(error, ModelNotFoundError)
            self._state.failures.remember(flight.key, error, doubling=doubling)
        self._state.failed(flight.key, error, serves_on=serves_on)
        self._state.flights.fail(flight, error)

    async def _bring(self, flight: Flight) -> None:
        """Attempt the load until it is decided, within the load timeout."""
        needed = crashes = 0
        deadline = 0.0
        while True:
            try:
                async with self._slots.slot(flight):
                    deadline = deadline or asyncio.get_running_loop().time() + self.timeout
                    if await self._attempt_by(deadline, flight, needed):
                        return
            except OutgrownError as outgrown:
                needed = outgrown.needed
            except NoRoomError as full:
                await self._park(flight, full.needed, deadline)
            except WorkerLostError as lost:
                crashes += 1
                if crashes > CRASHES_FORGIVEN:
                    raise _crashed(flight.key, lost) from lost

    async def _attempt_by(self, deadline: float, flight: Flight, needed: int) -> bool:
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await self._attempt(flight, needed)
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

    async def _attempt(self, flight: Flight, needed: int) -> bool:
        """Say whether the flight has ended; if not, what it was to renew has left while the store confirmed it."""
        started, asked_at = time.perf_counter(), self._state.clock()
        async with self._fetched(flight) as artifact:
            if artifact is None:
                return self._state.confirm(flight)
            attempt = Attempt(
                self._state, self._pool, flight, artifact, needed=needed, started=started, asked_at=asked_at
            )
            try:
                if flight.scouts:
                    bounds = await attempt.scout()
                    attempt.give_up()
                    self._state.flights.report(flight, bounds)
                else:
                    await attempt.load()
            except BaseException as error:
                attempt.give_up()
                if isinstance(error, WorkerLostError) and attempt.blame:
                    self.quarantine.blame(flight.key, artifact.version, attempt.blame)
                raise
        return True

    @asynccontextmanager
    async def _fetched(self, flight: Flight) -> AsyncIterator[Artifact | None]:
        """Ask the store for the artifact, None if it is the version to be renewed, and let go of it in the end."""
        flight.phase = Phase.LOADING
        held = flight.renews.value.version if flight.renews and flight.renews.state is State.READY else None
        found = await self._store.fetch(flight.key, if_version=held)
        if not isinstance(found, Artifact):
            _check_expected(found, held, flight.key)
            yield None
            return
        try:
            self.quarantine.check(flight.key, found.version)
            yield found if found.version != held else None
        finally:
            await _let_go(found)

    def _timed_out(self, flight: Flight) -> ModelCacheError:
        if flight.phase is Phase.STARVED:
            return self._state.no_room(flight.key, flight.needed, f"{self.timeout:g} s (load_timeout)")
        return LoadTimeoutError(
            f"Loading {flight.key} took more than {self.timeout:g} s (load_timeout).", model=flight.key
        )


def _check_expected(answer: object, held: str | None, key: str) -> None:
    if not isinstance(answer, NotModified) or held is None:
        asked = "without" if held is None else "with"
        raise StoreError(f"The store answered a fetch {asked} if_version with {answer!r}.", model=key)


async def _let_go(artifact: Artifact) -> None:
    """Close the artifact; whether the load has succeeded is decided by then, and a failure to close changes nothing."""
    aclose = getattr(artifact.chunks, "aclose", None)
    if aclose is None:
        return
    try:
        async with asyncio.timeout(_ACLOSE_TIMEOUT):
            await aclose()
    except BaseException as error:
        if _is_being_cancelled() or isinstance(error, _MEANT_FOR_ALL):
            raise
        logger.warning("the store failed to close an artifact: %s: %s", type(error).__name__, error)


def _is_being_cancelled() -> bool:
    """Say whether this task has been asked to end; a store may raise CancelledError over a task of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _store_error(key: str, error: BaseException) -> StoreError:
    wrapped = StoreError(f"The store failed: {type(error).__name__}: {error}.", model=key)
    wrapped.__cause__ = error
    return wrapped


def _closed(flight: Flight) -> RegistryClosedError:
    return RegistryClosedError("The registry was closed while this model was loading.", model=flight.key)


def _crashed(key: str, lost: WorkerLostError) -> WorkerCrashedError:
    epitaph = lost.epitaph
    return WorkerCrashedError(
        f"Two workers ended while {key} was loading: {epitaph}.",
        model=key, pid=epitaph.pid, signal=epitaph.signal, exit_code=epitaph.exit_code,
    )  # fmt: skip

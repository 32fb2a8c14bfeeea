"""A load, from the store to a lease for everyone who waits: the one path by which a model becomes resident.

The steps, each of which may fail or be cancelled, and then gives back what those before it took:

1. wait for a load slot;
2. ask the store: the artifact's version and size;
3. for an archive, send its first chunk to a worker, which answers how large the model in it is;
4. claim bytes from the ledger; only now, when the load is known to be possible, may others be evicted for it;
5. stream the rest to the worker as it comes, growing the claim if the artifact is larger than it announced;
6. when the worker has loaded and measured it, settle the claim and hand a lease to each waiter, in one step.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcache.cache.entry import Entry
from modelcache.cache.flight import Flight, Phase
from modelcache.errors import (
    BudgetTimeoutError,
    CorruptArtifactError,
    LoadTimeoutError,
    ModelCacheError,
    ModelNotFoundError,
    ModelTooLargeError,
    RegistryClosedError,
    StoreError,
    StoreUnavailableError,
    WorkerCrashedError,
)
from modelcache.pool.lost import WorkerLostError
from modelcache.residency import Place, Residency, Resident
from modelcache.sizing import show_bytes
from modelcache.stores.base import Artifact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modelcache.cache.ledger import Claim
    from modelcache.pool.artifacts import LoadedFacts, Loading
    from modelcache.pool.pool import Pool, Worker
    from modelcache.stores.base import ArtifactStore

_NEVER_REMEMBERED = (ModelTooLargeError, BudgetTimeoutError, RegistryClosedError)

_RAW = (".ubj", ".json")
"""Suffixes of artifacts whose own size is that of the model."""

_PEEK = 64 << 10
"""Bytes of an archive sent before its bytes are claimed: enough for its headers."""

_ACLOSE_TIMEOUT = 10.0
"""Seconds for a store to let go of an artifact."""

_CRASHES_FORGIVEN = 1


class _OutgrownError(Exception):
    """The claim is too small and must not wait to grow: start again with one of ``needed`` bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _DesertedError(Exception):
    """Nobody waits any more for a load that would have to queue for bytes."""


@dataclass(slots=True)
class _Attempt:
    """One attempt at a load, and what it holds."""

    flight: Flight
    artifact: Artifact
    needed: int
    """Bytes that an earlier attempt found necessary; 0 if there was none."""
    started: float
    claim: Claim | None = None
    worker: Worker | None = None
    loading: Loading | None = None
    charged: int = 0
    """Bytes that the worker's account shows for it."""
    held_back: bytes = b""
    """What is left of the first chunk until its bytes are claimed."""
    received: int = 0
    queued: float = 0.0
    """Seconds of waiting for bytes: no cost of the model."""
    downloading: float = 0.0

    def charge(self) -> None:
        """Show the claim in the worker's account, by which others are placed."""
        if self.worker is not None and self.claim is not None:
            self.worker.charged += self.claim.bytes - self.charged
            self.charged = self.claim.bytes


class Loader:
    """Flies flights."""

    def __init__(self, state: Residency, store: ArtifactStore, pool: Pool, *, concurrency: int, timeout: float) -> None:
        self._state = state
        self._store = store
        self._pool = pool
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = timeout
        self.tasks: set[asyncio.Task[None]] = set()
        """All that fly, or have landed and still have to let go of their artifact."""
        self._crashes: dict[tuple[str, str], float] = {}
        """By name and version, how many workers it has crashed; a crash over one of several counts for each in part."""

    def start(self, flight: Flight) -> None:
        """Fly ``flight`` in a task of its own."""
        task = flight.task = asyncio.create_task(self._fly(flight), name=f"modelcache load {flight.key}")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def suspect(self, worker: Worker) -> None:
        """A worker has crashed, over one of the models it may have predicted with or the artifact it was parsing."""
        waited_for = [worker.held[number] for number in worker.requests.models_waiting() & worker.held.keys()]
        parsing = worker.process.artifacts.parsing()
        share = 1 / max(1, len(waited_for) + (parsing is not None))
        for entry in waited_for:
            self._blame(entry.key, entry.value.version, share)
        if parsing is not None:
            parsing.blame = share

    def acquit(self, entry: Entry[Resident]) -> None:
        """The model has answered: if a worker crashed before, it was over another."""
        if self._crashes:
            self._crashes.pop((entry.key, entry.value.version), None)

    def _blame(self, key: str, version: str, share: float) -> None:
        self._crashes[key, version] = self._crashes.get((key, version), 0.0) + share

    async def _fly(self, flight: Flight) -> None:
        try:
            async with self._slots:
                await self._bring(flight)
        except asyncio.CancelledError as error:
            if not _is_being_cancelled():
                self._fail(flight, _store_error(flight.key, error))
                return
            closed = RegistryClosedError("The registry was closed while this model was loading.", model=flight.key)
            self._state.flights.fail(flight, closed)
            raise
        except _DesertedError:
            pass
        except ModelCacheError as error:
            self._fail(flight, error)
        except Exception as error:  # noqa: BLE001 - a store is anybody's code
            self._fail(flight, _store_error(flight.key, error))
        except BaseException as error:
            self._fail(flight, _store_error(flight.key, error))
            raise

    def _fail(self, flight: Flight, error: ModelCacheError) -> None:
        error.model = error.model or flight.key
        if flight.listed and not isinstance(error, _NEVER_REMEMBERED):
            # A name that is not there yet may be about to be copied in: never wait long before looking again.
            doubling = not isinstance(error, ModelNotFoundError)
            self._state.failures.remember(flight.key, error, doubling=doubling)
        self._state.failed(flight.key, error)
        self._state.flights.fail(flight, error)

    async def _bring(self, flight: Flight) -> None:
        """Attempt the load until it is decided, within the load timeout."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        needed = crashes = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    return await self._attempt(flight, needed)
            except _OutgrownError as outgrown:
                needed = outgrown.needed
            except WorkerLostError as lost:
                crashes += 1
                if crashes > _CRASHES_FORGIVEN:
                    raise _crashed(flight.key, lost) from lost
            except TimeoutError as error:
                if not limit.expired():
                    raise  # the store's own
                raise self._timed_out(flight) from error

    async def _attempt(self, flight: Flight, needed: int) -> None:
        async with self._fetched(flight, needed) as attempt:
            chunks = aiter(attempt.artifact.chunks)
            try:
                await self._prepare(attempt, chunks)
                await self._stream(attempt, chunks)
                facts = await self._outcome(attempt)
                self._state.sizes.learn(
                    flight.key, attempt.artifact.version, attempt.artifact.suffix,
                    unpacked=facts.unpacked_bytes, measured=facts.size,
                )  # fmt: skip
                await self._grow(attempt, facts.size, least=facts.size)
                assert attempt.worker is not None
                attempt.worker.check_alive()  # it may have ended while the claim waited to grow
                self._land(attempt, facts)
            except BaseException as error:
                self._give_up(attempt)
                self._look_for_a_culprit(attempt, error)
                raise

    @asynccontextmanager
    async def _fetched(self, flight: Flight, needed: int) -> AsyncIterator[_Attempt]:
        """Ask the store for the artifact, and let go of it in the end."""
        flight.phase = Phase.LOADING
        started = time.perf_counter()
        artifact = await self._store.fetch(flight.key)
        if not isinstance(artifact, Artifact):
            raise StoreError(f"The store answered a fetch without if_version with {artifact!r}.", model=flight.key)
        try:
            if self._crashes.get((flight.key, artifact.version), 0.0) > _CRASHES_FORGIVEN:
                raise _quarantined(flight.key)
            yield _Attempt(flight, artifact, needed, started)
        finally:
            aclose = getattr(artifact.chunks, "aclose", None)
            if aclose is not None:
                async with asyncio.timeout(_ACLOSE_TIMEOUT):
                    await aclose()

    # Bytes

    async def _prepare(self, attempt: _Attempt, chunks: AsyncIterator[bytes]) -> None:
        """Claim the bytes that the load needs, and begin it."""
        artifact, sizes = attempt.artifact, self._state.sizes
        known = sizes.known(attempt.flight.key, artifact.version) or 0
        if known or attempt.needed:
            await self._claim(attempt, least=known, most=max(known, attempt.needed))
            assert attempt.claim is not None
            within = sizes.unpacked_within(attempt.claim.bytes, artifact.suffix)
            # What a small model takes beyond its ratio is in the measured bytes already: without the second figure
            # the worker would ask for more than was measured, and others would be evicted for it in vain.
            await self._begin(attempt, max(within, sizes.unpacked(attempt.flight.key, artifact.version)))
        elif artifact.suffix in _RAW and artifact.size:
            await self._claim(attempt, *self._bounds(attempt, artifact.size))
            await self._begin(attempt, artifact.size)
        else:
            unpacked = await self._peek(attempt, chunks)
            await self._claim(attempt, *self._bounds(attempt, unpacked))
            self._grant(attempt, unpacked)

    def _bounds(self, attempt: _Attempt, unpacked: int) -> tuple[int, int]:
        sizes = self._state.sizes
        return sizes.lower(unpacked), sizes.upper(unpacked, attempt.artifact.suffix)

    async def _peek(self, attempt: _Attempt, chunks: AsyncIterator[bytes]) -> int:
        """Send the first chunk, and return how many bytes the worker says the model has."""
        loading = await self._begin(attempt, 0)
        chunk = await anext(chunks, b"")
        await self._feed(attempt, chunk[:_PEEK])
        attempt.held_back = chunk[_PEEK:]
        await loading.news()
        if loading.error is not None:
            raise loading.error
        return loading.needed

    async def _claim(self, attempt: _Attempt, least: int, most: int) -> None:
        """Wait for ``most`` bytes, or for the whole budget if the model may yet fit into it."""
        ledger, flight = self._state.ledger, attempt.flight
        granted = False
        while not granted:  # again, if the budget has become smaller than the claim
            self._check_fits(flight.key, least, "Nothing was evicted for it.")
            grant: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            flight.needed = min(most, ledger.budget)
            attempt.claim, retired = ledger.claim(flight.key, flight.needed, grant)
            self._state.retire(retired)
            if not grant.done():
                flight.phase = Phase.QUEUED
                if not flight.live_waiters():
                    self._state.flights.end(flight)  # now: nobody may join it while it lets go of the artifact
                    raise _DesertedError
            granted = await self._queue(attempt, grant)
        flight.phase = Phase.LOADING
        attempt.charge()

    async def _grow(self, attempt: _Attempt, size: int, *, least: int) -> None:
        """Enlarge the claim to ``size`` bytes, as far as the budget goes."""
        claim, ledger = attempt.claim, self._state.ledger
        assert claim is not None
        self._check_fits(attempt.flight.key, least)
        size = min(size, ledger.budget)
        if size <= claim.bytes:
            return
        granted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._state.retire(ledger.grow(claim, size, granted))
        if not await self._queue(attempt, granted):
            raise _OutgrownError(size)
        attempt.charge()

    @staticmethod
    async def _queue(attempt: _Attempt, granted: asyncio.Future[bool]) -> bool:
        started = time.perf_counter()
        result = await granted
        attempt.queued += time.perf_counter() - started
        return result

    def _check_fits(self, key: str, least: int, remark: str = "") -> None:
        budget = self._state.ledger.budget
        if least > budget:
            raise ModelTooLargeError(
                f"{key} takes {least:,} bytes or more, and the whole memory budget is {budget:,}: "
                f"raise memory_budget. {remark}".rstrip(),
                model=key, needed=least, budget=budget,
            )  # fmt: skip

    # The worker

    async def _begin(self, attempt: _Attempt, allowed: int) -> Loading:
        attempt.worker = await self._pool.place()
        attempt.loading = attempt.worker.begin_load(self._pool.next_number(), allowed)
        attempt.charge()
        return attempt.loading

    def _grant(self, attempt: _Attempt, unpacked: int) -> None:
        assert attempt.loading is not None and attempt.claim is not None
        within = self._state.sizes.unpacked_within(attempt.claim.bytes, attempt.artifact.suffix)
        attempt.loading.grant(max(unpacked, within))

    async def _feed(self, attempt: _Attempt, chunk: bytes) -> None:
        assert attempt.loading is not None
        attempt.received += len(chunk)
        if attempt.artifact.size is not None and attempt.received > attempt.artifact.size:
            raise StoreUnavailableError(
                f"The store delivers more than the {attempt.artifact.size:,} bytes it announced.",
                model=attempt.flight.key,
            )
        attempt.downloading = time.perf_counter() - attempt.started - attempt.queued
        await attempt.loading.feed(chunk)

    async def _stream(self, attempt: _Attempt, chunks: AsyncIterator[bytes]) -> None:
        """Pass the chunks on as they come; all of them, or the load fails."""
        loading, artifact = attempt.loading, attempt.artifact
        assert loading is not None
        if attempt.held_back:
            await self._feed(attempt, attempt.held_back)
        async for chunk in chunks:
            await self._feed(attempt, chunk)
            await self._satisfy(attempt)
            if loading.decided:
                return
        attempt.downloading = time.perf_counter() - attempt.started - attempt.queued
        if artifact.size is not None and attempt.received != artifact.size:
            raise StoreUnavailableError(
                f"The store delivered {attempt.received:,} of the {artifact.size:,} bytes it announced.",
                model=attempt.flight.key,
            )
        loading.finish()

    async def _outcome(self, attempt: _Attempt) -> LoadedFacts:
        loading = attempt.loading
        assert loading is not None
        while not loading.decided:
            await loading.news()
            await self._satisfy(attempt)
        if loading.error is not None:
            raise loading.error
        assert loading.result is not None
        return loading.result

    async def _satisfy(self, attempt: _Attempt) -> None:
        """Grow the claim if the worker has asked for it."""
        loading = attempt.loading
        if loading is not None and loading.needed and not loading.decided:
            unpacked = loading.needed
            least, most = self._bounds(attempt, unpacked)
            await self._grow(attempt, most, least=least)
            self._grant(attempt, unpacked)

    # The end

    def _land(self, attempt: _Attempt, facts: LoadedFacts) -> None:
        """Make the model resident and hand everyone who waits a lease; one step."""
        state, flight, artifact = self._state, attempt.flight, attempt.artifact
        assert attempt.worker and attempt.loading and attempt.claim
        place = Resident(
            attempt.worker, attempt.loading.model, artifact.version, attempt.received, artifact.suffix,
            facts, attempt.downloading, time.perf_counter() - attempt.started - attempt.queued - attempt.downloading,
        )  # fmt: skip
        waiters = state.flights.land(flight)
        entry = Entry(flight.key, place, size=facts.size, cost=state.cost_of(flight.key, place.load_seconds))
        entry.leases = len(waiters)
        entry.pinned = flight.listed and flight.key in state.pinned
        attempt.worker.charged += facts.size - attempt.charged
        retired = state.ledger.settle(attempt.claim, entry, listed=flight.listed)
        state.failures.forget(flight.key)
        for waiter in waiters:
            waiter.set_result(entry)
        state.settled(entry)  # tells the subscribers, who may do anything, such as cancel one of those who waited
        state.retire(retired)

    def _give_up(self, attempt: _Attempt) -> None:
        """Give back what the attempt took; bytes that a worker may hold, only when it has freed them."""
        state, claim, worker, loading = self._state, attempt.claim, attempt.worker, attempt.loading
        in_worker = worker is not None and loading is not None and loading.error is None and worker.alive
        if worker is not None and loading is not None and in_worker:
            worker.forget_load(loading)
            if claim is not None and claim.granted:
                attempt.charge()  # it may have grown in the tick of the cancellation
                state.retire(state.ledger.abandon(claim, Place(worker, loading.model)))
                return
            worker.unload(loading.model)
        if worker is not None:
            worker.charged -= attempt.charged
        if claim is not None:
            state.retire(state.ledger.give_back(claim))

    def _look_for_a_culprit(self, attempt: _Attempt, error: BaseException) -> None:
        """A worker that crashed while it parsed an artifact may have crashed over that artifact."""
        if isinstance(error, WorkerLostError) and attempt.loading is not None and attempt.loading.blame:
            self._blame(attempt.flight.key, attempt.artifact.version, attempt.loading.blame)

    def _timed_out(self, flight: Flight) -> ModelCacheError:
        if flight.phase is Phase.LOADING:
            return LoadTimeoutError(
                f"Loading {flight.key} took more than {self._timeout:g} s (load_timeout).", model=flight.key
            )
        holders = tuple(sorted(entry.key for entry in self._state.ledger.table.values() if entry.pins))
        return BudgetTimeoutError(
            f"No room for the {show_bytes(flight.needed)} of {flight.key} within {self._timeout:g} s (load_timeout): "
            f"the bytes are held by leases and pins of {', '.join(holders[:10]) or 'models that are being loaded'}. "
            "Release or unpin one, or raise memory_budget.",
            model=flight.key, needed=flight.needed, holders=holders,
        )  # fmt: skip


def _is_being_cancelled() -> bool:
    """Say whether this task has been asked to end; a store may raise CancelledError over a task of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _store_error(key: str, error: BaseException) -> StoreError:
    wrapped = StoreError(f"The store failed: {type(error).__name__}: {error}.", model=key)
    wrapped.__cause__ = error
    return wrapped


def _crashed(key: str, lost: WorkerLostError) -> WorkerCrashedError:
    epitaph = lost.epitaph
    return WorkerCrashedError(
        f"Two workers ended while {key} was loading: {epitaph}.",
        model=key, pid=epitaph.pid, signal=epitaph.signal, exit_code=epitaph.exit_code,
    )  # fmt: skip


def _quarantined(key: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{key} has crashed two workers and is not loaded again until its artifact changes: "
        "check it with `modelcache inspect`, or train it anew.",
        model=key,
    )

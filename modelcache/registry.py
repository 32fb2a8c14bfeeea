"""ModelRegistry: an app calls ``await registry.predict("Chicago_IL", rows)``.

The registry makes sure that the model is resident in one of its worker processes, loading it once however many callers
ask, sends the rows there, and keeps all resident models together under a byte budget. This module composes the parts
that do so; what each decides is theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from contextlib import asynccontextmanager, suppress
from heapq import nlargest
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Self

from modelcache.answering import Answering
from modelcache.cache.entry import State
from modelcache.cache.policies import make_policy
from modelcache.copying import Copier
from modelcache.engines import Engines
from modelcache.errors import MissingDependencyError, ModelCacheError, StoreError
from modelcache.explaining import explain
from modelcache.groups import Groups
from modelcache.lease import Lease
from modelcache.leasing import Leasing
from modelcache.lifecycle import Lifecycle
from modelcache.loader import Loader
from modelcache.names import check_name
from modelcache.origin import Origin
from modelcache.pool.pool import XGBOOST, Pool
from modelcache.pool.process import Settings
from modelcache.preloading import preload
from modelcache.records import Invocation, RegistryStats, WorkerDied
from modelcache.residency import Residency
from modelcache.sizing import default_budget, is_throttled, parse_bytes, usable_cores
from modelcache.stores import ArtifactStore, DiskTier, open_store

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from modelcache.cache.entry import Entry
    from modelcache.cache.policies import PolicySpec
    from modelcache.pool.lost import Epitaph
    from modelcache.pool.pool import Worker
    from modelcache.records import Event, ModelInfo, Output, PreloadProgress, PreloadReport

    Matrix = NDArray[np.float32]

logger = logging.getLogger("modelcache")

_STORE_PATIENCE = 10.0
"""Seconds that ``close`` gives the store for letting go of loads, and for closing."""
_UNLOAD_PATIENCE = 10.0
"""Seconds that ``close`` waits for workers to confirm what they have freed before it ends them."""


class ModelRegistry:
    """Very many small models behind one ``await``.

    ``store`` is a folder, a URL (``s3://``, ``https://``, ``file://``, those of :func:`open_store`), or an
    :class:`ArtifactStore`; the registry closes it in the end. ``memory_budget`` is for all resident models together, in
    bytes or as text like "512 MiB"; by default half of what the container or host has available. ``workers`` defaults
    to the usable cores, ``threads_per_worker`` is XGBoost's ``nthread`` in each. ``disk_cache`` is a folder, or a
    :class:`DiskTier`, for local copies of what the store delivers. ``policy`` is "gdsf", "lru", "s3fifo", an
    :class:`EvictionPolicy`, a ``cachetools.Cache``, or a callable returning one. ``load_timeout`` (seconds) bounds one
    load, ``load_concurrency`` how many run at once. A failed load is remembered for ``failure_ttl`` seconds, doubling
    up to 30; 0 turns that off. A resident version is trusted for ``refresh_after`` seconds; the next call after that is
    answered by it, and has the store asked in the background for another. None: never; 0: each call. ``queue_limit`` is
    how many calls may wait per worker. ``retain=False`` unloads each model after its call. ``predictor`` names a
    :class:`Predictor` class as "package.module:Class"; it is imported in the workers. ``engine="auto"`` has ONNX
    Runtime answer calls of few rows, once a model is asked often, if its answers are the same bit for bit and there are
    free bytes for it (pip install 'modelcache[onnx]'). ``clock`` gives seconds.

    Use it as ``async with``, or call :meth:`start` and :meth:`close`; the first call starts it too. All methods belong
    to one event loop.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | ArtifactStore,
        *,
        memory_budget: int | str | None = None,
        workers: int | None = None,
        threads_per_worker: int = 1,
        disk_cache: str | os.PathLike[str] | DiskTier | None = None,
        policy: PolicySpec = "gdsf",
        load_timeout: float = 360.0,
        load_concurrency: int = 32,
        failure_ttl: float = 1.0,
        refresh_after: float | None = None,
        queue_limit: int = 1024,
        retain: bool = True,
        predictor: str = XGBOOST,
        engine: Literal["xgboost", "auto"] = "xgboost",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_counts(
            workers=workers, threads_per_worker=threads_per_worker, load_concurrency=load_concurrency,
            queue_limit=queue_limit,
        )  # fmt: skip
        _check_engine(engine, predictor)
        _check_seconds("load_timeout", load_timeout)
        _check_seconds("failure_ttl", failure_ttl, none=0)
        if refresh_after is not None:
            _check_seconds("refresh_after", refresh_after, none=0)
        budget = default_budget() if memory_budget is None else parse_bytes(memory_budget)
        self._store: ArtifactStore = store if isinstance(store, ArtifactStore) else open_store(store)
        self._state = Residency(
            budget,
            make_policy(policy),
            failure_ttl=failure_ttl,
            refresh_after=refresh_after,
            retain=retain,
            clock=clock,
        )
        cores = usable_cores()
        size = workers or cores
        awake = cores > 1 and not is_throttled(size + 1)
        self._pool = Pool(
            size,
            cores=cores,
            settings=Settings(threads_per_worker, predictor, stays_awake=awake),
            lost=self._worker_lost,
            unloaded=self._state.acknowledged,
            checked=self._workers_checked,
        )
        tier = disk_cache if isinstance(disk_cache, DiskTier) or disk_cache is None else DiskTier(disk_cache)
        self._origin = Origin(self._store, tier, refresh_after=refresh_after, predictor=predictor)
        self._loader = Loader(self._state, self._origin, self._pool, concurrency=load_concurrency, timeout=load_timeout)
        self._copier = Copier(self._state, self._loader, self._pool)
        self._load_concurrency = load_concurrency
        self._life = Lifecycle(on_fork=self._pool.abandon)
        self._leasing = Leasing(self._state, self._loader, self._life)
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._engines = Engines(self._state) if engine == "auto" else None
        self._answering = Answering(
            self._state, self._leasing, self._loader.quarantine, self._life, self.start, queue_limit=queue_limit,
            engines=self._engines,
        )  # fmt: skip
        self._groups = Groups(self._state, self._loader, self._leasing, self._life)
        self._background: set[asyncio.Task[Any]] = set()

    # From start to close

    async def start(self) -> Self:
        """Start the workers; the first call does so too. Harmless when done twice."""
        self._life.check()
        if self._life.loop is not None:
            return self
        if self._starting is None:
            self._life.started_on = asyncio.get_running_loop()
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        await asyncio.wait((starting,))  # a cancelled caller must not take the others' start with it
        starting.result()
        self._life.check()
        return self

    async def _start(self) -> None:
        try:
            await self._origin.open()
            try:
                await self._pool.start()
            except BaseException:
                await self._origin.close()
                raise
        except BaseException:
            self._starting = self._life.started_on = None
            raise
        if not self._life.closed:
            self._life.open()

    async def close(self, *, drain: float = 30.0) -> None:
        """Refuse new calls, let those in flight finish for ``drain`` seconds, and free everything.

        Callers that wait for a load get RegistryClosedError. Harmless when done twice.
        """
        if self._life.forked:
            return
        if self._life.started_on is not None and self._life.started_on.is_closed():
            self._life.close()
            self._pool.abandon()
            return
        if self._closing is None:
            self._life.close()
            self._closing = asyncio.create_task(self._close(drain))
        await asyncio.wait((self._closing,))
        self._closing.result()

    async def _close(self, drain: float) -> None:
        starting = self._starting
        if starting is not None and not starting.done():
            self._pool.stop_starting()
            await asyncio.wait((starting,))
            if not starting.cancelled():
                starting.exception()  # told to those who wait for it, if there is anybody
        await self._ground_flights()
        await self._leasing.drained(drain)
        ledger = self._state.ledger
        for key in tuple(ledger.table):
            self._state.retire(ledger.detach(key, "close"))
        leaving = [self._state.left(entry) for entry in ledger.leaving if entry.state is State.UNLOADING]
        if leaving:
            await asyncio.wait(leaving, timeout=_UNLOAD_PATIENCE)
        await self._pool.close()
        await self._origin.close()
        try:
            async with asyncio.timeout(_STORE_PATIENCE) as limit:
                await self._store.close()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise StoreError(f"{self._store!r} did not close within {_STORE_PATIENCE:g} s.") from error

    async def _ground_flights(self) -> None:
        """End all loads, and let nobody wait for one any more."""
        self._loader.cancel()
        self._groups.close()
        await self._loader.ended(_STORE_PATIENCE)
        if self._background:
            await asyncio.wait(self._background)

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:  # nobody else could close it
            await self.close(drain=0)
            raise

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is not None and life.loop is not None:
            warnings.warn(f"unclosed registry {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._pool.abandon()

    # Predictions

    async def predict(
        self,
        name: str,
        rows: Any,
        *,
        output: Output = "value",
        timeout: float | None = None,
    ) -> Matrix:
        """Return the model's predictions for ``rows``, loading it if it is not resident.

        ``rows``: a list of rows, one row, a 1-D or 2-D array, a pandas or polars DataFrame, an Arrow table or record
        batch, a SciPy sparse matrix; converted to float32, NaN and None are missing. Named columns are checked against
        the model's feature names and put into their order. ``output``: "value", "margin", "leaf" or "contribs".
        ``timeout`` is in seconds. Rows of more than 1 MiB as float32 are not copied beforehand: an array, or whatever
        holds them, must not be changed until the call has returned.

        The result is float32 of shape (n,), or (n, k) for a model of k outputs: one row gives (1,) or (1, k).
        """
        return await self._answering.predict(name, rows, output, timeout)

    async def invoke(
        self,
        name: str,
        rows: Any,
        *,
        output: Output = "value",
        timeout: float | None = None,
    ) -> Invocation:
        """Predict, and tell which model answered, where it was when the call came, and where the time went."""
        return await self._answering.invoke(name, rows, output, timeout)

    # Holding models

    @asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[Lease]:
        """Hold ``name`` resident: ``async with registry.acquire(name) as lease: await lease.predict(rows)``."""
        await self.start()
        lease = Lease(self._answering, await self._leasing.take(name))
        try:
            yield lease
        finally:
            lease.held = False
            self._leasing.release(lease.entry)

    @asynccontextmanager
    async def acquire_many(self, names: Sequence[str]) -> AsyncIterator[list[Lease]]:
        """Hold several models resident together; gives their leases in the order of ``names``.

        All or none: nothing is held, and nothing evicted, before there is room for all of them. ModelTooLargeError if
        they can never fit together; BudgetTimeoutError if leases and pins of others leave no room for them within
        ``load_timeout``. The store is asked twice for models that are not resident: for their sizes first.
        """
        if isinstance(names, str):
            raise TypeError(
                f"acquire_many takes several names: write acquire_many([{names!r}]), or acquire({names!r})."
            )
        await self.start()
        entries = await self._groups.take([check_name(name) for name in names])
        leases = [Lease(self._answering, entry) for entry in entries]
        try:
            yield leases
        finally:
            for lease in leases:
                lease.held = False
                self._leasing.release(lease.entry)

    # Residency

    async def load(self, name: str) -> ModelInfo:
        """Make ``name`` resident now."""
        async with self.acquire(name) as lease:
            return lease.model

    async def preload(
        self,
        names: Iterable[str] | AsyncIterable[str],
        *,
        concurrency: int | None = None,
        on_progress: Callable[[PreloadProgress], None] | None = None,
    ) -> PreloadReport:
        """Make many models resident; ``names`` may be :meth:`names`. Failures are collected, not raised.

        ``on_progress`` is called after each model. Models that do not fit together evict each other: the last stay.
        """
        _check_counts(concurrency=concurrency)
        return await preload(
            self.load, names, concurrency=concurrency or self._load_concurrency, on_progress=on_progress
        )

    async def unload(self, name: str) -> bool:
        """Take ``name`` out of memory, pinned or not; False if nothing of it was there.

        Calls in flight get their answers; returns when the bytes are free, so never call it inside a lease on the same
        model. Later calls load the model again, at once even if its last load failed.
        """
        await self.start()
        state = self._state
        keys = self._leasing.spellings(check_name(name))
        flights = [flight for key in keys if (flight := state.flights.detach(key))]
        for flight in flights:
            state.give_up_renewal(flight)
        copying = [flight for flight in state.flights.airborne if flight.copies is not None and flight.key in keys]
        for flight in copying:
            state.flights.drop(flight)
            flight.task.cancel()
        flights += copying
        for key in keys:
            state.pinned.discard(key)
            state.failures.forget(key)
            state.retire(state.ledger.detach(key, "unload"))
        if flights:
            await asyncio.wait([flight.task for flight in flights])
        leaving = [state.left(entry) for entry in state.ledger.leaving if entry.key in keys]
        if leaving:
            await asyncio.wait(leaving)
        return bool(flights or leaving)

    async def refresh(self, name: str) -> ModelInfo:
        """Ask the store for ``name`` now; if it has another version, load that beside the resident one, and swap.

        Calls go on meanwhile, with the version there is, and none has to wait, as long as both fit into the budget
        together. If the new version cannot be loaded, the error says why, and the old one serves on. A model that the
        store does not have any more is unloaded, and ModelNotFoundError raised. Loads a model that is not resident.
        """
        await self.start()
        entry = await self._leasing.refresh(check_name(name))
        try:
            return self._state.info(entry)
        finally:
            self._leasing.release(entry)

    async def pin(self, name: str) -> ModelInfo:
        """Make ``name`` resident and never evict it until :meth:`unpin`; if its worker ends it is loaded again."""
        async with self.acquire(name) as lease:
            if lease.entry.state is State.READY:  # else it was unloaded while it loaded
                self._state.pinned.add(lease.name)
                self._state.retire(self._state.ledger.pin(lease.entry))
            return lease.model

    def unpin(self, name: str) -> None:
        """Let ``name`` be evicted again; harmless when it is not pinned."""
        entry = self._leasing.find(name)
        self._state.pinned.discard(entry.key if entry is not None else check_name(name))
        if entry is not None:
            self._state.retire(self._state.ledger.unpin(entry))

    def resize(self, memory_budget: int | str) -> None:
        """Change the budget now; what is over a smaller one is evicted at once, or when the leases on it end."""
        self._state.retire(self._state.ledger.resize(parse_bytes(memory_budget)))

    # What is known

    def loaded(self) -> list[ModelInfo]:
        """Return the resident models, least recently used first."""
        return [self._state.info(entry) for entry in self._state.ledger.table.values()]

    def peek(self, name: str) -> ModelInfo | None:
        """Describe ``name`` if it is resident, else return None; loads nothing, and counts as no use of it."""
        entry = self._leasing.find(name)
        return self._state.info(entry) if entry is not None else None

    def most_used(self, count: int) -> list[ModelInfo]:
        """Return the ``count`` resident models of the most ``total_hits``, most first; counts the hits of each other.

        That takes about 1 ms for 10,000 resident models.
        """
        # In one step, since exporters ask from threads of their own; and not in the order of use, which is all over
        # the memory and takes five times as long.
        entries = tuple(dict.values(self._state.ledger.table))
        return [self._state.info(entry) for entry in nlargest(count, entries, key=_total_hits)]

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what the store offers, as :meth:`predict` takes it, each name once."""
        self._life.check()
        listing = getattr(self._store, "names", None)
        if listing is None:
            raise StoreError(f"{self._store!r} cannot list its models: it has no method names(prefix).")
        async for name in listing(prefix):
            yield name

    def stats(self) -> RegistryStats:
        """Return all figures; costs no await and no look at every model."""
        return self._state.stats(self._pool, self._origin.tier)

    def explain(self, name: str) -> str:
        """Say why ``name`` is cold, resident, refused or was evicted, with the figures."""
        entry = self._leasing.find(name)
        return explain(self._state, entry.key if entry is not None else check_name(name))

    def failure(self, name: str) -> ModelCacheError | None:
        """Return what calls of ``name`` fail with until its load is tried again, or None."""
        failure = None if self._leasing.find(name) is not None else self._state.failures.recall(check_name(name))
        return failure.fresh() if failure is not None else None

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` with each event, in the loop, as it happens; call what is returned to stop that."""
        self._state.subscribers.append(callback)

        def leave() -> None:
            with suppress(ValueError):  # it has left already
                self._state.subscribers.remove(callback)

        return leave

    def __repr__(self) -> str:
        ledger, mib = self._state.ledger, 1 << 20
        return (
            f"<ModelRegistry {self._store!r} {len(ledger.table)} ready, {len(self._state.flights.airborne)} loading, "
            f"{ledger.charged / mib:.1f}/{ledger.budget / mib:.1f} MiB, {len(self._pool.workers)} workers>"
        )

    # What the pool reports

    def _workers_checked(self) -> None:
        self._copier.look()

    def _worker_lost(self, worker: Worker, epitaph: Epitaph) -> None:
        if epitaph.crashed and not (self._engines is not None and self._engines.lost(worker)):
            self._loader.quarantine.suspect(worker)
        lost = self._state.lose(worker)
        if not self._life.closed:
            self._state.counters.worker_died(epitaph)
            self._state.emit(WorkerDied(epitaph.pid, epitaph.signal, epitaph.exit_code, lost))
            for key in self._state.pinned - self._state.ledger.table.keys():
                task = asyncio.create_task(self._pin_again(key))
                self._background.add(task)
                task.add_done_callback(self._background.discard)

    async def _pin_again(self, key: str) -> None:
        try:
            await self.load(key)
        except ModelCacheError as error:
            logger.warning("pinned model %s could not be loaded again: %s", key, error)


def _total_hits(entry: Entry[Any]) -> int:
    return entry.past_hits + entry.hits


def _check_engine(engine: str, predictor: str) -> None:
    if engine not in ("xgboost", "auto"):
        raise ValueError(f"engine is {engine!r}: it has to be 'xgboost' or 'auto'.")
    if engine == "auto" and predictor != XGBOOST:
        raise ValueError(f"engine='auto' converts models of XGBoost, and predictor is {predictor!r}: leave one out.")
    if engine == "auto" and find_spec("onnxruntime") is None:
        raise MissingDependencyError("engine='auto' needs ONNX Runtime: pip install 'modelcache[onnx]'")


def _check_counts(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}: it has to be a whole number, 1 or more.")


def _check_seconds(name: str, value: float, none: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or value == none):
        raise ValueError(f"{name} is {value!r}: it has to be a positive number of seconds.")

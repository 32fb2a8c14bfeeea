"""The pool: starts workers, replaces those that end, finds those that are stuck, and says where a model should live."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from modelcache.errors import MissingDependencyError, ModelCacheError, RegistryClosedError, WorkerCrashedError
from modelcache.pool.artifacts import ArtifactChannel, Loading
from modelcache.pool.lost import Epitaph, WorkerLostError
from modelcache.pool.process import Lanes, Process, Settings, start_process
from modelcache.pool.requests import RequestChannel
from modelcache.pool.turns import Turns
from modelcache.records import WorkerStats
from modelcache.stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("modelcache")

XGBOOST = "modelcache.worker.predictors:XGBoostPredictor"

_UNABLE: dict[str, type[ModelCacheError]] = {"missing": MissingDependencyError, "fault": ModelCacheError}
"""What is raised when a worker says that it cannot serve."""

_LONGEST_BACKOFF = 5.0
_START_TIMEOUT = 60.0
_LEAVE_TIMEOUT = 5.0
_COMPUTES = 0.01
"""CPU seconds per second of patience by which a worker that computes is told from one that is stuck."""
_SHORTEST_PERIOD = 0.001
_PATIENCE_WITH_BUSY = 12
"""One prediction may take long: a worker that computes is given more time, if not for ever."""


class Worker:
    """One worker process, from its start to its end."""

    def __init__(self, index: int, unloaded: Callable[[Worker, int], None]) -> None:
        loop = asyncio.get_running_loop()
        self.index = index
        self.hello: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.held: dict[int, Any] = {}
        """What occupies bytes in it, by model number: the registry's entries."""
        self.charged = 0
        """Bytes of those, and of loads on their way; placement goes by it."""
        self.latency = Histogram()
        self.exact_heap = True
        self.gone = False
        """True once its process has ended, and what it held is free."""
        self.process: Process
        self.requests: RequestChannel
        """The lane of rows and predictions."""
        self._lanes = Lanes()
        self._given_up = False
        self._unloaded = unloaded
        self._unloading: dict[int, float] = {}
        self._ping: asyncio.Future[Any] | None = None
        self._pinged = 0.0
        self._cpu_seconds = 0.0
        self._checked = monotonic()
        self._rested = self._waited = 0.0
        self.busy = 0.0
        """Share of the time between the last two checks for which it had a call to answer."""
        self.line = 0.0
        """How many calls waited for it on average, between the last two checks."""
        self.slices: dict[int, float] = {}
        """Share of the time between the last two checks for which slices of long calls kept it busy, by model."""

    async def start(self, settings: Settings) -> None:
        """Start the process and wait until it is up; on an error nothing of it is left."""
        self.process = await start_process(
            self._lanes,
            lambda: RequestChannel(self._lane_lost, self.latency.record_all, self._lanes.slots),
            lambda: ArtifactChannel(
                self._lane_lost, self._lanes.box, hello=self.hello.set_result, unloaded=self._on_unloaded
            ),
            settings,
        )
        self.requests = self.process.requests
        try:
            if self._given_up:
                self.close()
            await self._greet()
        except BaseException:
            await self.bury()
            raise

    def give_up_starting(self) -> None:
        """Let a start that is under way fail soon; harmless when the worker is up."""
        self._given_up = True
        if hasattr(self, "process") and not self.hello.done():
            self.close()

    async def _greet(self) -> None:
        await asyncio.wait((self.hello, self.ended), timeout=_START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if not self.hello.done() and self._given_up:
            raise RegistryClosedError("The registry was closed while its workers were starting.")
        if not self.hello.done():
            if self.alive:
                self.process.kill(f"it was not up after {_START_TIMEOUT:.0f} seconds")
            raise WorkerCrashedError(f"A worker could not be started: {await self.bury()}.", pid=self.pid)
        hello = self.hello.result()
        if "kind" in hello:
            raise _UNABLE[hello["kind"]](hello["message"])
        self.exact_heap = hello["exact_heap"]

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """True while both lanes are open."""
        return not self.ended.done()

    def check_alive(self) -> None:
        """Raise WorkerLostError if the worker has ended."""
        if not self.alive:
            raise WorkerLostError(self._epitaph())

    def check_not_gone(self) -> None:
        """Raise WorkerLostError if nobody will be told any more that what he sends is lost."""
        if self.gone:
            raise WorkerLostError(self._epitaph())

    def begin_load(self, model: int, allowed: int, digest: str | None = None, save: str | None = None) -> Loading:
        """Announce an artifact; raises WorkerLostError if the worker has ended meanwhile."""
        self.check_alive()
        return self.process.artifacts.begin(model, allowed, digest, save)

    def open_copy(self, model: int, allowed: int, path: str, digest: str, known: int) -> Loading:
        """Order a local copy to be loaded; raises WorkerLostError if the worker has ended meanwhile."""
        self.check_alive()
        return self.process.artifacts.open(model, allowed, path, digest, known)

    def forget_load(self, loading: Loading) -> None:
        """Listen no more to a load that is given up."""
        self.process.artifacts.forget(loading)

    def unload(self, model: int) -> None:
        """Order a model's bytes to be freed; ``unloaded`` is called when they are."""
        if self.alive:
            self._unloading[model] = monotonic()
            self.process.artifacts.unload(model)

    def measure(self) -> asyncio.Future[int]:
        """Ask for the bytes in use on its heap."""
        return self.process.artifacts.measure()

    @property
    def suspected(self) -> bool:
        """True while it is asked for a sign of life."""
        return self._ping is not None and not self._ping.done()

    def suspect(self) -> None:
        """Ask for a sign of life: a deadline has been missed."""
        if self._ping is None and self.alive:
            self._ping, self._pinged = self.requests.ping(), monotonic()

    def check(self, now: float, patience: float) -> None:
        """Kill the process if it has given no sign of life for ``patience`` seconds."""
        if self._ping is not None and self._ping.done():
            self._ping = None
        oldest = self.requests.oldest()
        waited = oldest is not None and now - oldest > patience / 2
        if self.process.artifacts.loading or waited or self.requests.congested:  # calls may wait to be sent at all
            self.suspect()
        used, self._cpu_seconds = self._cpu_seconds, self.process.cpu_seconds()
        self._look_back(now)
        if self._cpu_seconds - used > _COMPUTES * patience:
            patience *= _PATIENCE_WITH_BUSY
        silent = self._ping is not None and now - self._pinged > patience
        unload = next(iter(self._unloading.values()), now)
        if silent or (now - unload > patience and not self.process.artifacts.parsing() and not self.converting):
            logger.warning("worker process %d does not answer and is killed", self.pid)
            self.process.kill("it gave no sign of life" if silent else "it did not free a model when told to")

    def _look_back(self, now: float) -> None:
        """Take note of what has been since the last look; the length of the line is that of Little's law."""
        period, self._checked = max(now - self._checked, _SHORTEST_PERIOD), now
        rested, waited = self._lanes.box.rested(now), self.latency.sum
        self.busy = 1 - (rested - self._rested) / period
        self.line = (waited - self._waited) / period
        self._rested, self._waited = rested, waited
        self.slices = {model: seconds / period for model, seconds in self.requests.slice_seconds.items()}
        self.requests.slice_seconds.clear()

    @property
    def converting(self) -> int:
        """The number of the model that it is giving a second engine, or was when it ended; 0 for none."""
        return self._lanes.box.converting

    def close(self) -> None:
        """Close both lanes: the worker takes it as the order to leave."""
        self.requests.close()
        self.process.artifacts.close()

    def abandon(self) -> None:
        """Close this process's ends of the lanes, outside of the loop, also while it starts."""
        self._lanes.abandon()

    def stats(self) -> WorkerStats:
        """Return its figures."""
        return WorkerStats(
            self.index, self.pid, len(self.held), self.charged, self.requests.waiting, self.latency.summary()
        )

    async def bury(self, *, patient: bool = False) -> Epitaph:
        """End what is left of the process, with ``patient`` after it had time to leave by itself."""
        self.close()
        if not patient:
            self.process.kill()
        if not await self.process.wait(_LEAVE_TIMEOUT):
            self.process.kill("it did not leave when told to" if patient else "")
            await self.process.wait()
        self._lanes.release_memory()
        return self._epitaph()

    def _epitaph(self) -> Epitaph:
        return Epitaph(self.pid, self.process.exit_code, self.process.last_words, self.process.killed)

    def fail_all(self, epitaph: Epitaph) -> None:
        """Wake everyone who waits for the worker."""
        self.requests.fail_all(epitaph)
        self.process.artifacts.fail_all(epitaph)

    def _lane_lost(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _on_unloaded(self, model: int) -> None:
        self._unloading.pop(model, None)
        self._unloaded(self, model)


class Pool:
    """``size`` workers, on so many usable ``cores``.

    ``lost(worker, epitaph)`` is called when one has ended, ``unloaded(worker, model)`` when one has freed a model,
    ``checked()`` after each look at all of them, every ``patience / 4`` seconds.
    A worker that answers nothing for ``patience`` seconds while something waits for it is killed, one that computes
    meanwhile after 12 times as long.
    """

    def __init__(
        self,
        size: int,
        *,
        cores: int,
        settings: Settings,
        lost: Callable[[Worker, Epitaph], None],
        unloaded: Callable[[Worker, int], None],
        checked: Callable[[], None],
        patience: float = 5.0,
    ) -> None:
        self.size = size
        self.workers: list[Worker] = []
        """Those that are up."""
        self._every: WeakSet[Worker] = WeakSet()
        """Those that are starting, too."""
        self.restarts = 0
        self.turns = Turns(max(1, cores - 1), self._is_asked)
        self._settings = settings
        self._lost = lost
        self._unloaded = unloaded
        self._checked = checked
        self._patience = patience
        self._numbers = count(1)
        self._keepers: list[asyncio.Task[None]] = []
        self._decided = asyncio.Event()
        """Set while a worker is up, or none can be started."""
        self._broken: ModelCacheError | None = None
        self._closing = asyncio.Event()
        self._checking: asyncio.TimerHandle | None = None

    def _is_asked(self) -> bool:
        return any(worker.requests.is_asked for worker in self.workers)

    async def start(self) -> None:
        """Start all workers; if one cannot start, none stays, and it can be tried again."""
        self._closing.clear()
        starting = [asyncio.create_task(self._start_worker(index)) for index in range(self.size)]
        try:
            started = await asyncio.gather(*starting, return_exceptions=True)
        except asyncio.CancelledError:  # the loop ends; those that were still starting have ended what there was
            up = [task.result() for task in starting if not task.cancelled() and task.exception() is None]
            await asyncio.gather(*(worker.bury() for worker in up))
            raise
        self.workers = [worker for worker in started if isinstance(worker, Worker)]
        self._keepers = [self._employ_keeper(worker) for worker in self.workers]
        failures = [failure for failure in started if isinstance(failure, BaseException)]
        if failures:
            await self.close()
            raise failures[0]
        self._decided.set()
        self._check()

    def stop_starting(self) -> None:
        """Let workers that are not up yet end; a start may take as long as the predictor's import does."""
        self._closing.set()
        for worker in tuple(self._every):
            worker.give_up_starting()

    async def place(self) -> Worker:
        """Return the worker with the fewest bytes, waiting for one to come up if none is."""
        while not (up := self.up()):
            if self._closing.is_set():  # a store has let go of its load too late
                raise RegistryClosedError("The registry was closed while this model was loading.")
            if self._broken is not None:
                raise self._broken.fresh()
            self._decided.clear()  # the last one has ended, and its keeper has not noticed yet
            await self._decided.wait()
        return min(up, key=lambda worker: (worker.charged, len(worker.held)))

    def next_number(self) -> int:
        """Return a number for a model that no other has in any worker."""
        return next(self._numbers)

    async def close(self) -> None:
        """End all workers and wait until they have ended."""
        self.stop_starting()
        if self._checking is not None:
            self._checking.cancel()
        for worker in self.workers:
            worker.close()
        await asyncio.gather(*self._keepers)

    def abandon(self) -> None:
        """Let go of all workers at once, without a word to anybody: in a forked child, or without a loop."""
        for worker in self._every:
            worker.abandon()

    def up(self) -> list[Worker]:
        """Return the workers that are up."""
        return [worker for worker in self.workers if worker.alive]

    async def _start_worker(self, index: int) -> Worker:
        worker = Worker(index, self._unloaded)
        self._every.add(worker)
        await worker.start(self._settings)
        return worker

    def _employ_keeper(self, worker: Worker) -> asyncio.Task[None]:
        keeper = asyncio.create_task(self._keep(worker))
        keeper.add_done_callback(lambda _: worker.process.kill())  # it may be cancelled before it has begun
        return keeper

    async def _keep(self, worker: Worker) -> None:
        """Bury ``worker`` when it ends, and put another in its place; until the pool closes."""
        successor: Worker | None = worker
        while successor is not None:
            worker = successor
            try:
                await worker.ended
            except asyncio.CancelledError:  # the loop ends, and nobody has closed the registry
                await worker.bury(patient=True)
                raise
            self._note_who_is_up()
            epitaph = await worker.bury(patient=self._closing.is_set())
            self.workers.remove(worker)
            if not self._closing.is_set():
                logger.warning("%s; it is replaced", epitaph)
            worker.gone = True
            self._lost(worker, epitaph)
            worker.fail_all(epitaph)
            if self._closing.is_set():
                return
            successor = await self._replace(worker)

    async def _replace(self, worker: Worker) -> Worker | None:
        for attempt in count():
            try:
                successor = await self._start_worker(worker.index)
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
                self._broken = _as_crash(error)
                if not self._closing.is_set():  # or it was given up, since nobody needs it any more
                    logger.error("no worker can be started: %s", error)  # noqa: TRY400 - the error says it all
            else:
                self._broken = None
                self.restarts += 1
                self.workers.append(successor)
                self._note_who_is_up()
                if self._closing.is_set():
                    successor.close()
                return successor
            self._note_who_is_up()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), min(0.1 * 2**attempt, _LONGEST_BACKOFF))
            if self._closing.is_set():
                return None
        return None

    def _note_who_is_up(self) -> None:
        if self.up() or self._broken is not None:
            self._decided.set()
        else:
            self._decided.clear()

    def _check(self) -> None:
        now = monotonic()
        for worker in self.up():
            worker.check(now, self._patience)
        self._checked()
        self._checking = asyncio.get_running_loop().call_later(self._patience / 4, self._check)


def _as_crash(error: Exception) -> ModelCacheError:
    return error if isinstance(error, ModelCacheError) else WorkerCrashedError(f"No worker can be started: {error}")

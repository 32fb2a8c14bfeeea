"""ModelRegistry for programs without an event loop: ``prices = registry.predict("Chicago_IL", rows)``.

The registry of :mod:`modelcache`, method by method and without ``await``: it runs on an event loop of its own, in one
thread, for any number of threads that call. Its methods are made of the asynchronous ones; what is written out here is
what differs.
"""

from __future__ import annotations

import asyncio
import atexit
import warnings
import weakref
from contextlib import closing, contextmanager, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import modelcache
from modelcache.errors import RegistryClosedError
from modelcache.loop_thread import LoopThread, check_no_loop_runs_here

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    import numpy as np
    from numpy.typing import NDArray

    from modelcache.records import Event, ModelInfo, Output, PreloadProgress, PreloadReport

P = ParamSpec("P")
T = TypeVar("T")

_NAMES_AHEAD = 1000
"""Names that the store may be ahead of who reads them."""
_EXIT_PATIENCE = 2.0
"""Seconds that the interpreter's exit waits for a registry that nobody has closed."""


def _blocking(
    method: Callable[Concatenate[modelcache.ModelRegistry, P], Awaitable[T]],
) -> Callable[Concatenate[ModelRegistry, P], T]:
    """Make the method that waits for what ``method`` of the asynchronous registry returns."""

    @wraps(method)
    def wait(self: ModelRegistry, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.call(method, self._registry, *args, **kwargs)

    return wait


def _immediate(
    method: Callable[Concatenate[modelcache.ModelRegistry, P], T],
) -> Callable[Concatenate[ModelRegistry, P], T]:
    """Make the method that does what ``method`` of the asynchronous registry does without waiting."""

    @wraps(method)
    def ask(self: ModelRegistry, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.ask(method, self._registry, *args, **kwargs)

    return ask


def _parameters_of(
    init: Callable[Concatenate[modelcache.ModelRegistry, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[ModelRegistry, P], None]]:
    """Give a constructor the parameters of ``init``, for type checkers and for ``inspect``."""
    return wraps(init, assigned=("__annotations__",))


class Lease:
    """Holds one version of one model resident until the ``with`` block of ``acquire`` ends."""

    def __init__(self, thread: LoopThread, lease: modelcache.Lease) -> None:
        self._thread = thread
        self._lease = lease

    @property
    def name(self) -> str:
        """The model's name."""
        return self._lease.name

    @property
    def model(self) -> ModelInfo:
        """The model as it is now."""
        return self._thread.ask(lambda: self._lease.model)

    def predict(self, rows: Any, *, output: Output = "value", timeout: float | None = None) -> NDArray[np.float32]:
        """Return float32 predictions of shape (n,) or (n, k), as :meth:`ModelRegistry.predict` does."""
        return self._thread.call(self._lease.predict, rows, output=output, timeout=timeout)

    def __repr__(self) -> str:
        return repr(self._lease)


class ModelRegistry:
    """Very many small models behind one call, for threads.

    The parameters are those of :class:`modelcache.ModelRegistry`, and so are the methods, without ``await``. Any number
    of threads may call them; a call that is interrupted by Ctrl-C is cancelled.

    Use it as ``with ModelRegistry(...) as registry:``, or call :meth:`close` in the end; the first call starts it.
    Constructing one starts nothing, so that it may be made at the top of a module that a server imports before it forks
    (Gunicorn's ``preload_app``): each process that makes a call then has workers, and a ``memory_budget``, of its own.
    After a fork that follows its start it raises RegistryClosedError. So it does in a thread whose event loop it would
    block: there, use the asynchronous registry.
    """

    @_parameters_of(modelcache.ModelRegistry.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        self._registry = modelcache.ModelRegistry(*args, **options)
        self._thread = LoopThread(at_end=partial(self._registry.close, drain=0))
        _living.add(self)

    # From start to close

    def start(self) -> Self:
        """Start the workers; the first call does so too. Harmless when done twice."""
        self._thread.call(self._registry.start)
        return self

    def close(self, *, drain: float = 30.0) -> None:
        """Refuse new calls, let those in flight finish for ``drain`` seconds, and free everything.

        Callers that wait for a load get RegistryClosedError. Ctrl-C ends the draining. Harmless when done twice.
        """
        check_no_loop_runs_here()
        try:
            if self._thread.running:
                with suppress(RegistryClosedError):  # somebody else has closed it meanwhile
                    self._thread.call(self._registry.close, drain=drain)
        finally:
            self._thread.end()
        self._thread.join()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:  # nobody else could close it
            self.close(drain=0)
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._give_up()

    def _give_up(self) -> None:
        if self._thread.running:
            self._thread.end()
            warnings.warn(f"unclosed registry {self!r}", ResourceWarning, source=self, stacklevel=2)

    # Predictions

    predict = _blocking(modelcache.ModelRegistry.predict)
    invoke = _blocking(modelcache.ModelRegistry.invoke)

    # Holding models

    @contextmanager
    def acquire(self, name: str) -> Iterator[Lease]:
        """Hold ``name`` resident: ``with registry.acquire(name) as lease: lease.predict(rows)``."""
        with self._held(self._registry.acquire(name)) as lease:
            yield Lease(self._thread, lease)

    @contextmanager
    def acquire_many(self, names: Sequence[str]) -> Iterator[list[Lease]]:
        """Hold several models resident together; gives their leases in the order of ``names``.

        All or none, as :meth:`modelcache.ModelRegistry.acquire_many` says.
        """
        with self._held(self._registry.acquire_many(names)) as leases:
            yield [Lease(self._thread, lease) for lease in leases]

    @contextmanager
    def _held(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter and leave in one task, so that whoever is interrupted on the way in holds nothing."""

        async def hold(put: Callable[[T], None]) -> None:
            async with manager as held:
                put(held)
                await asyncio.Event().wait()  # until it is cancelled

        with closing(self._thread.stream(hold)) as leases:
            yield next(leases)

    # Residency

    load = _blocking(modelcache.ModelRegistry.load)

    def preload(
        self,
        names: Iterable[str],
        *,
        concurrency: int | None = None,
        on_progress: Callable[[PreloadProgress], None] | None = None,
    ) -> PreloadReport:
        """Make many models resident; ``names`` may be :meth:`names`. Failures are collected, not raised.

        ``on_progress`` is called after each model, in the caller's thread. Models that do not fit together evict each
        other: the last stay.
        """
        wanted = names if isinstance(names, str) else list(names)
        reports: list[PreloadReport] = []

        async def load(put: Callable[[PreloadProgress], None]) -> None:
            reports.append(await self._registry.preload(wanted, concurrency=concurrency, on_progress=put))

        for progress in self._thread.stream(load):
            if on_progress is not None:
                on_progress(progress)
        return reports[0]

    unload = _blocking(modelcache.ModelRegistry.unload)
    refresh = _blocking(modelcache.ModelRegistry.refresh)
    pin = _blocking(modelcache.ModelRegistry.pin)
    unpin = _immediate(modelcache.ModelRegistry.unpin)
    resize = _immediate(modelcache.ModelRegistry.resize)

    # What is known

    loaded = _immediate(modelcache.ModelRegistry.loaded)
    peek = _immediate(modelcache.ModelRegistry.peek)
    most_used = _immediate(modelcache.ModelRegistry.most_used)
    stats = _immediate(modelcache.ModelRegistry.stats)
    explain = _immediate(modelcache.ModelRegistry.explain)
    failure = _immediate(modelcache.ModelRegistry.failure)

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield what the store offers, as :meth:`predict` takes it, each name once."""
        room = asyncio.Semaphore(_NAMES_AHEAD)

        async def read(put: Callable[[str], None]) -> None:
            async for name in self._registry.names(prefix):
                await room.acquire()
                put(name)

        with closing(self._thread.stream(read)) as names:
            for name in names:
                self._thread.post(room.release)
                yield name

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``callback`` with each event as it happens; call what is returned to stop that.

        It is called in the thread of the registry, which does nothing else meanwhile: it must not wait for anything,
        nor call a method that does; each method of another registry of this module does, even :meth:`stats`. To act on
        events, have it put them into a ``queue.SimpleQueue``.
        """
        leave = self._thread.ask(self._registry.subscribe, callback)
        return partial(self._thread.ask, leave)

    def __repr__(self) -> str:
        return f"<sync.{repr(self._registry)[1:]}"


_living: weakref.WeakSet[ModelRegistry] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """End what nobody has closed, while the modules that this takes are whole."""
    left = tuple(_living)
    for registry in left:
        registry._give_up()  # noqa: SLF001 - the same module
    for registry in left:  # also those of which close() was interrupted
        registry._thread.join(_EXIT_PATIENCE)  # noqa: SLF001

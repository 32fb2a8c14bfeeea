"""An event loop in a thread of its own, which does errands for all other threads.

As anyio's blocking portal does, in one trip to the loop instead of two: a call of 64 us on the loop takes 97 us from
another thread, and 165 us through the portal; from 16 threads there are 2.7 times as many calls a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from modelcache.errand import END, Errand, Outcome
from modelcache.errors import RegistryClosedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("modelcache")

_CLOSED = "The registry is closed: make a new one."
_FORKED = (
    "This registry was started before the process forked: its thread and its workers belong to the parent. Make it "
    "before the fork if you like (in Gunicorn with preload_app: at the top of the module), but call it only after."
)
_ON_A_LOOP = (
    "A call of modelcache.sync would block the event loop that runs in this thread. Use modelcache.ModelRegistry here, "
    "with await; or have a thread make the call: await asyncio.to_thread(registry.predict, name, rows)."
)


def check_no_loop_runs_here() -> None:
    """Raise RegistryClosedError in a thread whose event loop a call would block."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RegistryClosedError(_ON_A_LOOP)


class LoopThread:
    """Starts with the first errand; ``at_end`` is the last, on another loop if its own has broken down or never began.

    Ctrl-C may come between any two steps of a thread that calls, and the garbage collector may give up an errand in any
    thread, also the loop's: to give up waits for nothing. Who calls next finds it given up: steps are taken in turn.
    """

    def __init__(self, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._at_end = at_end
        self._lock = threading.RLock()
        """Held while the loop starts, so that nothing else depends on whether there is one."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        """Runs the loop, if there is one."""
        self._over = asyncio.Event()
        self._refusal = ""
        """Why calls are refused; empty while they are not."""
        self._dead = False
        """No loop of this process takes steps any more."""
        self._steps: deque[Callable[[], object]] = deque()
        self._called = False
        """The loop has been told that there are steps to take."""
        self._under_way: set[Errand[Any]] = set()
        self._orphans: set[asyncio.Task[Any]] = set()
        """Tasks of the process that has forked this one: they would complain of being dropped."""
        _living.add(self)

    @property
    def running(self) -> bool:
        """Whether it has started and has not been told to end."""
        return self._loop is not None and not self._refusal

    def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``function(*args, **kwargs)`` in the loop, and wait for it; an interrupt cancels it."""
        self._check_and_start()
        return self._do(Errand(lambda _: function(*args, **kwargs)))

    def stream(self, function: Callable[[Callable[[T], None]], Awaitable[object]]) -> Generator[T, None, None]:
        """Await ``function(put)`` in the loop, and yield what it puts meanwhile; whoever stops early gives it up."""
        self._check_and_start()
        errand = Errand(function)
        try:
            self._send(errand)
            yield from iter(errand.items.get, END)
        except BaseException:  # such as GeneratorExit
            self._give_up(errand)
            raise
        errand.result()

    def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function``, which waits for nothing, where nothing changes meanwhile: in the loop, if there is one."""

        async def call(_: object) -> T:
            return function(*args, **kwargs)

        with self._lock:
            if self._loop is None:
                return function(*args, **kwargs)
        if not self._dead and self._thread is not threading.current_thread():
            try:
                return self._do(Errand(call))
            except RegistryClosedError:
                if not self._dead:
                    raise
        return function(*args, **kwargs)

    def end(self) -> None:
        """Refuse calls from now on, and have the loop end soon; if there is none, do here what it does last."""
        self._refusal = self._refusal or _CLOSED
        with self._lock:
            if self._loop is None and not self._dead:
                self._dead = True
                self._run_end()
        self.post(self._over.set)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the loop has ended, if there is one."""
        if self._loop is not None and self._thread is not None:
            self._thread.join(timeout)

    def forget_parent(self) -> None:
        """Run in a forked child, which has no thread but its own."""
        self._lock = threading.RLock()  # a thread of the parent may have held it
        if self._loop is not None and not self._dead:
            self._refusal = self._refusal or _FORKED
            self._orphans = asyncio.all_tasks(self._loop)
            self._die()

    # From other threads to the loop

    def _check_and_start(self) -> None:
        check_no_loop_runs_here()
        if self._loop is None:
            with self._lock:
                if self._loop is None and not self._refusal:
                    self._start()
        if self._refusal:
            raise RegistryClosedError(self._refusal)

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        # A daemon: the interpreter's exit must not wait for it.
        self._thread = threading.Thread(target=self._run, args=(loop,), name="modelcache", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # too many threads
            loop.close()
            raise
        self._loop = loop  # an interrupt before this leaves no loop: the thread, if there is one by now, sees that

    def _do(self, errand: Errand[T]) -> T:
        try:
            self._send(errand)
            errand.items.get()
        except BaseException:  # Ctrl-C
            self._give_up(errand)
            raise
        return errand.result()

    def _send(self, errand: Errand[Any]) -> None:
        self._under_way.add(errand)
        self.post(partial(errand.begin, self._ended))
        # 1. This thread adds its errand. 2. The loop ends. Whoever comes second sees what the first has done.
        if self._dead:
            self._refuse(errand)

    def _give_up(self, errand: Errand[Any]) -> None:
        self.post(partial(self._cancel, errand))

    def post(self, step: Callable[[], object]) -> None:
        """Have the loop take ``step`` soon; steps that come together wake it once."""
        self._steps.append(step)
        if self._called or self._loop is None or self._dead:
            return
        try:
            self._called = True
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._take_steps)
        except BaseException:  # Ctrl-C, maybe before the loop was told: the next step will tell it
            self._called = False
            raise

    # In the loop's thread

    def _take_steps(self) -> None:
        self._called = False
        while self._steps:
            self._steps.popleft()()

    def _cancel(self, errand: Errand[Any]) -> None:
        if not errand.cancel():  # nor will it begin: the interrupt came before the loop was told of it
            self._under_way.discard(errand)

    def _ended(self, errand: Errand[Any], task: asyncio.Task[Outcome]) -> None:
        outcome = (None, asyncio.CancelledError()) if task.cancelled() else task.result()
        if not (self._refusal and isinstance(outcome[1], asyncio.CancelledError)):  # else _die() tells it
            self._under_way.discard(errand)
            errand.finish(outcome)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:  # the start is over
            if self._loop is not loop:
                loop.close()
                return
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                broken = not self._serves(runner)
            if broken:
                self._run_end()
        finally:
            self._die()

    def _serves(self, runner: asyncio.Runner) -> bool:
        try:
            runner.run(self._serve())
        except BaseException as error:  # such as SystemExit in somebody's callback
            self._refusal = f"The event loop of this registry was ended by {error!r}: make a new registry."
            logger.exception("the event loop of modelcache.sync has broken down")
            return False
        return True

    async def _serve(self) -> None:
        self._take_steps()  # which came while it started
        await self._over.wait()
        for errand in tuple(self._under_way):  # whoever drains the registry need not wait for them any more
            errand.cancel()
        await self._at_end()

    def _run_end(self) -> None:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # which leaves the thread's own loop alone
            runner.run(self._at_end())

    def _die(self) -> None:
        self._dead = True
        for errand in tuple(self._under_way):
            self._refuse(errand)

    def _refuse(self, errand: Errand[Any]) -> None:
        self._under_way.discard(errand)
        errand.finish((None, RegistryClosedError(self._refusal)))


_living: weakref.WeakSet[LoopThread] = weakref.WeakSet()


def _after_fork() -> None:
    for thread in tuple(_living):
        thread.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

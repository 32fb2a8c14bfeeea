"""A coroutine that one thread wants done, and the loop of another does."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
Outcome: TypeAlias = tuple[Any, BaseException | None]
"""What a coroutine has returned, and what it has raised."""

END: Any = object()
"""The last of an errand's items."""


class Errand(Generic[T]):
    """A coroutine that the loop runs for another thread, which hears of it by ``items``.

    Refers to nothing that refers to it once it has ended: it is freed without the garbage collector.
    """

    def __init__(self, start: Callable[[Callable[[Any], None]], Awaitable[T]]) -> None:
        self.items: SimpleQueue[Any] = SimpleQueue()
        """What is put here on the way, and the end mark."""
        self._start = start
        self._context = copy_context()  # a trace that is under way in the caller's thread goes on in the loop's
        self._task: asyncio.Task[Outcome] | None = None
        self._outcome: Outcome

    def begin(self, ended: Callable[[Errand[Any], asyncio.Task[Outcome]], None]) -> None:
        """Run in the loop: start it, and call ``ended`` when it ends."""
        outcome = _outcome(self._start, self.items.put)
        self._task = asyncio.get_running_loop().create_task(outcome, context=self._context)
        self._task.add_done_callback(partial(ended, self))

    def cancel(self) -> bool:
        """Run in the loop: end it; False if it has not begun, or has ended."""
        return self._task is not None and self._task.cancel()

    def finish(self, outcome: Outcome) -> None:
        """Wake who waits for it."""
        self._task, self._outcome = None, outcome
        self.items.put(END)

    def result(self) -> T:
        """Return what it has returned, or raise what it has raised; once."""
        value, error = self._outcome
        del self._outcome
        try:
            if error is not None:
                raise error
            return value  # type: ignore[no-any-return]
        finally:
            del error  # its traceback refers to this frame


async def _outcome(start: Callable[[Callable[[Any], None]], Awaitable[Any]], put: Callable[[Any], None]) -> Outcome:
    try:
        return await start(put), None
    except BaseException as error:  # noqa: BLE001 - it is for the other thread
        return None, error

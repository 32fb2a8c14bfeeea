"""Whether a registry can be used: from this event loop, in this process, still."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import TYPE_CHECKING

from modelcache.errors import ModelCacheError, RegistryClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

_PLATFORM_REMEDY = "modelcache runs on Linux and macOS; on Windows, run it in WSL or in a container."


class Lifecycle:
    """New, open on one event loop, or closed for good.

    ``on_fork`` runs in a forked child, which must neither use nor keep open what belongs to the parent.
    """

    def __init__(self, on_fork: Callable[[], None]) -> None:
        if os.name != "posix":
            raise ModelCacheError(_PLATFORM_REMEDY)
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop it is open on; None before and after. Comparing with it is the whole check of a warm call."""
        self.started_on: asyncio.AbstractEventLoop | None = None
        self.closed = False
        self.forked = False
        self._on_fork = on_fork
        _living.add(self)

    def open(self) -> None:
        """It has started."""
        self.loop = self.started_on

    def close(self) -> None:
        """It is not to be used any more."""
        self.closed = True
        self.loop = None

    def check(self) -> None:
        """Raise RegistryClosedError, with the reason, if it cannot be started or used from here."""
        if self.forked:
            raise RegistryClosedError(
                "This registry was started before the process forked, and its workers belong to the parent. Make a "
                "registry in each process, after the fork (in Gunicorn: in the post_fork hook or the app's start-up)."
            )
        if self.closed:
            raise RegistryClosedError("The registry is closed: make a new one.")
        if self.started_on not in (None, asyncio.get_running_loop()):
            raise RegistryClosedError(
                "This registry runs on another event loop. Use it where it was started, or make one for this loop."
            )

    def forget_parent(self) -> None:
        """Run in a forked child: it is the parent's from now on."""
        if self.started_on is not None:
            self.forked = True
            self.loop = None
            self._on_fork()


_living: weakref.WeakSet[Lifecycle] = weakref.WeakSet()


def _after_fork() -> None:
    for lifecycle in list(_living):
        lifecycle.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

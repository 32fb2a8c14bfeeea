"""Local copies of the artifacts of remote stores, in a folder, under a byte budget of their own.

A worker that has loaded a model writes it, unpacked, to :meth:`DiskTier.incoming`; :meth:`DiskTier.publish` makes it a
copy that :meth:`DiskTier.find` finds, after restarts too, and in other processes of the host that use the same folder.
Files are named by the SHA-256 of their bytes, so equal models share one; what is published is in an SQLite index.

A process that is killed at any moment leaves nothing half-written to be found: a file gets its name in one step while
the index is locked, and the index is transactional. Nothing waits for the disk to have written, though: after a power
failure a file may be damaged, and whoever loads a copy checks its digest.

Measured with 10,000 copies: a find takes 1 us, hit or miss, and a miss 0.08 ms in a thread if others have published
since; a publication takes 0.4 ms, mostly of a thread, and half of that or less in a group; opening 0.4 s
(``python benchmarks/disk.py``). Why SQLite, and what else was measured, is told in docs/design-decisions.md.

The index is asked in threads, one call at a time: what it takes to keep index, files and memory in step is in
disk_catalogue.py. After :meth:`DiskTier.open` no fault of the disk is raised: a copy that cannot be found, kept or
removed is as good as none, and is warned of once for each kind of fault.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
import threading
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from modelcache.cache.policies import make_policy
from modelcache.errors import StoreAccessDeniedError, StoreError, StoreUnavailableError
from modelcache.sizing import parse_bytes, show_bytes
from modelcache.stores.disk_catalogue import FAULTS, Catalogue, Publication
from modelcache.stores.disk_index import DiskCopy, ForeignIndexError
from modelcache.stores.disk_ranking import Ranking

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from modelcache.cache.policies import PolicySpec

__all__ = ["DiskCopy", "DiskTier"]

logger = logging.getLogger("modelcache")

R = TypeVar("R")


class DiskTier:
    """Copies of artifacts below the folder ``path``, of at most ``budget`` bytes together.

    ``budget`` is a number of bytes or text like "10 GiB"; None means half of the space that is free or the tier's own
    when it is opened. The files that workers write come on top until they are published. Several processes may share
    the folder, on a local file system; each keeps all copies together within the budget it was given. ``policy`` names
    the eviction policy, as for ``ModelRegistry``.

    Making one touches nothing; :meth:`open` does. It belongs to the event loop that opened it.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, budget: int | str | None = None, policy: PolicySpec = "gdsf"
    ) -> None:
        self.path = Path(path).expanduser()
        ranking = Ranking(make_policy(policy))
        self._catalogue = Catalogue(self.path, ranking, parse_bytes(budget) if budget is not None else None, self._warn)
        self._limiter: anyio.CapacityLimiter | None = None
        self._lock = threading.Lock()
        """A cancelled call leaves the limiter while its thread still runs."""
        self._turn = asyncio.Lock()
        """Held by the publication that takes all that wait to a thread."""
        self._waiting: dict[Path, Publication] = {}
        """By the file; until they are done."""
        self._litter: deque[Path] = deque()
        """Files whose publication was cancelled or given up."""
        self._numbers = count(1)
        self._warned: set[tuple[object, ...]] = set()

    # Figures

    @property
    def budget(self) -> int:
        """Bytes that all copies may take; 0 until a default is worked out by :meth:`open`."""
        return self._catalogue.budget

    @property
    def bytes(self) -> int:
        """Bytes of all published files, those of other processes included, as of the last change by this one."""
        return self._catalogue.totals.bytes

    @property
    def copies(self) -> int:
        """Published copies, as of the same moment; copies of equal bytes share a file."""
        return self._catalogue.totals.copies

    @property
    def evictions(self) -> int:
        """Files that this object has evicted to make room."""
        return self._catalogue.evictions

    @property
    def is_open(self) -> bool:
        """True between :meth:`open` and :meth:`close`."""
        return self._catalogue.is_open

    def __repr__(self) -> str:
        return (
            f"<DiskTier {self.path} {self.copies} copies, {show_bytes(self.bytes)} of {show_bytes(self.budget)}"
            f"{', closed' * (not self.is_open)}>"
        )

    # The interface; each method but find() hops to a thread

    async def open(self) -> None:
        """Make the folder and the index, or take over what is there; harmless when done twice.

        Removes what killed processes have left, forgets copies whose files are gone, and evicts what is beyond the
        budget. A damaged index is set aside, and the tier starts empty. Raises StoreError and its kinds.
        """
        if not self.is_open:
            self._limiter, self._turn = anyio.CapacityLimiter(1), asyncio.Lock()
        await self._in_thread(self._open)

    async def close(self) -> None:
        """Let go of the folder; what is published stays. Harmless when done twice."""
        await self._in_thread(self._close)

    async def find(self, store: str, name: str) -> DiskCopy | None:
        """Return the copy of an artifact; ``store`` is any text that tells stores apart.

        What this process knows is returned at once, and so is None if nobody has published anything since it knew all;
        otherwise the index is asked, since another process may have it. The file may be gone or damaged when it is
        read: then :meth:`drop` the copy, and find again if you like, as another process may have replaced it.
        """
        copy = self._catalogue.known(store, name)
        if copy is None and not self._is_missing(name):
            copy = await self._attempt("look up", name, partial(self._look_up, store, name))
        if copy is not None:
            self._catalogue.uses.append(copy.digest)
        return copy

    def _is_missing(self, name: str) -> bool:
        """Say whether nobody has a copy of what is not known, and nobody here is about to."""
        waiting = [*self._waiting.values()]  # in one step: a thread takes some out meanwhile
        return self._catalogue.lacks_what_is_not_known() and all(other.copy.name != name for other in waiting)

    def incoming(self) -> Path:
        """Return a fresh path for a worker to write to, to be passed to :meth:`publish` or :meth:`discard`."""
        return self._catalogue.folder.incoming / str(next(self._numbers))

    async def discard(self, incoming: Path) -> None:
        """Remove a file that will not be published, if there is one."""
        self._litter.append(incoming)
        await self._attempt("remove", str(incoming), self._collect_litter)

    async def publish(
        self,
        incoming: Path,
        *,
        store: str,
        name: str,
        version: str,
        suffix: str,
        size: int,
        digest: str,
        artifact_bytes: int,
        cost: float,
        validated_at: float,
        within: float = 0.0,
    ) -> DiskCopy | None:
        """Turn a written file into the copy of an artifact, in the place of any other of that name.

        ``size`` and ``digest`` are those of the file, ``version``, ``suffix`` and ``artifact_bytes`` those of the
        artifact; ``cost`` is the seconds its load took, ``validated_at`` the wall-clock time at which the store
        announced the version. None says that it is not kept: it is larger than the budget, the disk failed, or a
        version that another process got from the store later is there. ``incoming`` is gone in any case.

        The publications that wait are made together; for others to come, this one may wait ``within`` seconds. A call
        of :meth:`find` for its name, or of :meth:`close`, ends the wait.
        """
        copy = DiskCopy(
            store=store, name=name, version=version, suffix=suffix, size=size, digest=digest,
            artifact_bytes=artifact_bytes, validated_at=validated_at, folder=self._catalogue.folder.models_folder,
            serial=0,
        )  # fmt: skip
        publication = self._waiting[incoming] = Publication(incoming, copy, cost)
        try:
            async with self._turn:
                if within and not publication.is_done:
                    await asyncio.sleep(within)
                if not publication.is_done:
                    await self._in_thread(self._publish_waiting)
        except BaseException:  # cancelled, perhaps before the thread had it
            self._waiting.pop(incoming, None)
            self._litter.append(incoming)
            raise
        if publication.error is not None:
            self._warn_of("keep", name, publication.error)
        return publication.result

    async def revalidated(self, copy: DiskCopy, at: float) -> None:
        """Note that at ``at``, in wall-clock seconds, the store has confirmed the version of ``copy``."""
        await self._attempt("note the validation of", copy.name, partial(self._catalogue.revalidate, copy, at))

    async def drop(self, copy: DiskCopy) -> None:
        """Remove a copy whose file is damaged or gone, and all that share the file.

        One that has been published anew since ``copy`` was found stays.
        """
        await self._attempt("drop", copy.name, partial(self._catalogue.drop, copy))

    async def forget(self, store: str, name: str) -> None:
        """Remove the copy of an artifact that the store does not have any more."""
        await self._attempt("forget", name, partial(self._catalogue.forget, store, name))

    # To a thread, and back without a fault

    async def _in_thread(self, function: Callable[[], R]) -> R:
        def locked() -> R:
            with self._lock:
                try:
                    return function()
                except BaseException:
                    self._catalogue.doubt()
                    raise

        return await anyio.to_thread.run_sync(locked, limiter=self._limiter)

    async def _attempt(self, doing: str, what: str, function: Callable[[], R]) -> R | None:
        try:
            return await self._in_thread(function)
        except FAULTS as error:
            self._warn_of(doing, what, error)
            return None

    def _warn_of(self, doing: str, what: str, error: Exception) -> None:
        self._warn((doing, type(error), getattr(error, "errno", None)), f"could not {doing} {what}: {error}")

    def _warn(self, kind: tuple[object, ...], message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            # What cannot be kept may be a name that cannot be written either.
            logger.warning("the disk cache %s %s", self.path, message.encode(errors="backslashreplace").decode())

    # In a thread, under the lock

    def _open(self) -> None:
        try:
            self._catalogue.open()
        except ForeignIndexError as error:
            raise StoreError(
                f"{error} is the database of another program: give disk_cache a folder of its own."
            ) from None
        except (OSError, sqlite3.Error) as error:
            raise _opening_error(error, self.path) from error

    def _close(self) -> None:
        if self.is_open:
            self._publish_waiting()
        self._catalogue.close()
        self._litter.clear()

    def _look_up(self, store: str, name: str) -> DiskCopy | None:
        self._publish_waiting()
        return self._catalogue.look_up(store, name)

    def _publish_waiting(self) -> None:
        group = [*self._waiting.values()]
        if group:
            self._catalogue.publish(group)
        for publication in group:
            self._waiting.pop(publication.incoming, None)
        self._collect_litter()

    def _collect_litter(self) -> None:
        while self._litter:
            self._litter.popleft().unlink(missing_ok=True)


def _opening_error(error: OSError | sqlite3.Error, path: Path) -> StoreError:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreAccessDeniedError(
            f"The disk cache {path} cannot be written to ({error}): make the folder writable for this user, or give "
            "disk_cache another one."
        )
    if number in (errno.EEXIST, errno.ENOTDIR):
        return StoreError(f"The disk cache {path} is not a folder ({error}): give disk_cache a folder.")
    return StoreUnavailableError(f"The disk cache {path} could not be opened: {error}.")

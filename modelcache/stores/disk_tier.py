"""Local copies of the artifacts of remote stores, in a folder, under a byte budget of their own.

A worker that has loaded a model writes it, unpacked, to :meth:`DiskTier.incoming`; :meth:`DiskTier.publish` makes it a
copy that :meth:`DiskTier.find` finds, after restarts too, and in other processes of the host that use the same folder.
Files are named by the SHA-256 of their bytes, so equal models share one; what is published is in an SQLite index.

A process that is killed at any moment leaves nothing half-written to be found: a file gets its name in one step while
the index is locked, and the index is transactional. Nothing waits for the disk to have written, though: after a power
failure a file may be damaged, and whoever loads a copy checks its digest.

Measured with 10,000 copies: a find that hits takes 0.4 us, one that misses 0.06 ms, a publication 0.3 ms, mostly
of a thread, and opening 0.3 s (``python benchmarks/disk.py``); why SQLite, and what else was measured, is told in
docs/design-decisions.md.

The index is asked in threads, one call at a time. After :meth:`DiskTier.open` no fault of the disk is raised: a copy
that cannot be found, kept or removed is as good as none, and is warned of once for each kind of fault.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from modelcache.cache.policies import make_policy
from modelcache.errors import RegistryClosedError, StoreAccessDeniedError, StoreError, StoreUnavailableError
from modelcache.sizing import parse_bytes, show_bytes
from modelcache.stores.disk_folder import CacheFolder, is_digest
from modelcache.stores.disk_index import DiskCopy, ForeignIndexError, Index, Totals, is_damage
from modelcache.stores.disk_ranking import Ranking

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from modelcache.cache.policies import PolicySpec

__all__ = ["DiskCopy", "DiskTier"]

logger = logging.getLogger("modelcache")

R = TypeVar("R")

_FAULTS = (OSError, sqlite3.Error, UnicodeError)
"""What a disk can do to us; the last is a name or version that SQLite cannot take."""

_USES_REPLAYED = 8
"""A policy is told of no more uses than that from before a restart."""
_USES_NOTED = 10_000
_USES_WRITTEN = 100
"""At most so many in one transaction: it should be short."""
_NOTHING = -1
"""Serial number before all others."""
_STRANGERS = 1000
"""Files that others have removed, and that the ranking may know all the same."""
_SHARE = 2
"""The default budget is the space that is free, or the tier's already, divided by this."""


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
        self.evictions = 0
        """Files that this object has evicted to make room."""
        self._budget = parse_bytes(budget) if budget is not None else None
        self._default_budget = 0
        self._ranking = Ranking(make_policy(policy))
        self._folder: CacheFolder | None = None
        self._index: Index | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._lock = threading.Lock()
        """A cancelled call leaves the limiter while its thread still runs."""
        self._table: dict[tuple[str, str], DiskCopy] = {}
        """By store and name. Written in threads, under the lock; each step on it is atomic, so reading needs none."""
        self._uses: deque[str] = deque(maxlen=_USES_NOTED)
        """Digests that were found since the index and the policy were last told."""
        self._litter: deque[Path] = deque()
        """Files whose publication was cancelled or given up."""
        self._numbers = count(1)
        self._seen = 0
        """The serial number up to which the ranking knows what was published."""
        self._totals = Totals(0, 0, 0)
        self._warned: set[tuple[object, ...]] = set()

    # Figures

    @property
    def budget(self) -> int:
        """Bytes that all copies may take; 0 until a default is worked out by :meth:`open`."""
        return self._default_budget if self._budget is None else self._budget

    @property
    def bytes(self) -> int:
        """Bytes of all published files, those of other processes included, as of the last call that asked the index."""
        return self._totals.bytes

    @property
    def copies(self) -> int:
        """Published copies, as of the same moment; copies of equal bytes share a file."""
        return self._totals.copies

    @property
    def is_open(self) -> bool:
        """True between :meth:`open` and :meth:`close`."""
        return self._index is not None

    def __repr__(self) -> str:
        return (
            f"<DiskTier {self.path} {self.copies} copies, {show_bytes(self.bytes)} of {show_bytes(self.budget)}"
            f"{', closed' * (self._index is None)}>"
        )

    # The interface; each method but find() hops to a thread

    async def open(self) -> None:
        """Make the folder and the index, or take over what is there; harmless when done twice.

        Removes what killed processes have left, forgets copies whose files are gone, and evicts what is beyond the
        budget. A damaged index is set aside, and the tier starts empty. Raises StoreError and its kinds.
        """
        self._limiter = self._limiter or anyio.CapacityLimiter(1)
        await self._in_thread(self._open)

    async def close(self) -> None:
        """Let go of the folder; what is published stays. Harmless when done twice."""
        await self._in_thread(self._close)

    async def find(self, store: str, name: str) -> DiskCopy | None:
        """Return the copy of an artifact; ``store`` is any text that tells stores apart.

        A copy that this process knows is returned at once; only otherwise the index is asked, since another process
        may have published it. The file may be gone or damaged when it is read: then :meth:`drop` the copy, and find
        again if you like, as another process may have replaced it.
        """
        copy = self._table.get((store, name))
        if copy is None:
            copy = await self._attempt("look up", name, partial(self._look_up, store, name))
        if copy is not None:
            self._uses.append(copy.digest)
        return copy

    def incoming(self) -> Path:
        """Return a fresh path for a worker to write to, to be passed to :meth:`publish` or :meth:`discard`."""
        if self._folder is None:
            raise self._closed()
        return self._folder.incoming / str(next(self._numbers))

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
    ) -> DiskCopy | None:
        """Turn a written file into the copy of an artifact, in the place of any other of that name.

        ``size`` and ``digest`` are those of the file, ``version``, ``suffix`` and ``artifact_bytes`` those of the
        artifact; ``cost`` is the seconds its load took, ``validated_at`` the wall-clock time at which the store
        announced the version. None says that it is not kept: it is larger than the budget, the disk failed, or a
        version that another process got from the store later is there. ``incoming`` is gone in any case.
        """
        if self._folder is None:
            raise self._closed()
        copy = DiskCopy(
            store=store, name=name, version=version, suffix=suffix, size=size, digest=digest,
            artifact_bytes=artifact_bytes, validated_at=validated_at, path=self._folder.model(digest), serial=0,
        )  # fmt: skip
        try:
            return await self._attempt("keep", name, partial(self._publish, incoming, copy, cost))
        except BaseException:  # cancelled, perhaps before the thread had it
            self._litter.append(incoming)
            raise

    async def revalidated(self, copy: DiskCopy, at: float) -> None:
        """Note that at ``at``, in wall-clock seconds, the store has confirmed the version of ``copy``."""
        await self._attempt("note the validation of", copy.name, partial(self._revalidate, copy, at))

    async def drop(self, copy: DiskCopy) -> None:
        """Remove a copy whose file is damaged or gone, and all that share the file.

        One that has been published anew since ``copy`` was found stays.
        """
        await self._attempt("drop", copy.name, partial(self._drop, copy))

    async def forget(self, store: str, name: str) -> None:
        """Remove the copy of an artifact that the store does not have any more."""
        await self._attempt("forget", name, partial(self._forget, store, name))

    # To a thread, and back without a fault

    async def _in_thread(self, function: Callable[[], R]) -> R:
        def locked() -> R:
            with self._lock:
                return function()

        return await anyio.to_thread.run_sync(locked, limiter=self._limiter)

    async def _attempt(self, doing: str, what: str, function: Callable[[], R]) -> R | None:
        try:
            return await self._in_thread(function)
        except _FAULTS as error:
            self._warn((doing, type(error), getattr(error, "errno", None)), f"could not {doing} {what}: {error}")
            return None

    def _warn(self, kind: tuple[object, ...], message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("the disk cache %s %s", self.path, message)

    def _opened(self) -> tuple[CacheFolder, Index]:
        if self._folder is None or self._index is None:
            raise self._closed()
        return self._folder, self._index

    def _closed(self) -> RegistryClosedError:
        return RegistryClosedError(f"The disk cache {self.path} is not open: await its open() first.")

    # Opening and closing

    def _open(self) -> None:
        if self._index is not None:
            return
        folder = CacheFolder(self.path)
        try:
            folder.make()
            with folder.to_itself():
                self._move_in(folder)
        except ForeignIndexError:
            raise StoreError(
                f"{folder.index} is the database of another program: give disk_cache a folder of its own."
            ) from None
        except (OSError, sqlite3.Error) as error:
            raise _opening_error(error, self.path) from error

    def _move_in(self, folder: CacheFolder) -> None:
        is_shared = folder.sweep()
        folder.move_in()
        try:
            self._index = self._open_index(folder, is_shared=is_shared)
        except BaseException:
            folder.move_out()
            raise
        self._folder = folder

    def _open_index(self, folder: CacheFolder, *, is_shared: bool) -> Index:
        try:
            return self._opened_index(folder)
        except (sqlite3.Error, UnicodeError) as error:
            if not is_damage(error):
                raise
            if is_shared:
                raise StoreError(
                    f"The index {folder.index} cannot be read ({error}), and another process uses it: end that, or "
                    "give disk_cache another folder."
                ) from error
            aside = folder.set_index_aside()
            logger.warning("the disk cache %s starts empty: its index (now %s): %s", self.path, aside, error)
            return self._opened_index(folder)

    def _opened_index(self, folder: CacheFolder) -> Index:
        index = Index(folder)
        try:
            self._take_stock(folder, index)
        except BaseException:
            index.close()
            raise
        return index

    def _take_stock(self, folder: CacheFolder, index: Index) -> None:
        """Make index, files and figures agree, and read in what there is."""
        with index.writing():
            on_disk = folder.models()
            for digest, size in index.sizes().items():
                if on_disk.get(digest) != size:
                    index.remove_file(digest)
            index.recount()
            self._default_budget = (folder.free() + index.totals().bytes) // _SHARE
            self._seen = _NOTHING
            self._catch_up(index)
            evicted = self._make_room(index, 0)
            listed = index.sizes()
            self._table = {(copy.store, copy.name): copy for copy in index.copies()}
            self._totals = index.totals()
            for digest in on_disk.keys() - listed.keys():
                folder.remove(digest)
        self.evictions += len(evicted)

    def _close(self) -> None:
        if self._folder is None or self._index is None:
            return
        with suppress(*_FAULTS), self._index.writing():
            self._write_uses(self._index, len(self._uses))
        self._index.close()
        self._folder.move_out()
        self._folder = self._index = None
        self._table = {}
        self._litter.clear()

    # In a thread, under the lock

    def _look_up(self, store: str, name: str) -> DiskCopy | None:
        _, index = self._opened()
        copy = index.copy(store, name)
        if copy is not None:
            self._table[store, name] = copy
        return copy

    def _publish(self, incoming: Path, copy: DiskCopy, cost: float) -> DiskCopy | None:
        folder, index = self._opened()
        try:
            if not self._is_acceptable(incoming, copy):
                return None
            return self._admit(folder, index, incoming, copy, cost)
        finally:
            incoming.unlink(missing_ok=True)
            self._collect_litter()

    def _is_acceptable(self, incoming: Path, copy: DiskCopy) -> bool:
        if copy.size > self.budget:
            self._warn(
                ("too large",),
                f"does not keep {copy.name}: it has {copy.size:,} bytes, more than the whole budget of {self.budget:,}",
            )
            return False
        written = incoming.stat().st_size
        if written != copy.size or not is_digest(copy.digest):
            self._warn(
                ("wrong",),
                f"does not keep {copy.name}: {written:,} bytes were written, {copy.size:,} reported, with the digest "
                f"{copy.digest!r}",
            )
            return False
        return True

    def _admit(self, folder: CacheFolder, index: Index, incoming: Path, copy: DiskCopy, cost: float) -> DiskCopy | None:
        """Publish in one transaction. Killed before its end, the file is unlisted; after it, those evicted are."""
        try:
            with index.writing():
                if self._is_outdated(index, copy):
                    return None
                self._catch_up(index)
                replaced, evicted = self._list(index, copy, cost)
                copy = replace(copy, serial=self._seen)
                folder.admit(incoming, copy.digest)
                totals, sharing = index.totals(), {*index.names(copy.digest)}
        except BaseException:
            self._seen = _NOTHING  # what was evicted is back
            self._remove_unlisted(folder, index, [copy.digest])  # it may have its name already
            raise
        for key in sharing & self._table.keys():
            self._table[key] = replace(self._table[key], serial=copy.serial)
        self._table[copy.store, copy.name] = copy
        self._totals = totals
        self.evictions += len(evicted)
        self._remove_unlisted(folder, index, replaced + evicted)
        return copy

    def _is_outdated(self, index: Index, copy: DiskCopy) -> bool:
        """Say whether another process has got another version from the store since this one was announced.

        Unless that lies in the future: then the clock was set back, and tells nothing.
        """
        listed = index.copy(copy.store, copy.name)
        return (
            listed is not None
            and listed.version != copy.version
            and copy.validated_at < listed.validated_at <= time.time()
        )

    def _list(self, index: Index, copy: DiskCopy, cost: float) -> tuple[list[str], list[str]]:
        """List a copy within the budget; return the digest of a file that it replaces, and those of evicted ones."""
        replaced = index.remove_copy(copy.store, copy.name)
        is_unused = replaced is not None and replaced != copy.digest and self._unlist(index, replaced)
        self._ranking.remove(copy.digest)  # it must not make room for itself
        known = index.file(copy.digest)
        evicted = self._make_room(index, copy.size - (known.size if known else 0))
        self._seen = index.put_file(copy.digest, copy.size, cost)
        index.put_copy(copy)
        self._ranking.insert(copy.digest, copy.size, cost)
        return [replaced] if replaced is not None and is_unused else [], evicted

    def _make_room(self, index: Index, size: int) -> list[str]:
        """Evict files until ``size`` more bytes fit; return their digests."""
        evicted: list[str] = []
        while index.totals().bytes + size > self.budget:
            if not self._ranking:
                raise sqlite3.DatabaseError("the index counts bytes of files that it does not list")
            digest = self._ranking.evict()
            if self._unlist(index, digest):  # else another process has done so
                evicted.append(digest)
        return evicted

    def _unlist(self, index: Index, digest: str) -> bool:
        for store, name in index.names(digest):
            self._leave_table(store, name, digest)
        self._ranking.remove(digest)
        return index.remove_file(digest)

    def _leave_table(self, store: str, name: str, digest: str) -> None:
        known = self._table.get((store, name))
        if known is not None and known.digest == digest:
            del self._table[store, name]

    def _remove_unlisted(self, folder: CacheFolder, index: Index, digests: list[str]) -> None:
        """Remove files, but none that has been published again; nobody can publish between the look and the removal."""
        if not digests:
            return
        try:
            with index.writing():
                for digest in digests:
                    if index.file(digest) is None:
                        folder.remove(digest)
        except _FAULTS as error:  # they are removed when the tier is next opened
            self._warn(
                ("remove", type(error)), f"could not remove {len(digests)} files, which it does not list: {error}"
            )

    def _revalidate(self, copy: DiskCopy, at: float) -> None:
        _, index = self._opened()
        index.validate(copy, at)
        self._table.pop((copy.store, copy.name), None)  # another process may have removed it
        self._look_up(copy.store, copy.name)

    def _drop(self, copy: DiskCopy) -> None:
        folder, index = self._opened()
        known = self._table.get((copy.store, copy.name))
        if known is not None and known.serial == copy.serial:
            del self._table[copy.store, copy.name]
        with index.writing():
            listed = index.file(copy.digest)
            if listed is None or listed.serial != copy.serial:
                return
            self._unlist(index, copy.digest)
            totals = index.totals()
        self._totals = totals
        self._remove_unlisted(folder, index, [copy.digest])

    def _forget(self, store: str, name: str) -> None:
        folder, index = self._opened()
        self._table.pop((store, name), None)
        with index.writing():
            unused = index.remove_copy(store, name)
            if unused is not None:
                self._unlist(index, unused)
            totals = index.totals()
        self._totals = totals
        if unused is not None:
            self._remove_unlisted(folder, index, [unused])

    def _collect_litter(self) -> None:
        while self._litter:
            self._litter.popleft().unlink(missing_ok=True)

    # What the policy knows

    def _catch_up(self, index: Index) -> None:
        """Tell the index of uses, and the ranking of those uses and of what was published since it was last told."""
        self._write_uses(index, _USES_WRITTEN)
        is_complete = self._seen == _NOTHING
        files = index.files_after(self._seen)
        for file in files:
            self._seen = max(self._seen, file.serial)
            if file.digest not in self._ranking:
                self._ranking.insert(file.digest, file.size, file.cost)
                for _ in range(min(file.uses, _USES_REPLAYED) - 1):
                    self._ranking.hit(file.digest)
        if is_complete:
            self._ranking.retain({file.digest for file in files})
        elif len(self._ranking) > index.totals().files + _STRANGERS:
            self._ranking.retain(index.sizes())

    def _write_uses(self, index: Index, most: int) -> None:
        digests = [self._uses.popleft() for _ in range(min(most, len(self._uses)))]
        for digest in digests:
            self._ranking.hit(digest)
        for digest, times in Counter(digests).items():
            index.use(digest, times)


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

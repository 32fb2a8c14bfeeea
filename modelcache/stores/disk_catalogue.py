"""What a disk tier does in its thread: changes of index, files and ranking that belong together.

Publications that wait are made in one transaction. Killed before its end, their files are unlisted; after it, those
that were evicted or replaced are. Both kinds are removed when the tier is next opened.

What the index lists is known in memory, too, as of the last transaction, and so is what it does not list as long as
the mark says that nobody has published anything since.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelcache.errors import RegistryClosedError, StoreError
from modelcache.stores.disk_changes import ChangeMark
from modelcache.stores.disk_folder import CacheFolder, is_digest
from modelcache.stores.disk_index import DiskCopy, Index, Totals, is_busy, is_damage

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from pathlib import Path

    from modelcache.stores.disk_ranking import Ranking

logger = logging.getLogger("modelcache")

FAULTS = (OSError, sqlite3.Error, UnicodeError)
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


@dataclass(slots=True, eq=False)
class Publication:
    """A written file that is to become a copy, and what has become of it."""

    incoming: Path
    copy: DiskCopy
    cost: float
    """Seconds that the load took."""
    result: DiskCopy | None = None
    """The copy, once it is published."""
    error: Exception | None = None
    is_done: bool = False
    is_moved: bool = False
    """True once the file has its name among the models, or is one of those already."""


class Catalogue:
    """The copies in a folder, as one process knows and changes them.

    Everything here blocks, and is called by one thread at a time, but for :meth:`known` and :meth:`lacks`, which the
    event loop calls meanwhile: what they read is changed in steps that are atomic.
    """

    def __init__(self, path: Path, ranking: Ranking, budget: int | None, warn: Callable[..., None]) -> None:
        self.path = path
        self.ranking = ranking
        self.evictions = 0
        self.totals = Totals(0, 0, 0, 0)
        self.table: dict[tuple[str, str], DiskCopy] = {}
        """By store and name."""
        self.uses: deque[str] = deque(maxlen=_USES_NOTED)
        """Digests that were found since the index and the policy were last told."""
        self._budget = budget
        self._default_budget = 0
        self._warn = warn
        self._folder: CacheFolder | None = None
        self._index: Index | None = None
        self._changes: ChangeMark | None = None
        self._serials: dict[str, int] = {}
        """Of the files that this process has published: copies in the table that share one may have a lower number."""
        self._seen = _NOTHING
        """The serial number up to which table and ranking know what was published."""
        self._complete_at: bytes | None = None
        """What the mark was when the table had all that is listed; None when nobody knows."""

    # What the loop may ask

    @property
    def budget(self) -> int:
        """Bytes that all copies may take; 0 until a default is worked out."""
        return self._default_budget if self._budget is None else self._budget

    @property
    def is_open(self) -> bool:
        """True between :meth:`open` and :meth:`close`."""
        return self._index is not None

    @property
    def folder(self) -> CacheFolder:
        """Where the files are."""
        if self._folder is None:
            raise self._closed()
        return self._folder

    def known(self, store: str, name: str) -> DiskCopy | None:
        """Return a copy from memory."""
        copy = self.table.get((store, name))
        if copy is None:
            return None
        serial = self._serials.get(copy.digest, 0)
        return copy if serial <= copy.serial else replace(copy, serial=serial)

    def lacks_what_is_not_known(self) -> bool:
        """Say whether memory has all that is published: then what it does not have is not there."""
        changes, complete_at = self._changes, self._complete_at
        return changes is not None and complete_at is not None and changes.read() == complete_at

    def doubt(self) -> None:
        """Something went wrong, and memory may not be what the index is."""
        self._complete_at = None

    # Opening and closing

    def open(self) -> None:
        """Take over what is there. Raises OSError, sqlite3.Error, StoreError and ForeignIndexError."""
        if self._index is not None:
            return
        folder = CacheFolder(self.path)
        folder.make()
        with folder.to_itself():
            is_shared = folder.sweep()
            folder.move_in()
            try:
                self._move_in(folder, is_shared=is_shared)
            except BaseException:
                folder.move_out()
                raise

    def _move_in(self, folder: CacheFolder, *, is_shared: bool) -> None:
        changes = ChangeMark(folder.changes)
        try:
            self._index = self._open_index(folder, changes, is_shared=is_shared)
        except BaseException:
            changes.close()
            raise
        self._folder, self._changes = folder, changes

    def _open_index(self, folder: CacheFolder, changes: ChangeMark, *, is_shared: bool) -> Index:
        try:
            return self._opened_index(folder, changes)
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
            return self._opened_index(folder, changes)

    def _opened_index(self, folder: CacheFolder, changes: ChangeMark) -> Index:
        index = Index(folder)
        try:
            self._take_stock(folder, index, changes)
        except BaseException:
            index.close()
            raise
        return index

    def _take_stock(self, folder: CacheFolder, index: Index, changes: ChangeMark) -> None:
        """Make index, files and figures agree, and read in what there is."""
        with index.writing():
            on_disk = folder.models()
            for digest, size in index.sizes().items():
                if on_disk.get(digest) != size:
                    index.remove_file(digest)
            index.recount()
            self._default_budget = (folder.free() + index.totals.bytes) // _SHARE
            self._seen, self.table = _NOTHING, {}
            self._catch_up(index)
            evicted = self._make_room(index, 0)
            for digest in on_disk.keys() - index.sizes().keys():
                folder.remove(digest)
            self._complete_at = changes.read()
        self.totals = index.totals
        self.evictions += len(evicted)

    def close(self) -> None:
        """Let go of the folder; what is published stays."""
        if self._folder is None or self._index is None or self._changes is None:
            return
        with suppress(*FAULTS), self._index.writing():
            self._write_uses(self._index, len(self.uses))
        self._index.close()
        self._changes.close()
        self._folder.move_out()
        self._folder = self._index = self._changes = self._complete_at = None
        self.table, self._serials = {}, {}

    def _opened(self) -> tuple[CacheFolder, Index, ChangeMark]:
        if self._folder is None or self._index is None or self._changes is None:
            raise self._closed()
        return self._folder, self._index, self._changes

    def _closed(self) -> RegistryClosedError:
        return RegistryClosedError(f"The disk cache {self.path} is not open: await its open() first.")

    # Publishing

    def publish(self, group: list[Publication]) -> None:
        """Publish all that can be, and remove the files of the others; never raises what a disk can do."""
        self._opened()
        acceptable = [publication for publication in group if self._is_acceptable(publication)]
        try:
            self._admit_or_tell(acceptable)
        finally:
            for publication in group:
                if not publication.is_moved:
                    with suppress(OSError):
                        publication.incoming.unlink(missing_ok=True)
                publication.is_done = True

    def _is_acceptable(self, publication: Publication) -> bool:
        copy = publication.copy
        if copy.size > self.budget:
            self._warn(
                ("too large",),
                f"does not keep {copy.name}: it has {copy.size:,} bytes, more than the whole budget of {self.budget:,}",
            )
            return False
        try:
            written = self.folder.receive(publication.incoming)
        except OSError as error:
            publication.error = error
            return False
        if written != copy.size or not is_digest(copy.digest):
            self._warn(
                ("wrong",),
                f"does not keep {copy.name}: {written:,} bytes were written, {copy.size:,} reported, with the digest "
                f"{copy.digest!r}",
            )
            return False
        return True

    def _admit_or_tell(self, group: list[Publication]) -> None:
        """Publish in one transaction or, if that fails, each in one of its own: it may be the fault of one."""
        if not group:
            return
        try:
            self._admit(group)
        except FAULTS as error:
            self.doubt()
            alone = [publication for publication in group if not publication.is_moved]
            if len(group) == 1 or is_busy(error) or len(alone) < len(group):
                for publication in group:
                    publication.error = error
                return
            for publication in alone:
                self._admit_or_tell([publication])

    def _admit(self, group: list[Publication]) -> None:
        folder, index, changes = self._opened()
        # Before others have to wait for the lock.
        known = {publication.copy.digest for publication in group if publication.copy.digest in self.ranking}
        sound = {digest for digest in known if folder.is_sound(digest)}
        gone: dict[str, None] = {}
        try:
            with index.writing():
                self._catch_up(index)
                listed = [publication for publication in group if self._list(index, publication, sound, gone)]
                listed = [publication for publication in listed if not gone or _is_listed(index, publication)]
                _move(folder, listed, sound)
                complete_at = changes.change()
        except BaseException:
            self._seen = _NOTHING  # what was evicted is back
            self._remove_unlisted([publication.copy.digest for publication in group if publication.is_moved])
            raise
        self.totals = index.totals
        for publication in listed:
            publication.result = publication.copy
            self._remember(publication.copy)
        self._complete_at = complete_at
        self._remove_unlisted([*gone])

    def _list(self, index: Index, publication: Publication, sound: set[str], gone: dict[str, None]) -> bool:
        """List a copy within the budget, unless it is outdated; note the files that are ``gone`` for it."""
        copy = publication.copy
        older = index.copy(copy.store, copy.name)
        if older is not None:
            if _is_outdated(copy, older):
                return False
            if index.remove_copy(older) and older.digest != copy.digest and self._unlist(index, older.digest):
                gone[older.digest] = None
        self.ranking.remove(copy.digest)  # it must not make room for itself
        known = index.file(copy.digest)
        if known is None:
            sound.discard(copy.digest)  # it may have been removed by now
        evicted = self._make_room(index, copy.size - (known.size if known else 0))
        self.evictions += len(evicted)
        gone.update(dict.fromkeys(evicted))
        gone.pop(copy.digest, None)
        self._seen = index.put_file(copy.digest, copy.size, publication.cost, known)
        publication.copy = replace(copy, serial=self._seen)
        index.put_copy(publication.copy)
        self.ranking.insert(copy.digest, copy.size, publication.cost)
        return True

    def _make_room(self, index: Index, size: int) -> list[str]:
        """Evict files until ``size`` more bytes fit; return their digests."""
        evicted: list[str] = []
        while index.totals.bytes + size > self.budget:
            if not self.ranking:
                raise sqlite3.DatabaseError("the index counts bytes of files that it does not list")
            digest = self.ranking.evict()
            if self._unlist(index, digest):  # else another process has done so
                evicted.append(digest)
        return evicted

    def _unlist(self, index: Index, digest: str) -> bool:
        for key in index.names(digest):
            known = self.table.get(key)
            if known is not None and known.digest == digest:
                del self.table[key]
        self._serials.pop(digest, None)
        self.ranking.remove(digest)
        return index.remove_file(digest)

    def _remove_unlisted(self, digests: list[str]) -> None:
        """Remove files, but none that has been published again; nobody can publish between the look and the removal."""
        if not digests:
            return
        folder, index, _ = self._opened()
        try:
            with index.writing():
                for digest in digests:
                    if index.file(digest) is None:
                        folder.remove(digest)
        except FAULTS as error:  # they are removed when the tier is next opened
            self._warn(
                ("remove", type(error)), f"could not remove {len(digests)} files, which it does not list: {error}"
            )

    # Single copies

    def look_up(self, store: str, name: str) -> DiskCopy | None:
        """Ask the index for a copy."""
        _, index, _ = self._opened()
        copy = index.copy(store, name)
        if copy is not None:
            self._remember(copy)
        return copy

    def revalidate(self, copy: DiskCopy, at: float) -> None:
        """Note when the store has confirmed a version."""
        _, index, _ = self._opened()
        index.validate(copy, at)
        self.table.pop((copy.store, copy.name), None)  # another process may have removed it
        self.look_up(copy.store, copy.name)

    def drop(self, copy: DiskCopy) -> None:
        """Remove a copy that is no good, and all that share its file, unless that has been published anew."""
        _, index, _ = self._opened()
        self.table.pop((copy.store, copy.name), None)
        with index.writing():
            listed = index.file(copy.digest)
            if listed is None or listed.serial != copy.serial:
                self.look_up(copy.store, copy.name)
                return
            self._unlist(index, copy.digest)
        self.totals = index.totals
        self._remove_unlisted([copy.digest])

    def forget(self, store: str, name: str) -> None:
        """Remove the copy of an artifact, and its file if no other needs it."""
        _, index, _ = self._opened()
        self.table.pop((store, name), None)
        with index.writing():
            listed = index.copy(store, name)
            unused = [listed.digest] if listed is not None and index.remove_copy(listed) else []
            for digest in unused:
                self._unlist(index, digest)
        self.totals = index.totals
        self._remove_unlisted(unused)

    # What memory knows

    def _remember(self, copy: DiskCopy) -> None:
        self._serials[copy.digest] = copy.serial
        self.table[copy.store, copy.name] = copy

    def _catch_up(self, index: Index) -> None:
        """Tell the index of uses, and memory of those uses and of what was published since it was last told."""
        self._write_uses(index, _USES_WRITTEN)
        is_all = self._seen == _NOTHING
        listed = index.copies_after(self._seen)
        for copy, cost, uses in listed:
            self._seen = max(self._seen, copy.serial)
            self._remember(copy)
            if copy.digest not in self.ranking:
                self.ranking.insert(copy.digest, copy.size, cost)
                for _ in range(min(uses, _USES_REPLAYED) - 1):
                    self.ranking.hit(copy.digest)
        if is_all:
            self._retain({copy.digest for copy, *_ in listed})
        elif len(self.ranking) > index.totals.files + _STRANGERS:
            self._retain(index.sizes())

    def _retain(self, digests: Container[str]) -> None:
        """Forget what others have removed."""
        self.ranking.retain(digests)
        self.table = {key: copy for key, copy in self.table.items() if copy.digest in digests}
        self._serials = {digest: serial for digest, serial in self._serials.items() if digest in digests}

    def _write_uses(self, index: Index, most: int) -> None:
        digests = [self.uses.popleft() for _ in range(min(most, len(self.uses)))]
        for digest in digests:
            self.ranking.hit(digest)
        for digest, times in Counter(digests).items():
            index.use(digest, times)


def _is_outdated(copy: DiskCopy, listed: DiskCopy) -> bool:
    """Say whether another process has got another version from the store since this one was announced.

    Unless that lies in the future: then the clock was set back, and tells nothing.
    """
    return listed.version != copy.version and copy.validated_at < listed.validated_at <= time.time()


def _is_listed(index: Index, publication: Publication) -> bool:
    """Say whether a copy has outlived the rest of its group, which may have taken its place or evicted it."""
    copy = publication.copy
    listed = index.copy(copy.store, copy.name)
    return listed is not None and (listed.version, listed.digest) == (copy.version, copy.digest)


def _move(folder: CacheFolder, listed: list[Publication], sound: set[str]) -> None:
    """Give files their names, but not in the place of ``sound`` ones.

    Some file systems (ext4) write a file that replaces another one to the disk then and there.
    """
    for publication in listed:
        digest = publication.copy.digest
        if digest not in sound:
            folder.admit(publication.incoming, digest)
            publication.is_moved = True
            sound.add(digest)

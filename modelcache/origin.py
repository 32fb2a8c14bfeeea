"""Where a load gets its artifact from: the copy on the local disk, if there is one to be trusted, or the store."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio.to_thread

from modelcache.cache.recent import Recent
from modelcache.errors import ModelNotFoundError, StoreError, StoreUnavailableError
from modelcache.names import spellings
from modelcache.pool.pool import XGBOOST
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.disk_tier import DiskCopy

if TYPE_CHECKING:
    from pathlib import Path

    from modelcache.pool.artifacts import Saved
    from modelcache.records import Tier
    from modelcache.stores.base import ArtifactStore
    from modelcache.stores.disk_tier import DiskTier

logger = logging.getLogger("modelcache")

wall_clock = time.time
"""Copies outlive processes, and so do the moments at which they were known to be current."""

MEANT_FOR_ALL = (KeyboardInterrupt, SystemExit)

_NAMES_REMEMBERED = 100_000

_GATHERING = 0.02
"""Seconds that a copy may wait to be published with others: alone it costs the parent some 0.4 ms of CPU, in a group of
eight 0.1 ms. Nobody waits for it, and whoever asks for it has it published at once."""

_ACLOSE_TIMEOUT = 10.0
"""Seconds for a store to let go of an artifact."""


class DamagedCopyError(Exception):
    """A local copy is not what was written: it has been dropped, and the store is to be asked instead."""


@dataclass(frozen=True, slots=True)
class Found:
    """An artifact to be loaded, and how current it is."""

    source: Artifact | DiskCopy
    current_at: float
    """When the store had this version, in seconds since the epoch."""
    age: float = 0.0
    """Seconds since then, by the time it was found."""
    doubt: str | None = None
    """Why it was not asked again, though it should have been."""

    @property
    def tier(self) -> Tier:
        """Where the bytes come from."""
        return "disk" if isinstance(self.source, DiskCopy) else "store"

    async def let_go(self) -> None:
        """Close what the store has opened; it changes nothing any more, whether or not that succeeds."""
        if isinstance(self.source, Artifact):
            await _close(self.source)


@dataclass(frozen=True, slots=True)
class Saving:
    """A copy that a worker makes of what it loads."""

    path: Path
    written: asyncio.Future[Saved | None]


class Origin:
    """The store, and with a ``tier`` the local copies of its artifacts, trusted for ``refresh_after`` seconds.

    ``predictor`` names what the copies are for: what one of them loads is not what another does.
    """

    def __init__(
        self, store: ArtifactStore, tier: DiskTier | None, *, refresh_after: float | None, predictor: str
    ) -> None:
        self.store = store
        self.tier = tier
        self._refresh_after = refresh_after
        self._predictor = predictor
        self._id = ""
        self._has_opened = False
        self._last_words: Recent[str, tuple[float, str | None]] = Recent(_NAMES_REMEMBERED)
        """When the store was last asked for a name, and for which version it answered; None: for none. Only local
        copies can be older than that."""
        self._damaged: set[str] = set()
        """Digests of copies that did not load, in case that they cannot be dropped."""
        self._discarding: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Get ready; the store does so with its first fetch."""
        if self.tier is not None:
            if self.tier.is_open:
                raise StoreError(
                    f"{self.tier!r} is in use already: give each registry a DiskTier of its own; the folder may be "
                    "the same."
                )
            # In a thread, as the URL of a relative path depends on the current directory.
            self._id = await anyio.to_thread.run_sync(self._find_out_whose_copies)
            await self.tier.open()
            self._has_opened = True

    def _find_out_whose_copies(self) -> str:
        """Return what copies are keyed by; those of a store without a URL are good for this registry alone."""
        url = getattr(self.store, "url", None)
        whose = url if isinstance(url, str) else f"{type(self.store).__qualname__} {uuid4().hex}"
        return whose if self._predictor == XGBOOST else f"{whose} {self._predictor}"

    async def close(self) -> None:
        """Let go of the copies, which stay; the store is closed by whoever has opened it."""
        if self._discarding:
            await asyncio.wait(self._discarding)
        if self.tier is not None and self._has_opened:
            self._has_opened = False
            await self.tier.close()

    async def find(self, name: str, *, held: str | None = None, fresh: bool = False) -> Found | NotModified:
        """Return the artifact to load, or NotModified if it is the version that is ``held``.

        ``fresh``: the store has to be asked. A store that is down is no reason to fail while there is a copy.
        """
        copy = await self._copy(name)
        if copy is not None and not fresh and self._is_trusted(copy):
            return _as_it_is(copy)
        try:
            return await self._ask(name, held, copy)
        except ModelNotFoundError:
            await self._take_back(name, None)
            raise
        except (StoreUnavailableError, OSError) as error:
            if held is not None or copy is None:
                raise
            logger.warning("the store cannot be asked about %s, and its local copy is used: %s", name, error)
            return _as_it_is(copy, doubt=f"{type(error).__name__}: {error}")

    async def drop(self, copy: DiskCopy, error: Exception) -> None:
        """Remove a copy that does not load; raises DamagedCopyError."""
        assert self.tier is not None
        logger.info("the local copy of %s is dropped: %s", copy.name, error)
        self._damaged.add(copy.digest)
        await self.tier.drop(copy)
        raise DamagedCopyError from error

    # Copies of what is loaded

    def incoming(self, found: Found) -> Path | None:
        """Return where a worker is to write a copy of what was ``found``; None if none is to be made."""
        return self.tier.incoming() if self.tier is not None and found.tier == "store" else None

    async def keep(self, name: str, found: Found, saving: Saving, *, received: int, cost: float) -> None:
        """Publish the copy of what has been loaded: ``received`` bytes from the store, at a ``cost`` in seconds."""
        written = await saving.written
        artifact = found.source
        assert self.tier is not None and isinstance(artifact, Artifact)
        if written is not None and written.error is not None:
            logger.warning("no local copy of %s could be written: %s", name, written.error)
        if written is None or written.error is not None or self._is_outdated(name, artifact.version, found.current_at):
            await self.tier.discard(saving.path)
            return
        self._damaged.discard(written.digest)
        await self.tier.publish(
            saving.path, store=self._id, name=name, version=artifact.version, suffix=artifact.suffix,
            size=written.size, digest=written.digest, artifact_bytes=received, cost=cost,
            validated_at=found.current_at, within=_GATHERING,
        )  # fmt: skip

    def abandon(self, saving: Saving) -> None:
        """Remove the copy of a load that was given up, when the worker has written it or will not any more."""

        def discard(_: object) -> None:
            assert self.tier is not None
            task = asyncio.create_task(self.tier.discard(saving.path))
            self._discarding.add(task)
            task.add_done_callback(self._discarding.discard)

        saving.written.add_done_callback(discard)

    async def _copy(self, name: str) -> DiskCopy | None:
        copy = await self.tier.find(self._id, name) if self.tier is not None else None
        if copy is None or copy.digest in self._damaged:
            return None
        if self._is_outdated(name, copy.version, copy.validated_at):
            # Another process had begun to load it before the store told this one of a newer version.
            assert self.tier is not None
            await self.tier.forget(self._id, name)
            return None
        return copy

    # The store's word

    async def _ask(self, name: str, held: str | None, copy: DiskCopy | None) -> Found | NotModified:
        """Ask for the artifact, and use the copy if that is current; what is ``held`` may be another version."""
        asked_at = wall_clock()
        asked_about = held if held is not None or copy is None else copy.version
        answer = await self.store.fetch(name, if_version=asked_about)
        version = answer.version if isinstance(answer, Artifact) else _expected(answer, asked_about, name).version
        self._note_last_word(name, asked_at, version)
        if copy is not None and copy.version == version:
            return await self._confirmed(copy, held, asked_at, answer)
        if not isinstance(answer, Artifact):
            return answer
        try:
            if version != asked_about and (copy is not None or held is not None):
                await self._take_back(name, version)
        except BaseException:
            await _close(answer)
            raise
        return Found(answer, asked_at)

    async def _confirmed(
        self, copy: DiskCopy, held: str | None, asked_at: float, answer: Artifact | NotModified
    ) -> Found | NotModified:
        assert self.tier is not None
        if isinstance(answer, Artifact):
            await _close(answer)
        await self.tier.revalidated(copy, asked_at)
        return NotModified(copy.version) if held == copy.version else Found(copy, asked_at)

    async def _take_back(self, name: str, version: str | None) -> None:
        """The store has another ``version``, or none: copies of what it had are not to be trusted any more."""
        self._note_last_word(name, wall_clock(), version)
        if self.tier is not None:
            for spelling in spellings(name):
                await self.tier.forget(self._id, spelling)

    def _note_last_word(self, name: str, at: float, version: str | None) -> None:
        if self.tier is not None:
            self._last_words.note(name, (at, version))

    def _is_outdated(self, name: str, version: str, current_at: float) -> bool:
        """Say whether the store has said something else of ``name`` since it had ``version``, at ``current_at``."""
        at, last = self._last_words.get(name, (0.0, None))
        return at > current_at and version != last

    def _is_trusted(self, copy: DiskCopy) -> bool:
        age = wall_clock() - copy.validated_at
        return self._refresh_after is None or 0 <= age < self._refresh_after


def _as_it_is(copy: DiskCopy, doubt: str | None = None) -> Found:
    """Find a copy without the store's word for it."""
    return Found(copy, copy.validated_at, max(0.0, wall_clock() - copy.validated_at), doubt)


async def _close(artifact: Artifact) -> None:
    aclose = getattr(artifact.chunks, "aclose", None)
    if aclose is None:
        return
    try:
        async with asyncio.timeout(_ACLOSE_TIMEOUT):
            await aclose()
    except BaseException as error:
        if is_being_cancelled() or isinstance(error, MEANT_FOR_ALL):
            raise
        logger.warning("the store failed to close an artifact: %s: %s", type(error).__name__, error)


def is_being_cancelled() -> bool:
    """Say whether this task has been asked to end; a store may raise CancelledError over a task of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _expected(answer: object, held: str | None, name: str) -> NotModified:
    if not isinstance(answer, NotModified) or held is None:
        asked = "without" if held is None else "with"
        raise StoreError(f"The store answered a fetch {asked} if_version with {answer!r}.", model=name)
    return answer

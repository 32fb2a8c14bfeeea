"""Where a load gets its artifact from: the copy on the local disk, if there is one to be trusted, or the store."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread

from modelcache.errors import ModelNotFoundError, StoreAccessDeniedError, StoreError
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
    """The store, and with a ``tier`` the local copies of its artifacts, trusted for ``refresh_after`` seconds."""

    def __init__(self, store: ArtifactStore, tier: DiskTier | None, *, refresh_after: float | None) -> None:
        self.store = store
        self.tier = tier
        self._refresh_after = refresh_after
        self._id = type(store).__qualname__
        self._confirmed: dict[str, str] | None = {}
        """Versions that this very store has confirmed; None if its URL tells whose copies they are."""
        self._has_opened = False
        self._discarding: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Get ready; the store does so with its first fetch."""
        if self.tier is not None:
            if self.tier.is_open:
                raise StoreError(
                    f"{self.tier!r} is in use already: give each registry a DiskTier of its own; the folder may be "
                    "the same."
                )
            await anyio.to_thread.run_sync(self._find_out_whose_copies)
            await self.tier.open()
            self._has_opened = True

    def _find_out_whose_copies(self) -> None:
        """Ask for the store's URL; in a thread, as that of a relative path depends on the current directory."""
        url = getattr(self.store, "url", None)
        if isinstance(url, str):
            self._id, self._confirmed = url, None

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
        copy = await self.tier.find(self._id, name) if self.tier is not None else None
        if copy is None:
            return await self._ask(name, held)
        if not fresh and self._is_trusted(copy):
            return _as_it_is(copy)
        try:
            return await self._ask_about(copy, held)
        except ModelNotFoundError:
            await self._forget(name)
            raise
        except StoreAccessDeniedError:
            raise
        except (StoreError, OSError) as error:
            if held is not None or not self._is_known(copy):
                raise
            logger.warning("the store cannot be asked about %s, and its local copy is used: %s", name, error)
            return _as_it_is(copy, doubt=f"{type(error).__name__}: {error}")

    async def drop(self, copy: DiskCopy, error: Exception) -> None:
        """Remove a copy that does not load; raises DamagedCopyError."""
        assert self.tier is not None
        logger.warning("the local copy of %s is dropped: %s", copy.name, error)
        await self.tier.drop(copy)
        raise DamagedCopyError from error

    # Copies of what is loaded

    def incoming(self) -> Path | None:
        """Return where a worker is to write a copy; None if no copies are kept."""
        return self.tier.incoming() if self.tier is not None else None

    async def keep(self, name: str, found: Found, saving: Saving, *, received: int, cost: float) -> None:
        """Publish the copy of what has been loaded: ``received`` bytes from the store, at a ``cost`` in seconds."""
        written = await saving.written
        artifact = found.source
        assert self.tier is not None and isinstance(artifact, Artifact)
        if written is None or written.error is not None:
            if written is not None:
                logger.warning("no local copy of %s could be written: %s", name, written.error)
            await self.tier.discard(saving.path)
            return
        await self.tier.publish(
            saving.path, store=self._id, name=name, version=artifact.version, suffix=artifact.suffix,
            size=written.size, digest=written.digest, artifact_bytes=received, cost=cost,
            validated_at=found.current_at,
        )  # fmt: skip
        self._confirm(name, artifact.version)

    def abandon(self, saving: Saving) -> None:
        """Remove the copy of a load that was given up, when the worker has written it or will not any more."""

        def discard(_: object) -> None:
            assert self.tier is not None
            task = asyncio.create_task(self.tier.discard(saving.path))
            self._discarding.add(task)
            task.add_done_callback(self._discarding.discard)

        saving.written.add_done_callback(discard)

    # The store's word

    async def _ask(self, name: str, held: str | None) -> Found | NotModified:
        asked_at = wall_clock()
        answer = await self.store.fetch(name, if_version=held)
        if isinstance(answer, Artifact):
            return Found(answer, asked_at)
        return _expected(answer, held, name)

    async def _ask_about(self, copy: DiskCopy, held: str | None) -> Found | NotModified:
        """Ask for the artifact of ``copy``, and use that if it is current; ``held`` may be another version."""
        assert self.tier is not None
        asked_at = wall_clock()
        version = copy.version if held is None else held
        answer = await self.store.fetch(copy.name, if_version=version)
        if isinstance(answer, Artifact):
            if answer.version != copy.version:
                return Found(answer, asked_at)
            await _close(answer)
        elif _expected(answer, version, copy.name) and version != copy.version:
            return answer
        await self.tier.revalidated(copy, asked_at)
        self._confirm(copy.name, copy.version)
        return NotModified(copy.version) if held == copy.version else Found(copy, asked_at)

    async def _forget(self, name: str) -> None:
        assert self.tier is not None
        await self.tier.forget(self._id, name)

    # Trust

    def _is_trusted(self, copy: DiskCopy) -> bool:
        age = wall_clock() - copy.validated_at
        return self._is_known(copy) and (self._refresh_after is None or age < self._refresh_after)

    def _is_known(self, copy: DiskCopy) -> bool:
        """Say whether the copy is surely one of this store's."""
        return self._confirmed is None or self._confirmed.get(copy.name) == copy.version

    def _confirm(self, name: str, version: str) -> None:
        if self._confirmed is not None:
            self._confirmed[name] = version


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

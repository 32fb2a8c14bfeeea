"""Which file of a disk tier leaves first: any eviction policy, and least-recently-used order when it fails."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Container

    from modelcache.cache.policies import EvictionPolicy

logger = logging.getLogger("modelcache")


class RankedFile:
    """A file as a policy sees it. Nothing pins one: a worker that has it open goes on reading when it is removed."""

    __slots__ = ("cost", "key", "size")

    pins: ClassVar[int] = 0

    def __init__(self, digest: str, size: int, cost: float) -> None:
        self.key = digest
        self.size = size
        """Bytes."""
        self.cost = cost
        """Seconds that the load from the store took."""

    def __repr__(self) -> str:
        return f"<RankedFile {self.key[:12]} {self.size} B>"


class Ranking:
    """The files this process knows of, ranked by ``policy``; the ledger deals with a policy's faults the same way."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy: EvictionPolicy | None = policy
        self._files: OrderedDict[str, RankedFile] = OrderedDict()
        """By digest, least recently used first."""

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, digest: str) -> bool:
        return digest in self._files

    def insert(self, digest: str, size: int, cost: float) -> None:
        """Take in a file as the most recently used, in the place of one of the same digest."""
        self.remove(digest)
        file = self._files[digest] = RankedFile(digest, size, cost)
        self._tell("insert", file)

    def hit(self, digest: str) -> None:
        """Count a use; nothing happens if the file is not known."""
        file = self._files.get(digest)
        if file is not None:
            self._files.move_to_end(digest)
            self._tell("hit", file)

    def remove(self, digest: str) -> None:
        """Forget a file; harmless if it is not known."""
        file = self._files.pop(digest, None)
        if file is not None:
            self._tell("remove", file)

    def retain(self, digests: Container[str]) -> None:
        """Forget all files but those of ``digests``."""
        for digest in [digest for digest in self._files if digest not in digests]:
            self.remove(digest)

    def evict(self) -> str:
        """Pick and forget the file least worth keeping; there must be one."""
        digest = self._choose()
        del self._files[digest]
        return digest

    def _choose(self) -> str:
        if self._policy is not None:
            try:
                victim = self._policy.evict()
            except Exception as error:  # noqa: BLE001 - it is anybody's code
                self._dismiss_policy("evict", error)
            else:
                if isinstance(victim, RankedFile) and self._files.get(victim.key) is victim:
                    return victim.key
                self._dismiss_policy(f"evict (it chose {victim!r})", None)
        return next(iter(self._files))

    def _tell(self, what: str, file: RankedFile) -> None:
        if self._policy is None:
            return
        try:
            getattr(self._policy, what)(file)
        except Exception as error:  # noqa: BLE001 - it is anybody's code
            self._dismiss_policy(what, error)

    def _dismiss_policy(self, where: str, error: Exception | None) -> None:
        logger.warning(
            "eviction policy %r of the disk cache failed in %s; least-recently-used order replaces it",
            self._policy,
            where,
            exc_info=error,
        )
        self._policy = None

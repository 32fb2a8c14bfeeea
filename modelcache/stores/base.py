"""The protocol of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact that a store is ready to deliver.

    ``chunks`` is iterated at most once. If it has an ``aclose`` it is called in the end, whether or not anything was
    read, so that a store can hold a connection open from ``fetch`` on.
    """

    version: str
    """Changes whenever the bytes may have changed: an ETag, a version id, a modification time."""
    size: int | None
    """Bytes that ``chunks`` will deliver; None if the store does not know. A delivery of any other size fails."""
    suffix: str
    """The suffix that answered, such as ".tar.gz"; "" if the store has none."""
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class NotModified:
    """The store's artifact is still the version that was asked about."""

    version: str


@runtime_checkable
class ArtifactStore(Protocol):
    """Two methods, and ``names(prefix) -> AsyncIterator[str]`` if the store can list what it has.

    Names have been checked: they are relative, and have no empty, ``.`` or ``..`` segments. A name without one of
    ``modelcache.names.SUFFIXES`` is tried with each.
    """

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact, or NotModified if it is ``if_version``.

        Raises ModelNotFoundError, or StoreError and its kinds.
        """
        ...

    async def close(self) -> None:
        """Release what the store holds; harmless when done twice."""
        ...

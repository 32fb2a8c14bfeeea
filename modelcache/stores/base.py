"""The protocol of a store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from modelcache.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_SHA256 = re.compile("[0-9a-f]{64}")


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
    digest: str | None = None
    """The SHA-256 of all bytes as 64 lower-case hexadecimal digits, if the store knows it. The worker that the bytes go
    to computes it again: with any other the load fails, before anything is parsed. Upper case is made lower; what is no
    SHA-256 at all raises StoreError here, in the store that has announced it."""

    def __post_init__(self) -> None:
        """Raise StoreError, in the store that makes it, for what no artifact can be."""
        if not isinstance(self.version, str):
            raise StoreError(f"The store announced the version {self.version!r}: it has to be text.")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 0):
            raise StoreError(f"The store announced a size of {self.size!r}: it has to be a number of bytes, or None.")
        if not isinstance(self.suffix, str):
            raise StoreError(f"The store announced the suffix {self.suffix!r}: it has to be text, '' if there is none.")
        if not hasattr(self.chunks, "__aiter__"):
            raise StoreError(f"The store delivers {self.chunks!r}: it has to be an async iterator of bytes.")
        if self.digest is not None:
            self._set_digest(self.digest)

    def _set_digest(self, announced: object) -> None:
        digest = announced.lower() if isinstance(announced, str) else ""
        if not _SHA256.fullmatch(digest):
            raise StoreError(
                f"The store announced the digest {announced!r}: it has to be a SHA-256 as 64 hexadecimal digits, "
                "as hashlib.sha256(data).hexdigest() gives it, or None."
            )
        object.__setattr__(self, "digest", digest)  # the dataclass is frozen for everybody else


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

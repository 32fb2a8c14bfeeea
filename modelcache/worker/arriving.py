"""An artifact on its way into a worker: its bytes so far, their digest, and what is reserved for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from modelcache.worker.artifact import ArtifactError, ArtifactReader

if TYPE_CHECKING:
    from _hashlib import HASH

    from modelcache.worker.predictors import Matrix


class Arriving:
    """An artifact of which not all has come yet, or which waits for its reservation to grow."""

    def __init__(
        self, allowed: int, digest: str | None, *, save: str | None = None, known: int = 0, any_format: bool
    ) -> None:
        self.reader = ArtifactReader(any_format=any_format)
        self.allowed = allowed
        self.asked = 0
        self.complete = False
        self.save = save
        self.rows: Matrix | None = None
        """What to predict as soon as it is loaded."""
        self.holds_bytes = False
        """True once chunks have come."""
        self.known = known
        """Bytes of heap that it took before; 0: it is to be weighed."""
        self.is_copy = False
        """True of a local copy, which a worker has written from a model that it had loaded."""
        self._digest = digest or ""
        self._hash = new_hash() if digest else None

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next chunk."""
        self.holds_bytes = True
        if self._hash is not None:
            self._hash.update(chunk)
        self.reader.feed(chunk)

    def adopt(self, data: bytes | bytearray) -> None:
        """Take all of a local copy."""
        self.holds_bytes = self.is_copy = True
        if self._hash is not None:
            self._hash.update(data)
        self.reader.adopt(data)

    def finish(self) -> None:
        """Say that there are no more chunks; an artifact that is not the announced one is refused."""
        self.complete = True
        if self._hash is not None and self._hash.hexdigest() != self._digest:
            found = self._hash.hexdigest()
            raise ArtifactError(
                "corrupt",
                f"the artifact's SHA-256 is {found}, and the store announced {self._digest}: upload it again",
                digest=found,
                announced=self._digest,
            )

    @property
    def short_of(self) -> int:
        """The unpacked bytes that it has at least, 0 if the reservation covers them; ``asked`` is what to ask for."""
        # With nothing allowed the parent wants to know what to reserve: it is told after the first chunk.
        declared = max(self.reader.declared, 1)
        if declared <= max(self.allowed, self.asked):
            return 0
        # Without an announced size the artifact may go on growing: do not ask again for each chunk.
        self.asked = declared if declared > 2 * self.allowed or self.complete else 2 * self.allowed
        return declared

    def grant(self, allowed: int) -> None:
        """The reservation covers ``allowed`` bytes now, which may be fewer than were asked for."""
        self.allowed, self.asked = allowed, 0


def new_hash() -> HASH:
    """Return a SHA-256 of nothing yet."""
    from hashlib import sha256  # noqa: PLC0415 - takes 3 ms and 4 MB (OpenSSL), and most stores announce no digest

    return sha256()


def read_copy(path: bytes) -> bytes:
    """Return the content of a file; if it is changed meanwhile, anything that has its digest no more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a file object takes as long to make as this to open
        try:
            return _read(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ArtifactError("corrupt", f"the copy cannot be read: {error}") from error


def _read(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size)
    if len(data) == size:
        return data
    pieces, rest = [data], size - len(data)  # Linux reads 2 GiB at once at most
    while rest and pieces[-1]:
        pieces.append(os.read(descriptor, rest))
        rest -= len(pieces[-1])
    return b"".join(pieces)

"""Artifacts in a dict: for tests, and for models that are made in the process."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from modelcache.errors import InvalidModelNameError, ModelNotFoundError
from modelcache.names import SUFFIXES, check_name, split_suffix
from modelcache.stores.base import Artifact, NotModified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

_CHUNK = 256 << 10


class _Stored(NamedTuple):
    data: bytes
    digest: str


class MemoryStore:
    """Serves ``artifacts``: bytes by file name, suffix included, such as ``{"Chicago_IL.tar.gz": data}``.

    It announces the digest of each, whose start is the version. :meth:`put` and :meth:`remove` change what it has.
    """

    def __init__(self, artifacts: Mapping[str, bytes] | None = None) -> None:
        self._artifacts: dict[str, _Stored] = {}
        for name, data in (artifacts or {}).items():
            self.put(name, data)

    def put(self, name: str, data: bytes) -> None:
        """Add or replace an artifact; ``name`` has its suffix."""
        if not split_suffix(check_name(name))[1]:
            raise InvalidModelNameError(
                f"{name!r} would never be found. Add its suffix: {', '.join(SUFFIXES)}.", model=name
            )
        stored = bytes(data)
        self._artifacts[name] = _Stored(stored, hashlib.sha256(stored).hexdigest())

    def remove(self, name: str) -> None:
        """Remove an artifact; KeyError if there is none."""
        del self._artifacts[name]

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        suffix = split_suffix(name)[1]
        for candidate in (suffix,) if suffix else SUFFIXES:
            stored = self._artifacts.get(name if suffix else name + candidate)
            if stored is not None:
                return _artifact(stored, candidate, if_version)
        raise ModelNotFoundError(f"The memory store has no model {name!r}: put(name, data) adds one.", model=name)

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what the store has, without suffixes, sorted, each name once."""
        for name in sorted({split_suffix(name)[0] for name in self._artifacts}):
            if name.startswith(prefix):
                yield name

    async def close(self) -> None:
        """Nothing to release."""

    def __repr__(self) -> str:
        return f"memory ({len(self._artifacts)} artifacts)"


def _artifact(stored: _Stored, suffix: str, if_version: str | None) -> Artifact | NotModified:
    data, digest = stored
    version = digest[:16]
    if version == if_version:
        return NotModified(version)
    return Artifact(version=version, size=len(data), suffix=suffix, chunks=_chunks(data), digest=digest)


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]

"""A store's manifest: the SHA-256 of every artifact, in a file beside them.

::

    {"sha256": {"Chicago_IL.tar.gz": "9f86d081...", "tenant_a/model_7.ubj": "60303ae2..."}}

Where there is one it is enforced. What it lists is announced with its digest, which the worker checks before it parses
anything; what it does not list is refused, or a manifest could be got round by adding a file with another suffix. While
it cannot be read, or says something else, nothing is served past it.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import anyio.to_thread

from modelcache.errors import (
    ModelCacheError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    UnsafeArtifactError,
)
from modelcache.stores.base import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from modelcache.stores.base import NotModified

MANIFEST = "MANIFEST.json"

_TRUSTED = 1.0
"""Seconds between two looks at a manifest that is there; the second asks only whether it has changed."""
_ABSENT = 60.0
"""Seconds until one that was not there is looked for again."""
_LARGEST = 64 << 20
"""Bytes; a manifest of half a million artifacts has about so many."""
_SHA256 = re.compile("[0-9a-fA-F]{64}")


class Read(Protocol):
    """How a store reads one of its files, without looking at the manifest: as ``ArtifactStore.fetch`` does."""

    async def __call__(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the file; ModelNotFoundError if it is not there."""
        ...


class Manifest:
    """The manifest of a store, which owns one and passes what it is about to deliver through :meth:`enforce`.

    ``name`` is the manifest's file, None for a store that is to have none. ``read`` reads it.
    ``denied_is_absent`` is for a store that says of an absent file that access is denied: it has no manifest then,
    unless there was one before. ``clock`` gives seconds.
    """

    def __init__(
        self,
        name: str | None,
        read: Read,
        *,
        denied_is_absent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._denied_is_absent = denied_is_absent
        self._read = read
        self._clock = clock
        self._looking = asyncio.Lock()
        self._looks = 0
        self._failure: ModelCacheError | None = None
        """What the last look ended with."""
        self._look_at = float("-inf") if name else float("inf")
        self._version: str | None = None
        self._listed: Mapping[str, str] | None = None

    async def enforce(self, file: str, found: Artifact | NotModified) -> Artifact | NotModified:
        """Return what was ``found`` under the name ``file``, with the digest that the manifest lists.

        Raises as :meth:`digest_of` does, and lets go of the artifact then.
        """
        try:
            digest = await self.digest_of(file)
        except BaseException:
            await _let_go(found)
            raise
        return replace(found, digest=digest) if digest and isinstance(found, Artifact) else found

    async def digest_of(self, file: str) -> str | None:
        """Return the SHA-256 that ``file`` has to have; None if there is no manifest.

        Raises UnsafeArtifactError for a file that the manifest does not list, ModelNotFoundError for the manifest
        itself, which is no model, and StoreError if the manifest cannot be read or is malformed.
        """
        if self.name is not None and file == self.name:
            raise ModelNotFoundError(f"{file} is the store's manifest, and no model.", model=file)
        await self._look_again_if_due()
        if self._listed is None:
            return None
        digest = self._listed.get(file)
        if digest is None:
            raise UnsafeArtifactError(
                f"{file} is not in {self.name}, and a store that has a manifest serves only what it lists: add the "
                f"file's SHA-256 to it (for a folder: `modelcache manifest FOLDER`), or remove {self.name}.",
                model=file,
            )
        return digest

    async def _look_again_if_due(self) -> None:
        """Look once for all who ask meanwhile: those who waited take what came of it, a failure too."""
        if self._clock() < self._look_at:
            return
        looks = self._looks
        async with self._looking:
            if looks == self._looks:
                await self._look()
            if self._failure is not None:
                raise self._failure.fresh()

    async def _look(self) -> None:
        started, self._failure = self._clock(), None
        try:
            self._look_at = started + await self._reread()
        except ModelCacheError as error:
            error.model = None  # whoever asked for a model hears of that one
            self._failure = error
        self._looks += 1  # a look that was cancelled does not count: the next who waits makes it

    async def _reread(self) -> float:
        """Take over what the manifest says now; return the seconds for which that is trusted."""
        assert self.name is not None
        try:
            found = await self._read(self.name, if_version=self._version)
            if isinstance(found, Artifact):
                data = await self._download(found)
                # In a thread: a manifest of 100,000 artifacts takes a tenth of a second to parse.
                self._listed = await anyio.to_thread.run_sync(self._parse, data)
                self._version = found.version
        except ModelNotFoundError:
            self._listed = self._version = None
            return _ABSENT
        except StoreAccessDeniedError as error:
            if self._denied_is_absent and self._version is None:
                return _ABSENT
            raise StoreAccessDeniedError(f"{error} Of a store that has no manifest, say so: manifest=None.") from error
        return _TRUSTED

    async def _download(self, found: Artifact) -> bytes:
        data = bytearray()
        try:
            async for chunk in found.chunks:
                data += chunk
                if len(data) > _LARGEST:
                    raise StoreError(f"{self.name} has more than {_LARGEST:,} bytes, and is no manifest.")
        finally:
            await _let_go(found)
        if found.size not in (None, len(data)):
            raise StoreError(f"{self.name} was cut short: {len(data):,} of {found.size:,} bytes were delivered.")
        return bytes(data)

    def _parse(self, data: bytes) -> dict[str, str]:
        try:
            listed = json.loads(data)["sha256"]
            if all(_SHA256.fullmatch(digest) for digest in listed.values()):
                return {file: digest.lower() for file, digest in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._malformed() from error
        raise self._malformed()

    def _malformed(self) -> StoreError:
        return StoreError(
            f'{self.name} is not of the form {{"sha256": {{"Chicago_IL.tar.gz": "<64 hexadecimal digits>"}}}}, and '
            "nothing is served past it: write it anew (for a folder: `modelcache manifest FOLDER`)."
        )


async def _let_go(found: Artifact | NotModified) -> None:
    aclose = getattr(found.chunks, "aclose", None) if isinstance(found, Artifact) else None
    if aclose is not None:
        await aclose()

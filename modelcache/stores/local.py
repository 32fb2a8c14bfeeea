"""A folder of artifacts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import anyio.to_thread
from cachetools import LRUCache

from modelcache.errors import (
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.names import SUFFIXES, is_name, split_suffix
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.files import GONE, NO_SUCH_FILE, OpenFile, open_below

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_SUFFIXES_REMEMBERED = 100_000


class LocalStore:
    """Serves the files below ``root``; a new file is served as soon as it is there.

    A name without a suffix is looked for with ``.tar.gz``, ``.ubj`` and ``.json``, in that order. The suffix that
    answered is remembered and looked for first, as long as that file is there: keep one file for each name.

    The version is the inode, the size and the modification time in nanoseconds. A file that is replaced by rename, or
    removed, while it is read is delivered as it was when it was fetched; one that is written to meanwhile ends the read
    with ArtifactChangedError, and a load begins again. Links are followed inside ``root`` and never out of it, also if
    one takes the place of a folder between the look and the opening.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self._suffixes: LRUCache[str, str] = LRUCache(_SUFFIXES_REMEMBERED)

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact. A small one has been read by then, of a larger one the file is open."""
        remembered = self._suffixes.get(name)  # looked up and noted here: in threads the cache would need a lock
        file, suffix, first = await anyio.to_thread.run_sync(self._fetch, name, remembered, if_version)
        self._suffixes[name] = suffix
        if file.version == if_version:
            return NotModified(file.version)
        return Artifact(version=file.version, size=file.size, suffix=suffix, chunks=_Chunks(file, first))

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield the names that ``fetch`` serves, without suffixes, sorted, each name once.

        Folders that are links are not looked into: they may lead in circles.
        """
        for name in await anyio.to_thread.run_sync(lambda: sorted(self._list())):
            if name.startswith(prefix):
                yield name

    async def close(self) -> None:
        """Nothing to release: no file stays open between two calls."""

    def __repr__(self) -> str:
        return str(self.root)

    def _fetch(self, name: str, remembered: str | None, if_version: str | None) -> _Fetched:
        """Do in one go all that needs a thread: each change of threads takes longer than to read a small model."""
        file, suffix = self._find(name, remembered)
        if file.version == if_version:
            file.close()
            return _Fetched(file, suffix, b"")
        try:
            return _Fetched(file, suffix, file.read())
        except OSError as error:
            raise _store_error(error, name) from error

    def _find(self, name: str, remembered: str | None = None) -> tuple[OpenFile, str]:
        for stem, suffix in _candidates(name, remembered):
            try:
                return open_below(self.root, stem + suffix, name), suffix
            except OSError as error:
                if error.errno not in NO_SUCH_FILE:
                    raise _store_error(error, name) from error
        raise self._not_found(name)

    def _not_found(self, name: str) -> ModelNotFoundError:
        if not self.root.is_dir():
            return ModelNotFoundError(f"The folder {self.root} does not exist.", model=name)
        tried = ", ".join(stem + suffix for stem, suffix in _candidates(name))
        return ModelNotFoundError(f"There is no model {name!r} in {self.root} (looked for {tried}).", model=name)

    def _list(self) -> Iterator[str]:
        if not self.root.is_dir():
            raise StoreError(f"The folder {self.root} does not exist.")
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self.root / folder) as entries:
                    yield from self._list_files(folder, list(entries), folders)
            except OSError as error:
                if folder and error.errno in GONE:
                    continue  # removed since the folder above it was listed, and its models with it
                raise _store_error(error, str(error.filename)) from error

    def _list_files(self, folder: str, entries: list[os.DirEntry[str]], folders: list[str]) -> Iterator[str]:
        """Yield the artifacts of one folder, and add those below it to ``folders``."""
        regular: set[str] = set()
        other: set[str] = set()
        for entry in entries:
            name = folder + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name + "/")
            stem, suffix = split_suffix(name)
            if suffix:
                # A stem that has a suffix itself would be taken for the name of another file.
                found = name if split_suffix(stem)[1] else stem
                (regular if entry.is_file(follow_symlinks=False) else other).add(found)
        # A link, a pipe or a folder may hide the file of the next suffix: what is not all regular is looked at.
        yield from (name for name in regular - other if is_name(name))
        yield from (name for name in other if is_name(name) and self._serves(name))

    def _serves(self, name: str) -> bool:
        try:
            self._find(name)[0].close()
        except (ModelNotFoundError, StoreError):
            return False
        return True


def _candidates(name: str, remembered: str | None = None) -> list[tuple[str, str]]:
    stem, suffix = split_suffix(name)
    if suffix:
        return [(stem, suffix)]
    return [(name, known) for known in sorted(SUFFIXES, key=lambda known: known != remembered)]


class _Fetched(NamedTuple):
    file: OpenFile
    suffix: str
    first: bytes
    """The first chunk; the only one unless the file is large."""


class _Chunks:
    """Delivers a file, whose first chunk has been read.

    A class, as ``aclose`` of a generator that was never started runs none of its code and would leave the file open.
    """

    def __init__(self, file: OpenFile, first: bytes) -> None:
        self._file = file
        self._first = first

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk, self._first = self._first, b""
        if not chunk and not self._file.all_read:
            chunk = await self._read()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def _read(self) -> bytes:
        try:
            return await anyio.to_thread.run_sync(self._file.read)
        except OSError as error:
            raise _store_error(error, self._file.model) from error

    async def aclose(self) -> None:
        """Close the file, whether or not anything was read."""
        self._first = b""
        self._file.close()


def _store_error(error: OSError, name: str) -> StoreError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return StoreAccessDeniedError(f"No permission to read {name}: make it readable for this user.", model=name)
    return StoreUnavailableError(f"Reading {name} failed: {error.strerror or error}.", model=name)

"""A folder of artifacts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import anyio.to_thread

from modelcache.errors import (
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.files import GONE, NO_SUCH_FILE, OpenFile, open_below
from modelcache.stores.manifest import MANIFEST, Manifest
from modelcache.stores.suffixes import Suffixes, name_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    Candidates = list[tuple[str, str]]
    """Files to look for, each with its suffix."""


class LocalStore:
    """Serves the files below ``root``; a new file is served as soon as it is there.

    A name without a suffix is looked for with ``.tar.gz``, ``.ubj`` and ``.json``, in that order. The suffix that
    answered is remembered and looked for first, as long as that file is there: keep one file for each name.

    The version is the inode, the size and the modification time in nanoseconds. A file that is replaced by rename, or
    removed, while it is read is delivered as it was when it was fetched; one that is written to meanwhile ends the read
    with ArtifactChangedError, and a load begins again. Links are followed inside ``root`` and never out of it, also if
    one takes the place of a folder between the look and the opening.

    ``manifest`` is the file that lists the SHA-256 of every artifact, which is enforced if it is there
    (:mod:`modelcache.stores.manifest`); None: there is none.
    """

    def __init__(self, root: str | os.PathLike[str], *, manifest: str | None = MANIFEST) -> None:
        self.root = Path(root).expanduser()
        self._suffixes = Suffixes()
        self._manifest = Manifest(manifest, self._fetch_file)

    @property
    def url(self) -> str:
        """Tells whose copies those in a disk cache are."""
        return self.root.absolute().as_uri()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact. A small one has been read by then, of a larger one the file is open."""
        candidates = self._suffixes.candidates(name)  # here: in threads what is remembered would need a lock
        found = await anyio.to_thread.run_sync(self._fetch, name, candidates, if_version)
        self._suffixes.remember(name, found.suffix)
        return await self._manifest.enforce(found.path, found.answer(if_version))

    async def _fetch_file(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the file of this very name, whatever the manifest says."""
        return (await anyio.to_thread.run_sync(self._fetch, name, [(name, "")], if_version)).answer(if_version)

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

    def _fetch(self, name: str, candidates: Candidates, if_version: str | None) -> _Fetched:
        """Do in one go all that needs a thread: each change of threads takes longer than to read a small model."""
        path, suffix, file = self._find(name, candidates)
        if file.version == if_version:
            file.close()
            return _Fetched(path, suffix, file, b"")
        try:
            return _Fetched(path, suffix, file, file.read())
        except OSError as error:
            raise _store_error(error, name) from error

    def _find(self, name: str, candidates: Candidates) -> tuple[str, str, OpenFile]:
        """Open the first of ``candidates`` that there is."""
        for path, suffix in candidates:
            try:
                return path, suffix, open_below(self.root, path, name)
            except OSError as error:
                if error.errno not in NO_SUCH_FILE:
                    raise _store_error(error, name) from error
        raise self._not_found(name)

    def _not_found(self, name: str) -> ModelNotFoundError:
        if not self.root.is_dir():
            return ModelNotFoundError(f"The folder {self.root} does not exist.", model=name)
        tried = ", ".join(path for path, _ in Suffixes().candidates(name))
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
            found = name_of(name) if name != self._manifest.name else ""
            if found:
                (regular if entry.is_file(follow_symlinks=False) else other).add(found)
        # A link, a pipe or a folder may hide the file of the next suffix: what is not all regular is looked at.
        yield from regular - other
        yield from filter(self._serves, other)

    def _serves(self, name: str) -> bool:
        try:
            self._find(name, Suffixes().candidates(name))[2].close()
        except (ModelNotFoundError, StoreError):
            return False
        return True


class _Fetched(NamedTuple):
    path: str
    suffix: str
    file: OpenFile
    first: bytes
    """The first chunk; the only one unless the file is large."""

    def answer(self, if_version: str | None) -> Artifact | NotModified:
        version, size = self.file.version, self.file.size
        if version == if_version:
            return NotModified(version)
        return Artifact(version=version, size=size, suffix=self.suffix, chunks=_Chunks(self.file, self.first))


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

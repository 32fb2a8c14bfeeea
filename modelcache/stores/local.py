"""A folder of artifacts."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import aiofiles
import anyio.to_thread
from cachetools import LRUCache

from modelcache.errors import (
    ArtifactChangedError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.names import SUFFIXES, is_name, split_suffix
from modelcache.stores.base import Artifact, NotModified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiofiles.threadpool.binary import AsyncBufferedReader

_CHUNK = 256 << 10
_SUFFIXES_REMEMBERED = 100_000
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
_NO_SUCH_FILE = _GONE | frozenset({errno.ENAMETOOLONG, errno.ELOOP})


class LocalStore:
    """Serves the files below ``root``; a new file is served as soon as it is there.

    A name without a suffix is looked for with ``.tar.gz``, ``.ubj`` and ``.json``, in that order. The suffix that
    answered is remembered and looked for first, as long as that file is there: keep one file for each name.

    The version is the inode, the size and the modification time in nanoseconds. A file that is changed while it is
    read ends that read with ArtifactChangedError, and a load begins again (replace by rename, so that readers see the
    old file or the new one). Links are followed inside ``root`` and never out of it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self._suffixes: LRUCache[str, str] = LRUCache(_SUFFIXES_REMEMBERED)

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        remembered = self._suffixes.get(name)  # looked up and noted here: in threads the cache would need a lock
        path, found, suffix = await anyio.to_thread.run_sync(self._find, name, remembered)
        self._suffixes[name] = suffix
        version = _version(found)
        if version == if_version:
            return NotModified(version)
        return Artifact(version=version, size=found.st_size, suffix=suffix, chunks=_chunks(path, found, name))

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

    def _find(self, name: str, remembered: str | None = None) -> tuple[Path, os.stat_result, str]:
        for stem, suffix in _candidates(name, remembered):
            try:
                return *self._look(stem + suffix), suffix
            except OSError as error:
                if error.errno not in _NO_SUCH_FILE:
                    raise _store_error(error, name) from error
        raise self._not_found(name)

    def _look(self, name: str) -> tuple[Path, os.stat_result]:
        found = (self.root / name).stat()  # first, since it is all that a suffix which is not there costs
        root = Path(os.path.realpath(self.root))
        path = Path(os.path.realpath(root / name))
        if not path.is_relative_to(root):
            raise StoreAccessDeniedError(
                f"{name} is a link that leads out of {self.root}: copy the file into the folder.", model=name
            )
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} is not a regular file; a model is one file.", model=name)
        return path, found

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
                if folder and error.errno in _GONE:
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
            self._find(name)
        except (ModelNotFoundError, StoreError):
            return False
        return True


def _candidates(name: str, remembered: str | None = None) -> list[tuple[str, str]]:
    stem, suffix = split_suffix(name)
    if suffix:
        return [(stem, suffix)]
    return [(name, known) for known in sorted(SUFFIXES, key=lambda known: known != remembered)]


async def _chunks(path: Path, found: os.stat_result, name: str) -> AsyncIterator[bytes]:
    """Read the file that was found: the one opened must be that, and still be it at the end."""
    version, left = _version(found), found.st_size
    try:
        async with aiofiles.open(path, "rb") as file:
            await _check_version(file, version, name)
            while left and (chunk := await file.read(_CHUNK)):
                left -= len(chunk)
                yield chunk
            await _check_version(file, version, name)
    except OSError as error:
        raise _store_error(error, name) from error


async def _check_version(file: AsyncBufferedReader, version: str, name: str) -> None:
    found = os.fstat(file.fileno())  # of an open file: answered from memory
    if _version(found) != version:
        raise ArtifactChangedError(
            f"{name} was changed while it was read. Replace artifacts by rename, never in place.", model=name
        )


def _version(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"


def _store_error(error: OSError, name: str) -> StoreError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return StoreAccessDeniedError(
            f"No permission to read {error.filename}: make it readable for this user.", model=name
        )
    return StoreUnavailableError(f"Reading {name} failed: {error}.", model=name)

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
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.names import SUFFIXES, split_suffix
from modelcache.stores.base import Artifact, NotModified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aiofiles.threadpool.binary import AsyncBufferedReader

_CHUNK = 256 << 10
_SUFFIXES_REMEMBERED = 100_000
_NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})


class LocalStore:
    """Serves the files below ``root``; a new file is served as soon as it is there.

    The version is the inode, the size and the modification time in nanoseconds. A file that is replaced while it is
    read fails that read (replace by rename, so that readers see the old file or the new one). Links are followed
    inside ``root`` and never out of it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self._suffixes: LRUCache[str, str] = LRUCache(_SUFFIXES_REMEMBERED)

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        path, found = await anyio.to_thread.run_sync(self._find, name)
        suffix = "".join(s for s in SUFFIXES if path.name.endswith(s))
        version = _version(found)
        if version == if_version:
            return NotModified(version)
        return Artifact(version=version, size=found.st_size, suffix=suffix, chunks=_chunks(path, found, name))

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield the names of all artifacts below ``root``, without suffixes, sorted, each name once."""
        for name in await anyio.to_thread.run_sync(lambda: sorted(set(self._list()))):
            if name.startswith(prefix):
                yield name

    async def close(self) -> None:
        """Nothing to release: no file stays open between two calls."""

    def __repr__(self) -> str:
        return str(self.root)

    def _find(self, name: str) -> tuple[Path, os.stat_result]:
        for suffix in self._candidates(name):
            try:
                path, found = self._look(name + suffix)
            except OSError as error:
                if error.errno in _NO_SUCH_FILE:
                    continue
                raise _store_error(error, name) from error
            self._suffixes[name] = suffix
            return path, found
        raise self._not_found(name)

    def _candidates(self, name: str) -> list[str]:
        if split_suffix(name)[1]:
            return [""]
        remembered = self._suffixes.get(name)
        return sorted(SUFFIXES, key=lambda suffix: suffix != remembered)

    def _look(self, name: str) -> tuple[Path, os.stat_result]:
        root = Path(os.path.realpath(self.root))
        path = Path(os.path.realpath(root / name))
        if not path.is_relative_to(root):
            raise StoreAccessDeniedError(
                f"{name} is a link that leads out of {self.root}: copy the file into the folder.", model=name
            )
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} is not a regular file; a model is one file.", model=name)
        return path, found

    def _not_found(self, name: str) -> ModelNotFoundError:
        if not self.root.is_dir():
            return ModelNotFoundError(f"The folder {self.root} does not exist.", model=name)
        tried = ", ".join(name + suffix for suffix in self._candidates(name))
        return ModelNotFoundError(f"There is no model {name!r} in {self.root} (looked for {tried}).", model=name)

    def _list(self) -> Iterator[str]:
        if not self.root.is_dir():
            raise StoreError(f"The folder {self.root} does not exist.")
        for folder, _, files in os.walk(self.root, onerror=_raise_store_error):
            for file in files:
                stem, suffix = split_suffix(file)
                if suffix:
                    yield Path(folder, stem).relative_to(self.root).as_posix()


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
        raise StoreUnavailableError(
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


def _raise_store_error(error: OSError) -> None:
    raise _store_error(error, str(error.filename)) from error

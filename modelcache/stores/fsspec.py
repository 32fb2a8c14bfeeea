"""Whatever fsspec reads: dozens of file systems, from Google Cloud Storage to SFTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from modelcache.errors import (
    MissingDependencyError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.names import split_suffix
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.manifest import MANIFEST, Manifest
from modelcache.stores.suffixes import Suffixes, name_of
from modelcache.stores.urls import distinction, without_secrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fsspec import AbstractFileSystem

    Info = dict[str, Any]

_RANGE = 4 << 20
"""Bytes asked for at once: most models are one request, and a large one takes no more of this process than that."""

_CHANGING = ("etag", "versionid", "generation", "sha", "ino", "mtime", "last-modified", "lastmodified", "last_modified",
             "updated", "modified", "created", "crc")  # fmt: skip
"""What file systems call that which changes with the content, in lower case."""


class FsspecStore:
    """Serves the files below ``url``, such as ``gs://bucket/folder``, by the file system that fsspec has for it.

    ``options`` are those of the file system, which may be a package of its own (gcsfs, adlfs, s3fs). An asynchronous
    file system runs on fsspec's event loop, any other in threads. The version is made of what the file system says of a
    file: its ETag, generation or modification time, and its size. A file is read by ranges; one that has another
    version at the end fails the read. What is retried is the file system's affair. ``manifest`` is as for LocalStore.
    """

    def __init__(self, url: str, *, manifest: str | None = MANIFEST, **options: Any) -> None:
        _check(url)
        self.url = without_secrets(url) + distinction(options)
        """Names the store's copies in a disk tier; without credentials."""
        self._place = url
        # What a listing has said of a file is not asked again: a change would be seen late, or never.
        self._options = {"use_listings_cache": False, "skip_instance_cache": True} | options
        self._opening = asyncio.Lock()
        self._opened: tuple[AbstractFileSystem, str] | None = None
        self._suffixes = Suffixes()
        self._manifest = Manifest(manifest, self._fetch_file)

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        for file, suffix in self._suffixes.candidates(name):
            try:
                found = await self._fetch_file(file, if_version=if_version)
            except ModelNotFoundError:
                continue
            self._suffixes.remember(name, suffix)
            return await self._manifest.enforce(file, found)
        raise ModelNotFoundError(f"There is no model {name!r} in {self.url}.", model=name)

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what ``fetch`` serves, without suffixes, sorted, each name once."""
        _, root = await self._open()
        try:
            paths = await self._call("find", prefix.rpartition("/")[0])
        except ModelNotFoundError:
            return
        files = (str(path)[len(root) :].lstrip("/") for path in paths)
        for name in sorted({name_of(file) for file in files if file != self._manifest.name} - {""}):
            if name.startswith(prefix):
                yield name

    async def close(self) -> None:
        """Let go of the file system in a thread: it closes its connections when nobody refers to it, and waits."""
        last, self._opened = [self._opened], None
        await anyio.to_thread.run_sync(last.clear)

    def __repr__(self) -> str:
        return f"fsspec {self.url}"

    async def _fetch_file(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the file of this very name, whatever the manifest says."""
        found = await self._call("info", name)
        if found["type"] != "file":
            raise ModelNotFoundError(f"{name} in {self.url} is a {found['type']}, and no file.", model=name)
        size, version = found.get("size"), _version(found)
        if size is None:
            raise StoreError(f"{self.url} does not tell the size of {name}, and is not read by ranges.", model=name)
        if version == if_version:
            return NotModified(version)
        chunks = self._chunks(name, int(size), version)
        return Artifact(version=version, size=int(size), suffix=split_suffix(name)[1], chunks=chunks)

    async def _chunks(self, name: str, size: int, version: str) -> AsyncIterator[bytes]:
        for start in range(0, size, _RANGE):
            yield await self._call("cat_file", name, start, min(start + _RANGE, size))
        if _version(await self._call("info", name)) != version:
            raise StoreUnavailableError(f"{name} was changed in {self.url} while it was read.", model=name)

    async def _call(self, method: str, name: str, *arguments: Any) -> Any:
        """Call a method of the file system for the file ``name``, without blocking this event loop."""
        system, root = await self._open()
        path = f"{root}/{name}" if name else root
        try:
            if not system.async_impl:
                return await anyio.to_thread.run_sync(getattr(system, method), path, *arguments)
            call = getattr(system, f"_{method}")(path, *arguments)
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, system.loop))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelNotFoundError(f"There is no {name} in {self.url}.", model=name) from error
        except PermissionError as error:
            raise StoreAccessDeniedError(f"{self.url} may not be read: {error}.", model=name) from error
        except Exception as error:  # each file system has errors of its own
            said = f"{type(error).__name__}: {error}"
            raise StoreUnavailableError(f"Reading {name} from {self.url} failed: {said}.", model=name) from error

    async def _open(self) -> tuple[AbstractFileSystem, str]:
        """Return the file system and the path in it; made once, and in a thread, as it may ask for credentials."""
        async with self._opening:
            if self._opened is None:
                self._opened = await anyio.to_thread.run_sync(_open, self._place, self._options)
            return self._opened


def _open(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs  # noqa: PLC0415 - comes by an extra

    system, path = url_to_fs(url, **options)
    return system, path.rstrip("/")


def _check(url: str) -> None:
    """Raise an error if fsspec, or what it needs for this URL, is not there."""
    try:
        import fsspec  # noqa: PLC0415 - comes by an extra
    except ModuleNotFoundError as error:
        raise MissingDependencyError("This store needs fsspec: pip install 'modelcache[fsspec]'") from error
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except ImportError as error:
        raise MissingDependencyError(f"fsspec cannot open {without_secrets(url)}: {error}.") from error
    except ValueError as error:
        raise StoreError(f"fsspec cannot open {without_secrets(url)}: {error}.") from error


def _version(found: Info) -> str:
    """Return what changes with the content; of a file system that says nothing of the kind, all that it says."""
    by_name = {str(key).lower(): value for key, value in found.items()}
    telling = [str(by_name[key]) for key in _CHANGING if by_name.get(key) is not None]
    text = "-".join(telling) if telling else repr(sorted(by_name.items(), key=str))
    return f"{found.get('size')}-{text}"

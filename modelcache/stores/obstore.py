"""Whatever obstore reads: Google Cloud Storage, Azure, S3 and others, by its client in Rust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

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

    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

_CHUNK = 256 << 10

_IDENTIFYING = ("endpoint", "account_name", "bucket", "container_name")
"""What of a store's configuration tells it from others, and is no secret."""

_NOT_A_FOLDER = "(os error 20)"
"""obstore's own LocalStore says so of a name below a file; all others have no such file."""


class ObstoreStore:
    """Serves the objects of ``store``: an obstore store, or a URL such as ``gs://bucket/folder``.

    ``options`` are those of ``obstore.store.from_url``, such as ``config``, ``client_options`` and ``retry_config``:
    obstore itself retries what is transient. A load is one request, conditional if it asks for a change. The version is
    the ETag; of an object that has none, its size and modification time. ``manifest`` is as for LocalStore.
    """

    def __init__(self, store: str | ObjectStore, *, manifest: str | None = MANIFEST, **options: Any) -> None:
        try:
            import obstore.store  # noqa: PLC0415 - comes by an extra
        except ModuleNotFoundError as error:
            raise MissingDependencyError("This store needs obstore: pip install 'modelcache[obstore]'") from error
        self._obstore = obstore
        try:
            self._store = obstore.store.from_url(store, **options) if isinstance(store, str) else store
        except obstore.exceptions.BaseError as error:
            raise StoreError(f"obstore cannot open this URL: {_first_line(error)}") from error
        self.url = without_secrets(store) + distinction(options) if isinstance(store, str) else _url_of(store)
        """Names the store's copies in a disk tier; without credentials."""
        self._suffixes = Suffixes()
        self._manifest = Manifest(manifest, self._fetch_file)

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        denied: StoreAccessDeniedError | None = None
        for file, suffix in self._suffixes.candidates(name):
            try:
                found = await self._fetch_file(file, if_version=if_version)
            except ModelNotFoundError:
                continue
            except StoreAccessDeniedError as error:  # whoever may not list is told so of what is not there as well
                denied = error
                continue
            self._suffixes.remember(name, suffix)
            return await self._manifest.enforce(file, found)
        raise denied or ModelNotFoundError(f"There is no model {name!r} in {self.url}.", model=name)

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what ``fetch`` serves, without suffixes, each name once, in the order of the store."""
        seen = set()
        folder = prefix.rpartition("/")[0] or None
        try:
            async for batch in self._obstore.list(self._store, prefix=folder):
                for meta in batch:
                    name = name_of(meta["path"]) if meta["path"] != self._manifest.name else ""
                    if name and name not in seen and name.startswith(prefix):
                        seen.add(name)
                        yield name
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise self._failed(error, None) from error

    async def close(self) -> None:
        """Nothing to release: obstore closes what it holds when nobody refers to it."""

    def __repr__(self) -> str:
        return f"obstore {self.url}"

    async def _fetch_file(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the object of this very name, whatever the manifest says."""
        errors = self._obstore.exceptions
        # Only what has been an ETag may be asked about as one.
        options: GetOptions = {"if_none_match": if_version} if if_version and if_version.endswith('"') else {}
        try:
            found = await self._obstore.get_async(self._store, name, options=options)
        except errors.NotModifiedError:
            assert if_version is not None
            return NotModified(if_version)
        except (errors.BaseError, OSError) as error:
            raise self._failed(error, name) from error
        version = _version(found.meta)
        if version == if_version:
            return NotModified(version)
        chunks = self._chunks(found, name)
        return Artifact(version=version, size=found.meta["size"], suffix=split_suffix(name)[1], chunks=chunks)

    async def _chunks(self, found: GetResult, name: str) -> AsyncIterator[bytes]:
        try:
            async for chunk in found.stream(_CHUNK):
                yield bytes(chunk)
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise self._failed(error, name) from error

    def _failed(self, error: Exception, name: str | None) -> ModelNotFoundError | StoreError:
        errors, said = self._obstore.exceptions, _first_line(error)
        if isinstance(error, FileNotFoundError | errors.NotFoundError) or _NOT_A_FOLDER in said:
            return ModelNotFoundError(f"There is no {name} in {self.url}.", model=name)
        if isinstance(error, PermissionError | errors.PermissionDeniedError | errors.UnauthenticatedError):
            return StoreAccessDeniedError(
                f"{self.url} may not be read with these credentials: {said}. Grant reading (and listing, to be told "
                "what is not there).",
                model=name,
            )
        return StoreUnavailableError(f"Reading {name or 'the listing'} from {self.url} failed: {said}.", model=name)


def _version(meta: ObjectMeta) -> str:
    return meta["e_tag"] or f"{meta['size']:x}-{meta['last_modified'].timestamp():f}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _url_of(store: ObjectStore) -> str:
    """Return what names this store and no other, as far as it says; a store in memory is only ever itself."""
    kind = type(store).__name__
    config: dict[str, Any] = getattr(store, "config", {})
    place = [str(config[key]) for key in _IDENTIFYING if config.get(key)]
    place += [str(part) for part in (getattr(store, "url", None), getattr(store, "prefix", None)) if part]
    return without_secrets(f"obstore.{kind}://{'/'.join(place) or uuid4().hex}")

"""From what a user writes to a store: the shipped ones by scheme, then those that other packages have registered."""

from __future__ import annotations

import inspect
import os
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from modelcache.errors import ModelCacheError, StoreError
from modelcache.stores.base import ArtifactStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from importlib.metadata import EntryPoint

    Factory = Callable[..., ArtifactStore]

GROUP = "modelcache.stores"
"""The entry-point group by which a package registers a scheme: ``redis = "my_package:RedisStore"``."""

_SHIPPED = {
    "file": "modelcache.stores.local:LocalStore",
    "http": "modelcache.stores.http:HTTPStore",
    "https": "modelcache.stores.http:HTTPStore",
    "s3": "modelcache.stores.s3:S3Store",
}
"""What opens the URLs of a scheme, imported when the first is opened. Nobody else can register these schemes."""

_ADAPTERS = {
    "fsspec": "modelcache.stores.fsspec:FsspecStore",
    "obstore": "modelcache.stores.obstore:ObstoreStore",
}
"""What opens the rest of a URL that begins with "fsspec+" or "obstore+"."""

_ADAPTED = ("abfs", "abfss", "az", "gcs", "gs", "s3a")
"""Schemes that people try without an adapter, and that there is one for."""


def open_store(url: str | os.PathLike[str], **options: Any) -> ArtifactStore:
    """Return the store that ``url`` names, made with ``options``; docs/stores.md tells which each store takes.

    What has no scheme is a folder. "fsspec+gs://bucket/folder" is served through fsspec, "obstore+gs://..." through
    obstore. A scheme that is not shipped is looked for among those that other packages have registered, whose factory
    is called as ``factory(url, **options)``. Raises StoreError if there is no such store, or if it cannot be made.
    """
    text = os.fspath(url)
    scheme, separator, _ = text.partition("://")
    adapter, plus, rest = text.partition("+")
    if not separator:
        return _make(_SHIPPED["file"], "a folder", text, options)
    if plus and adapter in _ADAPTERS:
        return _make(_ADAPTERS[adapter], f"{adapter}+ URLs", rest, options)
    if scheme in _SHIPPED:
        return _make(_SHIPPED[scheme], f"{scheme}:// URLs", _folder(text) if scheme == "file" else text, options)
    return _registered(scheme, text, options)


def _make(factory: str | Factory, what: str, url: str, options: dict[str, Any]) -> ArtifactStore:
    make: Factory = resolve_name(factory) if isinstance(factory, str) else factory
    signature = inspect.signature(make)
    try:
        signature.bind(url, **options)
    except TypeError as error:
        known = [name for name, option in signature.parameters.items() if option.kind is option.KEYWORD_ONLY]
        unknown = ", ".join(sorted(options.keys() - set(known))) or "other arguments"
        raise StoreError(
            f"The store for {what} does not take {unknown}; its options are: {', '.join(known) or 'none'}."
        ) from error
    return make(url, **options)


def _folder(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"There is no store for {url}: a file URL has three slashes, as in file:///srv/models.")
    return unquote(parts.path)


# Stores of other packages


def _registered(scheme: str, url: str, options: dict[str, Any]) -> ArtifactStore:
    found = {entry.value: entry for entry in _entries() if entry.name == scheme}
    if not found:
        raise _unknown(scheme)
    if len(found) > 1:
        rivals = " and ".join(sorted(map(_origin, found.values())))
        raise StoreError(f"{scheme}:// URLs are registered by {rivals}: uninstall all but one of them.")
    (entry,) = found.values()
    try:
        store = _make(entry.load(), f"{scheme}:// URLs ({_origin(entry)})", url, options)
    except ModelCacheError:
        raise
    except Exception as error:
        raise StoreError(
            f"{_origin(entry)}, registered for {scheme}:// URLs, failed: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(store, ArtifactStore):
        raise StoreError(
            f"{_origin(entry)}, registered for {scheme}:// URLs, made {store!r}, which is no store: it has to have "
            "fetch and close (modelcache.ArtifactStore)."
        )
    return store


def _entries() -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points  # noqa: PLC0415 - takes 10 ms, and most apps open none of these

    return entry_points(group=GROUP)


def _origin(entry: EntryPoint) -> str:
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
    return f"{entry.value}{package}"


def _unknown(scheme: str) -> StoreError:
    """Say which schemes there are, and how to come by this one."""
    registered = {entry.name for entry in _entries()}
    known = ", ".join(f"{name}://" for name in sorted(registered | _SHIPPED.keys()))
    return StoreError(
        f"There is no store for {scheme}:// URLs; there is one for {known} and for a folder's path.{_hint(scheme)} "
        "Otherwise give an object with fetch and close (modelcache.ArtifactStore), or register the scheme by the "
        f'entry-point group "{GROUP}".'
    )


def _hint(scheme: str) -> str:
    for_both = scheme in _ADAPTED
    hints = [
        f"{adapter}+{scheme}:// (pip install 'modelcache[{adapter}]')"
        for adapter, knows in (("fsspec", for_both or _known_to_fsspec(scheme)), ("obstore", for_both))
        if knows
    ]
    return f" Write {' or '.join(hints)}." if hints else ""


def _known_to_fsspec(scheme: str) -> bool:
    try:
        from fsspec.registry import known_implementations  # noqa: PLC0415 - an extra, which may not be there
    except ImportError:
        return False
    return scheme in known_implementations

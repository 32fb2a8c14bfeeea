"""Artifacts on a web server."""

from __future__ import annotations

import asyncio
import hashlib
import json
from base64 import b64encode
from contextlib import aclosing
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

import anyio.to_thread

from modelcache.errors import (
    MissingDependencyError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.names import is_name, split_suffix
from modelcache.stores.backoff import Backoff
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.manifest import MANIFEST, Manifest
from modelcache.stores.suffixes import Suffixes

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Collection, Iterator, Mapping
    from urllib.parse import SplitResult

    from modelcache.stores.http_client import HTTPClient

_INDEX_LIMIT = 64 << 20
"""Bytes of an index: enough for a million names."""
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_PATH = "/%:@!$&'()*+,;=~"
"""What is left as it is in the path of a URL, which is encoded already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPOptions:
    """How to reach a server; see :class:`HTTPStore`."""

    url: str
    headers: Mapping[str, str]
    redirect_origins: frozenset[str]
    ssl_context: ssl.SSLContext | None
    connect_timeout: float
    read_timeout: float
    max_connections: int
    backoff: Backoff


class HTTPStore:
    """Serves the files below ``url``, as in ``https://models.example/xgboost/``.

    It is built on aiohttp, which aiobotocore brings anyway: one HTTP client for both kinds of store.

    * ``auth``: a user and a password for basic authentication. Without it those of the URL are taken, and without
      those what netrc has for the host (``NETRC``, else ``~/.netrc``), read when the first request is made. None of
      them is ever shown.
    * ``headers``: sent with each request to this server, such as ``{"Authorization": "Bearer ..."}``.
    * ``index``: the name of a file below ``url`` that lists the artifacts, for ``names``: a JSON list of names, or one
      name in each line, with their suffixes or without; at most 64 MiB.
    * ``redirect_origins``: where redirects may lead beside the store's own scheme, host and port, as in
      ``{"https://cdn.example"}``. ``auth`` and ``headers`` are never sent there, and nothing leads from https to http.
    * ``ssl_context``: for a certificate authority of your own, or a client certificate.
    * ``connect_timeout``, ``read_timeout``: seconds for a connection, and for the next bytes of an answer.
    * ``max_connections``: open at once; more requests than that wait for one.
    * ``manifest``: the file that lists the SHA-256 of every artifact, which is enforced if it is there
      (:mod:`modelcache.stores.manifest`); None: there is none. A server that denies access to it is taken to have
      none, unless it has shown one before.

    Proxies are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``).

    A name without a suffix is looked for with ``.tar.gz``, ``.ubj`` and ``.json``, in that order. The suffix that
    answered is remembered and looked for first: keep one file for each name.

    The version is the ETag; else the modification time, in seconds, with the length; else an announced SHA-256. If the
    server sends none of them each fetch is another version, and a refresh loads anew each time. An announced length or
    SHA-256 (``Repr-Digest``, ``Content-Digest``, ``Digest``) is enforced. A download that breaks off goes on at the
    same byte if the ETag is a strong one and still the same, else it ends with ArtifactChangedError, and a load begins
    again. The session is opened by the first call, and opened again by a call after ``close``.
    """

    def __init__(
        self, url: str, *, auth: tuple[str, str] | None = None, headers: Mapping[str, str] | None = None,
        index: str | None = None, redirect_origins: Collection[str] = (), ssl_context: ssl.SSLContext | None = None,
        connect_timeout: float = 5.0, read_timeout: float = 20.0, max_connections: int = 128,
        manifest: str | None = MANIFEST,
    ) -> None:  # fmt: skip
        if find_spec("aiohttp") is None:
            raise MissingDependencyError("HTTPStore needs aiohttp: pip install 'modelcache[http]'.")
        self.url, of_url = _parse(url)
        """Says which store it is, without how to be let in: two with the same have the same artifacts."""
        self._options = HTTPOptions(
            url=self.url, headers=_with_auth(headers or {}, auth or of_url),
            redirect_origins=frozenset(map(_origin, redirect_origins)), ssl_context=ssl_context,
            connect_timeout=connect_timeout, read_timeout=read_timeout, max_connections=max_connections,
            backoff=Backoff(),
        )  # fmt: skip
        self._index = index
        self._suffixes = Suffixes()
        self._manifest = Manifest(manifest, self._fetch_manifest, denied_is_absent=True)
        self._client: HTTPClient | None = None
        self._opening = asyncio.Lock()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        client = self._client or await self._open()
        denied: StoreAccessDeniedError | None = None
        for path, suffix in self._suffixes.candidates(name):
            try:
                found = await client.fetch(_quote(path), suffix, model=name, if_version=if_version)
            except ModelNotFoundError:
                continue
            except StoreAccessDeniedError as error:  # what some servers say of a file that is not there
                denied = error
                continue
            self._suffixes.remember(name, suffix)
            return await self._manifest.enforce(path, found)
        raise denied or self._not_found(name)

    async def _fetch_manifest(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        client = self._client or await self._open()
        return await client.fetch(_quote(name), "", model=None, if_version=if_version)

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what the index lists, without suffixes, sorted, each name once.

        StoreError if there is no index.
        """
        if self._index is None:
            raise StoreError(
                f"{self} cannot be listed: HTTP has no such request. Put a file there that lists the names, as a JSON "
                'list or one in each line, and give its name: HTTPStore(url, index="index.json").'
            )
        data, digest = await self._read_index(self._index)
        for name in await anyio.to_thread.run_sync(lambda: sorted({*_listed(data, digest)})):
            if name.startswith(prefix):
                yield name

    async def close(self) -> None:
        """Close all connections."""
        async with self._opening:  # else what is being opened would stay open
            client, self._client = self._client, None
            if client is not None:
                await client.close()
        self._opening = asyncio.Lock()  # one that was waited for belongs to its event loop

    def __repr__(self) -> str:
        return self.url

    async def _open(self) -> HTTPClient:
        async with self._opening:
            if self._client is None:
                # In a thread, as it takes a fifth of a second and reads files, the certificates among them.
                module = await anyio.to_thread.run_sync(import_module, "modelcache.stores.http_client")
                self._client = await module.HTTPClient.open(self._options)
            return self._client

    async def _read_index(self, index: str) -> tuple[bytes, str | None]:
        """Return what is in it, and the SHA-256 that was announced."""
        client = self._client or await self._open()
        try:
            found = await client.fetch(_quote(index), "", model=None)
        except ModelNotFoundError as error:
            raise StoreError(f"There is no index {index} at {self}: put it there, or give another name.") from error
        assert isinstance(found, Artifact)
        data = bytearray()
        async with aclosing(found.chunks):  # type: ignore[type-var]
            async for chunk in found.chunks:
                data += chunk
                if len(data) > _INDEX_LIMIT:
                    raise StoreError(f"The index {index} at {self} is larger than {_INDEX_LIMIT:,} bytes.")
        return bytes(data), found.digest

    def _not_found(self, name: str) -> ModelNotFoundError:
        tried = ", ".join(path for path, _ in Suffixes().candidates(name))
        return ModelNotFoundError(f"There is no model {name!r} at {self} (looked for {tried}).", model=name)


def _parse(url: str) -> tuple[str, tuple[str, str] | None]:
    """Return a URL without its credentials and final slash, and the credentials."""
    try:
        parts = urlsplit(url)
        problem = _problem(parts)
    except ValueError:  # not told: it quotes what follows a colon, and that may be a part of a password
        problem = "its host or port is malformed"
    if problem:
        shown = url.rpartition("@")[2].partition("?")[0]
        raise StoreError(
            f"{shown!r} is no URL of a web server: {problem}. Use one like https://models.example/folder/."
        )
    host = parts.netloc.rpartition("@")[2].lower().removesuffix(_DEFAULT_PORTS[parts.scheme])
    auth = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return f"{parts.scheme}://{host}{quote(parts.path, safe=_PATH)}".rstrip("/"), auth


def _origin(url: str) -> str:
    return "/".join(_parse(url)[0].split("/")[:3])


def _problem(parts: SplitResult) -> str:
    """Return what is wrong; or raise ValueError, as reading parts of it may."""
    if parts.port == 0:
        return "its host or port is malformed"
    if parts.scheme not in _DEFAULT_PORTS:
        return "it does not begin with http:// or https://"
    if not parts.hostname or not parts.hostname.isascii():
        return "it has no host, or one that is not ASCII"
    if parts.query or parts.fragment:
        return "it has a query or a fragment"
    return ""


def _with_auth(headers: Mapping[str, str], auth: tuple[str, str] | None) -> dict[str, str]:
    sent = dict(headers)
    if auth is not None:
        sent["Authorization"] = "Basic " + b64encode(":".join(auth).encode()).decode()
    return sent


def _quote(name: str) -> str:
    return "/".join(quote(segment, safe="") for segment in name.split("/"))


def _listed(data: bytes, digest: str | None) -> Iterator[str]:
    """Yield the names in an index, each as ``fetch`` takes it; what is no name is left out."""
    if digest not in (None, hashlib.sha256(data).hexdigest()):
        raise StoreUnavailableError("The index has another SHA-256 than the server announced.")
    for listed in _entries(data):
        stem = split_suffix(listed)[0]
        # A stem that has a suffix itself would be taken for the name of another file.
        name = listed if split_suffix(stem)[1] else stem
        if is_name(name):
            yield name


def _entries(data: bytes) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
        if not text.lstrip().startswith("["):
            return [line.strip() for line in text.splitlines()]
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"The index is neither a JSON list of names nor one name in each line: {error}.") from error
    if not all(isinstance(entry, str) for entry in entries):
        raise StoreError('The index is a JSON list, but not of names: it has to be like ["Chicago_IL.ubj"].')
    return list(entries)

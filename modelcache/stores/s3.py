"""Artifacts in a bucket of S3, or of a store that speaks its protocol."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

import anyio.to_thread

from modelcache.errors import ModelNotFoundError, StoreAccessDeniedError, StoreError
from modelcache.names import SUFFIXES, split_suffix
from modelcache.stores.backoff import Backoff
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.downloading import Download, Parallel
from modelcache.stores.manifest import MANIFEST, Manifest
from modelcache.stores.suffixes import Suffixes, name_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from modelcache.stores.s3_client import Answer, S3Client

_IN_URL = ("endpoint_url", "region", "profile", "anonymous", "path_style")
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """How to reach a bucket; see :class:`S3Store`."""

    bucket: str
    endpoint_url: str | None
    region: str | None
    profile: str | None
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None
    anonymous: bool
    path_style: bool | None
    connect_timeout: float
    read_timeout: float
    attempts: int
    max_connections: int


class S3Store:
    """Serves the objects of ``url``, as in ``s3://bucket/folder?endpoint_url=https://minio.example:9000&region=eu-west-1``.

    The path is taken as it is, without percent-decoding. ``endpoint_url`` (else AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL),
    ``region``, ``profile``, ``anonymous`` and ``path_style`` are options of the URL or of this constructor, everything
    else only of the constructor:

    * ``access_key_id``, ``secret_access_key``, ``session_token``: without them the standard chain is asked:
      environment, profile, web identity, container, instance. ``anonymous`` sends none, for public buckets.
    * ``path_style``: whether the bucket is part of the path, or of the host. By default it is in the path at an
      ``endpoint_url``, since few servers have a host name for each bucket.
    * ``connect_timeout``, ``read_timeout``: seconds for a connection, and for the next bytes of an answer.
    * ``attempts``: of one request, in the "standard" mode of botocore, whose retries run dry in a long outage.
    * ``max_connections``: open at once; more requests than that wait for one.
    * ``manifest``: the object that lists the SHA-256 of every artifact, which is enforced if it is there
      (:mod:`modelcache.stores.manifest`); None: there is none. It has to be readable: without the right to list the
      bucket, S3 says of what is not there that access is denied, and so this is taken for no manifest.

    A name without a suffix is looked for with ``.tar.gz``, ``.ubj`` and ``.json``, in that order; the suffix that
    answered, or that ``names`` has seen, is asked for alone from then on: keep one object for each name. The version is
    the ETag, and after an "@" the version id if the bucket has versions. An announced CRC-32, SHA-1 or SHA-256 of the
    whole object is enforced. The client is made by the first call, and made again by a call after ``close``.
    """

    def __init__(
        self, url: str, *, endpoint_url: str | None = None, region: str | None = None, profile: str | None = None,
        access_key_id: str | None = None, secret_access_key: str | None = None, session_token: str | None = None,
        anonymous: bool = False, path_style: bool | None = None,
        connect_timeout: float = 5.0, read_timeout: float = 20.0, attempts: int = 4, max_connections: int = 128,
        manifest: str | None = MANIFEST,
    ) -> None:  # fmt: skip
        bucket, folder, asked = _parse(url)
        endpoint_url = _endpoint(asked.get("endpoint_url", endpoint_url))
        self._options = S3Options(
            bucket=bucket, endpoint_url=endpoint_url,
            region=asked.get("region", region), profile=asked.get("profile", profile),
            access_key_id=access_key_id, secret_access_key=secret_access_key, session_token=session_token,
            anonymous=_switch(asked, "anonymous", anonymous), path_style=_switch(asked, "path_style", path_style),
            connect_timeout=connect_timeout, read_timeout=read_timeout,
            attempts=attempts, max_connections=max_connections,
        )  # fmt: skip
        self._folder = folder + "/" if folder else ""
        self._shown = f"s3://{bucket}/{folder}".rstrip("/")
        self.url = self._shown + (f"?endpoint_url={quote(endpoint_url, safe=':/')}" if endpoint_url else "")
        """Says which store it is, without how to be let in: two with the same have the same artifacts."""
        self._suffixes = Suffixes()
        self._manifest = Manifest(manifest, self._fetch_manifest, denied_is_absent=True)
        self._likely = SUFFIXES[0]
        """What answered last."""
        self._backoff = Backoff()
        self._parallel = Parallel()
        self._client: S3Client | None = None
        self._opening = asyncio.Lock()

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        """Return the artifact."""
        client = self._client or await self._open()
        unless = None if if_version is None else if_version.partition("@")[0]
        suffix = split_suffix(name)[1]
        if suffix:
            answer = await client.get(self._folder + name, name, unless=unless)
        else:
            answer, suffix = await self._find(client, name, unless)
        file = name if name.endswith(suffix) else name + suffix
        return await self._manifest.enforce(file, self._deliver(client, answer, name, suffix, if_version))

    async def _fetch_manifest(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        client = self._client or await self._open()
        unless = None if if_version is None else if_version.partition("@")[0]
        answer = await client.get(self._folder + name, name, unless=unless)
        return self._deliver(client, answer, name, "", if_version)

    def _deliver(
        self, client: S3Client, answer: Answer | None, name: str, suffix: str, if_version: str | None
    ) -> Artifact | NotModified:
        if answer is None:
            assert if_version is not None
            return NotModified(if_version)
        chunks = Download(
            answer.body, partial(client.get_range, answer),
            name=name, size=answer.size, backoff=self._backoff, parallel=self._parallel, checksum=answer.checksum,
        )  # fmt: skip
        return Artifact(version=answer.version, size=answer.size, suffix=suffix, chunks=chunks, digest=answer.digest)

    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yield what the bucket has below the folder, without suffixes, in the order of its keys, a page at a time."""
        client = self._client or await self._open()
        first, seen = "", set[str]()  # names that begin with first + ".": all keys of one of them are listed in a row
        async for key in client.keys(self._folder + prefix):
            file = key.removeprefix(self._folder)
            name = name_of(file) if file != self._manifest.name else ""
            if not name or not name.startswith(prefix):
                continue
            if name != file:
                self._remember(name, file.removeprefix(name))
            if not first or not file.startswith(first + "."):
                first, seen = name, set()
            if name not in seen:
                seen.add(name)
                yield name

    async def close(self) -> None:
        """Close all connections."""
        async with self._opening:
            client, self._client = self._client, None
            if client is not None:
                await client.close()
        self._opening = asyncio.Lock()  # one that was waited for belongs to its event loop

    def __repr__(self) -> str:
        return self._shown

    async def _open(self) -> S3Client:
        async with self._opening:
            if self._client is None:
                boto = await anyio.to_thread.run_sync(import_module, "modelcache.stores.s3_client")
                self._client = await boto.open_client(self._options)
            return self._client

    async def _find(self, client: S3Client, name: str, unless: str | None) -> tuple[Answer | None, str]:
        """Return the answer of the first suffix that there is, None if it is ``unless``, and the suffix."""
        remembered = self._suffixes.remembered(name)
        if remembered is not None:
            with suppress(ModelNotFoundError):
                return await client.get(self._folder + name + remembered, name, unless=unless), remembered
        denied: StoreAccessDeniedError | None = None
        asked: dict[str, asyncio.Task[Answer | None]] = {}
        try:
            for suffix in SUFFIXES:
                if suffix not in asked:
                    asked |= self._ask(client, name, suffix, unless)
                try:
                    answer = await asked[suffix]
                except ModelNotFoundError:
                    continue
                except StoreAccessDeniedError as error:  # maybe since it is not there and must not be listed
                    denied = error
                    continue
                del asked[suffix]
                self._suffixes.remember(name, suffix)
                self._likely = suffix
                return answer, suffix
        finally:
            await _let_go(asked.values())
        raise denied or self._not_found(name)

    def _ask(
        self, client: S3Client, name: str, suffix: str, unless: str | None
    ) -> dict[str, asyncio.Task[Answer | None]]:
        """Ask for ``suffix`` and, at once, for the others up to the likely one: it may win only if they are missing."""
        start, stop = SUFFIXES.index(suffix), SUFFIXES.index(self._likely) + 1
        suffixes = SUFFIXES[start : stop if start < stop else None]
        return {s: asyncio.create_task(client.get(self._folder + name + s, name, unless=unless)) for s in suffixes}

    def _not_found(self, name: str) -> ModelNotFoundError:
        tried = ", ".join(name + suffix for suffix in SUFFIXES)
        return ModelNotFoundError(f"There is no model {name!r} in {self._shown} (looked for {tried}).", model=name)

    def _remember(self, name: str, suffix: str) -> None:
        """Ask for the suffix that was listed, unless there is one that goes before it."""
        known = self._suffixes.remembered(name) or suffix
        self._suffixes.remember(name, min(known, suffix, key=SUFFIXES.index))


async def _let_go(asked: Collection[asyncio.Task[Answer | None]]) -> None:
    for task in asked:
        task.cancel()
    if asked:
        await asyncio.wait(asked)
    for task in asked:
        if not task.cancelled() and task.exception() is None and (answer := task.result()) is not None:
            await answer.body.aclose()


def _parse(url: str) -> tuple[str, str, dict[str, str]]:
    """Return the bucket, the folder, and the options of the query."""
    place, _, query = url.removeprefix("s3://").partition("?")
    bucket, _, folder = place.partition("/")
    if not url.startswith("s3://") or not bucket:
        raise StoreError(f"{url!r} names no bucket: write s3://bucket or s3://bucket/folder.")
    if "@" in bucket:
        raise StoreError("Keep credentials out of the URL: it is shown in logs. Use a profile or the environment.")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := options.keys() - _IN_URL:
        raise StoreError(
            f"An s3:// URL has no option {', '.join(sorted(unknown))}, only {', '.join(_IN_URL)}; give others to "
            "S3Store, and no credentials in a URL."
        )
    return bucket, folder.strip("/"), options


def _switch(options: dict[str, str], name: str, default: _T) -> bool | _T:
    if name not in options:
        return default
    if options[name].lower() not in _SWITCHES:
        raise StoreError(f"{name}={options[name]} in the URL: write true or false.")
    return _SWITCHES[options[name].lower()]


def _endpoint(given: str | None) -> str | None:
    """Return the endpoint if it is not Amazon's own; StoreError if it is no URL, or one with credentials."""
    if given is None and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not given:
        return None
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise StoreError("endpoint_url has to be http://host:port or https://host, without credentials.")
    return given.rstrip("/")

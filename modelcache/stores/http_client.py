"""The requests of an HTTPStore; imports aiohttp, and is imported when one is used for the first time."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
from base64 import b64encode
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import anyio.to_thread
from yarl import URL

from modelcache.errors import (
    ArtifactChangedError,
    ModelNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.stores.base import Artifact, NotModified
from modelcache.stores.decoding import CODINGS, Decoded
from modelcache.stores.downloading import Download, Parallel
from modelcache.stores.http_headers import (
    codings_of,
    condition,
    is_strong,
    retry_after_of,
    sha256_of,
    start_of,
    version_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Self

    from modelcache.stores.http import HTTPOptions

logger = logging.getLogger("modelcache")

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_FOLLOWED = 10
_GONE = frozenset({404, 410})
_DENIED = frozenset({401, 403})
_DRAINED = 64 << 10
"""Bytes of an answer that nobody wants, read so that its connection can be used again."""
_SEQUENTIAL = Parallel(places=0)
"""A web server is no object store: one connection for one file."""
_FAILED = (aiohttp.ClientError, TimeoutError)


class HTTPClient:
    """One session with one server: connections, credentials, redirects and retries."""

    def __init__(self, options: HTTPOptions, headers: Mapping[str, str], proxy: str | None) -> None:
        self._options = options
        self._base = URL(options.url, encoded=True)
        self._headers = headers
        self._proxy = proxy
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=options.max_connections, ssl=options.ssl_context or True),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=options.connect_timeout, sock_read=options.read_timeout
            ),
            auto_decompress=False,  # of whatever size that is, and with a Content-Length that is not that of the bytes
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    @classmethod
    async def open(cls, options: HTTPOptions) -> Self:
        """Open a session; what the environment says of the server is read first, in a thread."""
        headers, proxy = await anyio.to_thread.run_sync(_of_environment, options)
        return cls(options, headers, proxy)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def fetch(
        self, path: str, suffix: str, *, model: str | None, if_version: str | None = None
    ) -> Artifact | NotModified:
        """Return the file at an encoded path below the store's URL.

        Raises ModelNotFoundError, or StoreError and its kinds; ``model`` is the name that is asked for.
        """
        url = f"{self._options.url}/{path}"
        asked = condition(if_version) if if_version else {}
        response = await self.get(url, asked, {200, 304} if asked else {200}, model=model)
        try:
            version = if_version if response.status == HTTPStatus.NOT_MODIFIED else version_of(response.headers)
            assert version is not None
            if version == if_version:
                await _dismiss(response)
                return NotModified(version)
            return self._artifact(_Source(self, url, response, model, version), suffix)
        except BaseException:
            response.close()
            raise

    def _artifact(self, source: _Source, suffix: str) -> Artifact:
        coded = bool(source.codings)
        announced = sha256_of(source.first.headers)
        size = source.first.content_length  # of the bytes as they are sent, as is an announced SHA-256
        download = Download(
            _Body(source.first), source.open_range, name=source.name, size=size,
            backoff=self._options.backoff, parallel=_SEQUENTIAL,
            checksum=_SHA256(announced, source.model) if coded and announced else None,
        )  # fmt: skip
        if not coded:
            return Artifact(version=source.version, size=size, suffix=suffix, chunks=download, digest=announced)
        decoded = Decoded(download, model=source.model, is_archive=suffix == ".tar.gz")
        return Artifact(version=source.version, size=None, suffix=suffix, chunks=decoded)

    async def get(
        self, url: str, headers: Mapping[str, str], expected: Collection[int], *, model: str | None
    ) -> aiohttp.ClientResponse:
        """Return an answer of one of the ``expected`` statuses; ask again where that helps."""
        failures = 0
        while True:
            if self._session.closed:
                raise StoreError(f"{self._options.url} was closed while it was asked.", model=model)
            try:
                response = await self._follow(URL(url, encoded=True), headers, model)
                if response.status in expected:
                    return response
                error = _refusal(response, model)
                await _dismiss(response)
            except _FAILED as failure:
                error = _failure(failure, model)
                error.__cause__ = failure
            if not isinstance(error, StoreUnavailableError):
                raise error
            failures += 1
            await self._options.backoff.after(failures, error)

    async def _follow(self, url: URL, headers: Mapping[str, str], model: str | None) -> aiohttp.ClientResponse:
        """Return the first answer that is no redirect."""
        for _ in range(_REDIRECTS_FOLLOWED):
            response = await self._request(url, headers)
            if response.status not in _REDIRECTS:
                return response
            await _dismiss(response)
            url = self._redirected(url, response.headers.get("Location", ""), model)
        raise StoreError(f"{self._options.url} redirects in a circle.", model=model)

    async def _request(self, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        own = self._headers if url.origin() == self._base.origin() else {}
        return await self._session.get(
            url,
            headers={**own, **headers, "Accept-Encoding": "identity"},
            allow_redirects=False, proxy=self._proxy,
        )  # fmt: skip

    def _redirected(self, url: URL, location: str, model: str | None) -> URL:
        try:
            target = url.join(URL(location, encoded=True)).with_user(None)
            origin = str(target.origin())
        except ValueError as error:
            raise StoreError(f"{url} redirects to {location!r}, which is no URL.", model=model) from error
        downgrade = url.scheme == "https" and target.scheme != "https"
        if origin != str(self._base.origin()) and (downgrade or origin not in self._options.redirect_origins):
            remedy = (
                "that is not encrypted, and is not followed."
                if downgrade
                else f"allow it by HTTPStore(url, redirect_origins=[{origin!r}])."
            )
            raise StoreAccessDeniedError(f"{self._options.url} redirects to {origin}: {remedy}", model=model)
        return target


class _Source:
    """A file on the server, of which ``first`` is the answer to a request for all of it."""

    def __init__(
        self, client: HTTPClient, url: str, first: aiohttp.ClientResponse, model: str | None, version: str
    ) -> None:
        self._client = client
        self._url = url
        self.first = first
        self.model = model
        self.name = model or url
        self.version = version
        self.codings = codings_of(first.headers)
        if len(self.codings) > 1 or not CODINGS.issuperset(self.codings):
            raise StoreError(
                f"The server compresses {self.name} by {', '.join(self.codings)}, although it was asked not to: "
                "switch that off for these files.", model=model,
            )  # fmt: skip

    async def open_range(self, start: int, stop: int | None) -> _Body:
        """Return the bytes [start, stop) of this version, to the end if ``stop`` is None.

        A server that answers with all of it gets as far again: what has been delivered is thrown away.
        """
        if start and not is_strong(self.version):
            raise ArtifactChangedError(
                f"The download of {self.name} broke off at byte {start:,} and cannot go on: the server has no strong "
                "ETag, so what it has now may be something else.", model=self.model,
            )  # fmt: skip
        expected, headers = {200}, {}
        if start:
            expected = {200, 206, 416}
            headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}", "If-Range": self.version}
        response = await self._client.get(self._url, headers, expected, model=self.model)
        try:
            return _Body(response, skip=self._offset(response, start))
        except BaseException:
            response.close()
            raise

    def _offset(self, response: aiohttp.ClientResponse, start: int) -> int:
        """Return how many bytes of an answer come before ``start``."""
        headers = response.headers
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or version_of(headers) != self.version:
            raise ArtifactChangedError(f"{self.name} was replaced while it was downloaded.", model=self.model)
        first = start_of(headers) if response.status == HTTPStatus.PARTIAL_CONTENT else 0
        if first is None or first > start or codings_of(headers) != self.codings:
            raise StoreUnavailableError(
                f"Asked for the rest of {self.name}, from byte {start:,}, the server sends something else.",
                model=self.model,
            )
        return start - first


class _Body:
    """The bytes of one answer, without the first ``skip``."""

    def __init__(self, response: aiohttp.ClientResponse, *, skip: int = 0) -> None:
        self._response = response
        self._skip = skip

    async def read(self) -> bytes:
        """Return what has come, at least one byte; b"" at the end."""
        while chunk := await self._read():
            if len(chunk) > self._skip:
                wanted, self._skip = chunk[self._skip :], 0
                return wanted
            self._skip -= len(chunk)
        return b""

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except _FAILED as failure:
            raise StoreUnavailableError(f"{_told(failure)}.") from failure

    async def aclose(self) -> None:
        """Let go of the connection; it is used again if all has been read."""
        self._response.release()


class _SHA256:
    """The announced SHA-256 of the bytes as they are sent."""

    def __init__(self, announced: str, model: str | None) -> None:
        self._announced = announced
        self._model = model
        self._hash = hashlib.sha256()

    def update(self, chunk: bytes) -> None:
        """Add the next bytes."""
        self._hash.update(chunk)

    def check(self) -> None:
        """Raise StoreUnavailableError if the bytes are not those that were announced."""
        if self._hash.hexdigest() != self._announced:
            raise StoreUnavailableError(
                f"The server sent bytes with the SHA-256 {self._hash.hexdigest()}, and announced {self._announced}.",
                model=self._model,
            )


async def _dismiss(response: aiohttp.ClientResponse) -> None:
    """Let go of an answer that nobody reads; the connection of a short one is used again."""
    try:
        if (response.content_length or 0) <= _DRAINED:
            with suppress(*_FAILED):
                await response.content.read(_DRAINED)
    finally:
        response.release()


def _refusal(response: aiohttp.ClientResponse, model: str | None) -> StoreError | ModelNotFoundError:
    """Return what a status means that no artifact comes with."""
    status = response.status
    told = f"The server answered {status} {response.reason or ''}".rstrip() + (
        f" when asked for {model}" if model else ""
    )
    if status in _GONE:
        return ModelNotFoundError(f"{told}.", model=model)
    if status in _DENIED:
        return StoreAccessDeniedError(f"{told}: give auth or headers that may read it.", model=model)
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return StoreUnavailableError(f"{told}.", model=model, retry_after=retry_after_of(response.headers))
    return StoreError(f"{told}, which no file is sent with.", model=model)


def _failure(failure: Exception, model: str | None) -> StoreError:
    """Return what it means that there was no answer."""
    if isinstance(failure, aiohttp.ClientSSLError | aiohttp.ServerFingerprintMismatch):
        return StoreError(
            f"There is no secure connection: {_told(failure)}. If the certificate is from an authority of your own, "
            "give an ssl_context that trusts it.", model=model,
        )  # fmt: skip
    if isinstance(failure, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | TimeoutError):
        return StoreUnavailableError(f"The server did not answer: {_told(failure)}.", model=model)
    return StoreError(f"The server's answer makes no sense: {_told(failure)}.", model=model)


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__


def _of_environment(options: HTTPOptions) -> tuple[dict[str, str], str | None]:
    """Return the header fields for the server, with what netrc adds to them, and the proxy to use, if any. Blocking."""
    parts = urlsplit(options.url)
    host = parts.hostname or ""
    headers = dict(options.headers)
    if not any(name.lower() == "authorization" for name in headers) and (login := _netrc_login(host)):
        headers["Authorization"] = "Basic " + b64encode(login.encode()).decode()
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    return headers, proxy


def _netrc_login(host: str) -> str:
    """Return "user:password" for a host, "" if there is none. aiohttp would read the file for each request."""
    try:
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RuntimeError, netrc.NetrcParseError) as error:
        logger.warning("no login is taken from netrc: %s", error)
        return ""
    return f"{found[0]}:{found[2]}" if found else ""

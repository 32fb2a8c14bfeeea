"""A client of one bucket. It and the modules s3_errors.py and s3_shortcut.py import boto, when a store is opened."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import zlib
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from aiobotocore.config import AioConfig
from aiobotocore.credentials import AioCredentials
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.exceptions import NoCredentialsError

from modelcache import __version__
from modelcache.errors import ArtifactChangedError, ModelNotFoundError, StoreUnavailableError
from modelcache.stores.s3_errors import RAISED, TRANSIENT, code_of, explained, retry_after
from modelcache.stores.s3_shortcut import Shortcut

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from modelcache.stores.downloading import Checksum
    from modelcache.stores.s3 import S3Options

_CHUNK = 256 << 10
_PATIENCE = 30.0
"""Seconds that S3 may ask for by Retry-After."""
_GONE = frozenset({"PreconditionFailed", "InvalidRange", "412", "416"})


class S3Body:
    """The bytes of one answer."""

    def __init__(self, body: Any, client: S3Client, name: str) -> None:
        self._body = body
        self._client = client
        self._name = name

    async def read(self) -> bytes:
        """Return what has come, b"" at the end."""
        try:
            chunk: bytes = await self._body.read(_CHUNK)
        except TRANSIENT as error:
            raise explained(error, self._client.options, self._name) from error
        return chunk

    async def aclose(self) -> None:
        """Let go of the connection."""
        self._body.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An object, whose bytes are on their way."""

    key: str
    name: str
    etag: str
    version_id: str
    """"" in a bucket without versions."""
    size: int | None
    body: S3Body
    digest: str | None
    checksum: Checksum | None

    @property
    def version(self) -> str:
        """The token of this version."""
        return f"{self.etag}@{self.version_id}" if self.version_id else self.etag


class S3Client:
    """Asks for the objects of one bucket; one for each store, as it keeps the connections."""

    def __init__(self, client: Any, credentials: Any, stack: AsyncExitStack, options: S3Options) -> None:
        self._client = client
        self._shortcut = Shortcut(client, options.bucket, credentials)
        self._pages = client.get_paginator("list_objects_v2")  # here, as it reads a file
        self._stack = stack
        self.options = options
        client.meta.events.register("before-call.s3.GetObject", _ask_for_checksum)
        client.meta.events.register_first("needs-retry.s3", self._heed_retry_after)

    async def get(self, key: str, name: str, *, unless: str | None) -> Answer | None:
        """Return the object, or None if its ETag is ``unless``."""
        try:
            found = await self._shortcut.get_object(key, None if unless is None else f'"{unless}"')
        except RAISED as error:
            raise explained(error, self.options, name) from error
        if found is None:
            return None
        headers, body = found
        digest, checksum = _announced(headers, name)
        return Answer(
            key=key, name=name, etag=_etag(headers), version_id=_version_id(headers),
            size=int(headers["content-length"]) if "content-length" in headers else None,
            body=S3Body(body, self, name), digest=digest, checksum=checksum,
        )  # fmt: skip

    async def get_range(self, answer: Answer, start: int, stop: int | None) -> S3Body:
        """Return the bytes [start, stop) of the version that ``answer`` is of."""
        pinned = {"VersionId": answer.version_id} if answer.version_id else {}
        asked = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            response = await self._client.get_object(
                Bucket=self.options.bucket, Key=answer.key, Range=asked, IfMatch=f'"{answer.etag}"', **pinned
            )
        except RAISED as error:
            said = explained(error, self.options, answer.name)
            if isinstance(said, ModelNotFoundError) or code_of(error) in _GONE:
                raise _changed(answer) from error
            raise said from error
        body = S3Body(response["Body"], self, answer.name)
        try:
            _check_range(response["ResponseMetadata"]["HTTPHeaders"], answer, start, stop)
        except BaseException:
            await body.aclose()
            raise
        return body

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin with ``prefix``, in the order in which S3 lists them, a page at a time."""
        pages = self._pages.paginate(Bucket=self.options.bucket, Prefix=prefix)
        try:
            async for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"]
        except RAISED as error:
            raise explained(error, self.options, None) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._stack.aclose()

    def _heed_retry_after(self, *, attempts: int, response: Any, **_: Any) -> float | None:
        """Pause as long as S3 asks for, where botocore would pause as it likes."""
        if response is None or attempts >= self.options.attempts or response[0].status_code not in (429, 503):
            return None
        asked = retry_after(response[0].headers)
        return asked if asked and asked <= _PATIENCE else None


async def open_client(options: S3Options) -> S3Client:
    """Make the client and find its credentials.

    That reads files and takes 0.2 s, so it is done in a thread, with an event loop for the credentials that have to be
    asked for. Nothing of a client belongs to an event loop before its first request.
    """
    try:
        return await anyio.to_thread.run_sync(_run_in_thread, options)
    except RAISED as error:
        raise explained(error, options, None) from error


def _run_in_thread(options: S3Options) -> S3Client:
    async def make() -> S3Client:
        stack = AsyncExitStack()
        session = AioSession(profile=options.profile)
        # No date that S3 tells is used, and to parse one takes 70 us; those of credentials may be text.
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_as_it_is)
        client = await stack.enter_async_context(session.create_client("s3", **_arguments(options, session)))
        return S3Client(client, await _find_credentials(options, session), stack, options)

    return asyncio.run(make())


async def _find_credentials(options: S3Options, session: AioSession) -> Any:
    """Return those that the client signs with; None if there are none."""
    if options.anonymous:
        return None
    if options.access_key_id and options.secret_access_key:
        return AioCredentials(options.access_key_id, options.secret_access_key, options.session_token)
    credentials = await session.get_credentials()
    if credentials is None:
        raise NoCredentialsError
    await credentials.get_frozen_credentials()  # of a role: makes a client of its own, which takes as long
    return credentials


def _as_it_is(timestamp: Any) -> Any:
    return timestamp


def _arguments(options: S3Options, session: AioSession) -> dict[str, Any]:
    style = {} if options.path_style is None else {"addressing_style": "path" if options.path_style else "virtual"}
    config = AioConfig(
        connect_timeout=options.connect_timeout,
        read_timeout=options.read_timeout,
        max_pool_connections=options.max_connections,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        s3=style or None,
        # What checks a body by itself knows neither of ranges nor of bodies that are resumed, and of a "304 Not
        # Modified" with a checksum it makes a TypeError: what is announced is asked for and checked here instead.
        response_checksum_validation="when_required",
        user_agent=f"modelcache/{__version__}",  # botocore would put its own together anew for each request
        parameter_validation=False,  # they are ours, and of the right types
        **({"signature_version": UNSIGNED} if options.anonymous else {}),
    )
    return {
        "config": config,
        "endpoint_url": options.endpoint_url,
        # Amazon tells where the bucket is, and the request is sent there; most other servers take any region.
        "region_name": options.region or session.get_config_variable("region") or "us-east-1",
        "aws_access_key_id": options.access_key_id,
        "aws_secret_access_key": options.secret_access_key,
        "aws_session_token": options.session_token,
    }


def _ask_for_checksum(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-checksum-mode"] = "ENABLED"


# Versions


def _etag(headers: Mapping[str, str]) -> str:
    return headers.get("etag", "").strip('"')


def _version_id(headers: Mapping[str, str]) -> str:
    found = headers.get("x-amz-version-id", "")
    return "" if found == "null" else found


def _check_range(headers: Mapping[str, str], answer: Answer, start: int, stop: int | None) -> None:
    if _etag(headers) != answer.etag:  # there are servers that know no If-Match
        raise _changed(answer)
    if not headers.get("content-range", "").startswith(f"bytes {start}-{'' if stop is None else stop - 1}"):
        raise StoreUnavailableError(
            f"S3 was asked for the bytes from {start:,} on of {answer.name}, and delivers others.", model=answer.name
        )


def _changed(answer: Answer) -> ArtifactChangedError:
    return ArtifactChangedError(f"{answer.name} was replaced or deleted while it was read.", model=answer.name)


# Checksums


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4)


_ALGORITHMS: dict[str, Any] = {"crc32": _Crc32, "sha1": hashlib.sha1}
"""CRC-32C and CRC-64/NVME are left out: in pure Python they would take longer than the download."""


class _Announced:
    """The checksum of an object as S3 has announced it."""

    def __init__(self, kind: str, expected: bytes, name: str) -> None:
        self._sum = _ALGORITHMS[kind]()
        self._kind = kind
        self._expected = expected
        self._name = name

    def update(self, chunk: bytes) -> None:
        self._sum.update(chunk)

    def check(self) -> None:
        got = self._sum.digest()
        if got != self._expected:
            raise StoreUnavailableError(
                f"{self._name} was damaged on its way: S3 announced the {self._kind} {self._expected.hex()}, "
                f"and the bytes have {got.hex()}.",
                model=self._name,
            )


def _announced(headers: Mapping[str, str], name: str) -> tuple[str | None, Checksum | None]:
    """Return the SHA-256 of the whole object, which the worker checks, or else what is checked on the way.

    The checksum of an object that was uploaded in parts may be one of their checksums: it says nothing of the bytes.
    """
    if headers.get("x-amz-checksum-type", "").upper() == "COMPOSITE":
        return None, None
    for kind in ("sha256", *_ALGORITHMS):
        if (expected := _decoded(headers.get(f"x-amz-checksum-{kind}", ""))) is not None:
            return (expected.hex(), None) if kind == "sha256" else (None, _Announced(kind, expected, name))
    return None, None


def _decoded(checksum: str) -> bytes | None:
    """Return the bytes of a checksum; None for "" and for one of parts, which ends with "-" and their number."""
    try:
        return base64.b64decode(checksum, validate=True) or None
    except binascii.Error:
        return None

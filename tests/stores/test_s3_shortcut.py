"""The requests that S3Store makes by the pattern of those that boto's client has made."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from modelcache import (
    Artifact,
    ModelNotFoundError,
    NotModified,
    S3Store,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from modelcache.stores.s3_shortcut import pattern_of
from servers import s3
from servers.fault_proxy import FaultProxy, answer, slow_down, stall

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servers.fault_proxy import Head
    from servers.s3 import Open

BOTO_ALONE = "amz-sdk-invocation-id"
"""A header field that boto's client sends, and the shortcut does not."""


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    return b"".join([chunk async for chunk in artifact.chunks])


def by_boto(proxy: FaultProxy) -> list[bool]:
    """Return, of each request, whether boto's client made it."""
    made = [BOTO_ALONE in request for request in proxy.requests]
    proxy.requests.clear()
    return made


def fields(request: Head) -> dict[str, str]:
    volatile = ("authorization", "x-amz-date", BOTO_ALONE, "amz-sdk-request")
    return {name.lower(): value for name, value in request.fields if name.lower() not in volatile}


async def test_boto_makes_the_first_request_alone(server: s3.S3Server, open_s3: Open) -> None:
    """Whatever the key, and with an ETag too; if a release of boto asks otherwise, this is where it shows."""
    keys = ["a.ubj", "b c/pläne+%~(1).ubj", "c.ubj"]
    bucket = s3.fill(server, {f"fo+l der/{key}": key.encode() for key in keys})
    async with FaultProxy(server.url) as proxy:
        store = open_s3(proxy, f"{bucket}/fo+l der")
        found = [await store.fetch(key) for key in keys]
        assert [await read(artifact) for artifact in found] == [key.encode() for key in keys]
        first, *others = map(fields, proxy.requests)
        assert all(other == first for other in others)
        held = found[0]
        assert isinstance(held, Artifact)
        assert await store.fetch(keys[0], if_version=held.version) == NotModified(held.version)
        assert await read(await store.fetch(keys[1], if_version=held.version)) == keys[1].encode()
        assert by_boto(proxy) == [True, False, False, False, False]
        revalidating = open_s3(proxy, f"{bucket}/fo+l der")
        for _ in range(2):
            assert await revalidating.fetch(keys[0], if_version=held.version) == NotModified(held.version)
        assert await read(await revalidating.fetch(keys[1])) == keys[1].encode()
        assert by_boto(proxy) == [True, False, False]


async def test_an_anonymous_request_is_repeated_unsigned(moto: s3.S3Server) -> None:
    """A public bucket is asked without credentials, the first time and later."""
    bucket = s3.fill(moto, {})
    moto.put(bucket, "a.ubj", b"one", ACL="public-read")
    async with FaultProxy(moto.url) as proxy:
        store = S3Store(f"s3://{bucket}?anonymous=true&endpoint_url={proxy.url}", manifest=None)
        for _ in range(2):
            assert await read(await store.fetch("a.ubj")) == b"one"
        assert [request.get("authorization") for request in proxy.requests] == [None, None]
        assert by_boto(proxy) == [True, False]
        await store.close()


async def test_credentials_are_asked_for_each_request(moto: s3.S3Server, open_s3: Open) -> None:
    """Those of a role are renewed while the store is open, and each request is signed with what is current."""
    bucket = s3.fill(moto, {"a.ubj": b"one"})
    async with FaultProxy(moto.url) as proxy:
        store = open_s3(proxy, bucket)
        await read(await store.fetch("a.ubj"))
        assert store._client is not None
        credentials: Any = store._client._shortcut._credentials
        credentials.access_key, credentials.secret_key, credentials.token = "AKIARENEWED", "renewed", "token"
        await read(await store.fetch("a.ubj"))
        renewed = proxy.requests[-1]
        assert "Credential=AKIARENEWED/" in str(renewed.get("authorization"))
        assert renewed.get("x-amz-security-token") == "token"
        assert by_boto(proxy) == [True, False]


async def test_the_pattern_follows_the_bucket_to_its_region(rclone: s3.S3Server, open_s3: Open) -> None:
    """Boto is told of another region by an answer, asks there, and later requests are signed for it, too."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        await read(await store.fetch("a.ubj"))
        elsewhere = b"<Error><Code>PermanentRedirect</Code><Message>Elsewhere.</Message></Error>"
        proxy.next(answer(301, elsewhere, x_amz_bucket_region="eu-west-3"))
        for _ in range(2):
            assert await read(await store.fetch("a.ubj")) == b"one"
        scopes = [str(request.get("authorization")).split("/")[2] for request in proxy.requests]
        assert scopes == ["us-east-1", "us-east-1", "eu-west-3", "eu-west-3"]
        assert by_boto(proxy) == [True, False, True, False]


async def test_what_goes_wrong_is_botos_first_attempt(rclone: s3.S3Server, open_s3: Open) -> None:
    """A refusal is not asked for twice."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        await read(await store.fetch("a.ubj"))
        for status, code, kind in (
            (403, "AccessDenied", StoreAccessDeniedError),
            (404, "NoSuchBucket", StoreError),
            (404, "", ModelNotFoundError),
        ):
            proxy.next(answer(status, f"<Error><Code>{code}</Code></Error>".encode()))
            with pytest.raises(kind, match=f"{status} {code}"):
                await store.fetch("a.ubj")
        assert by_boto(proxy) == [True, False, False, False]


async def test_what_is_not_there_is_said_in_the_same_words(server: s3.S3Server, open_s3: Open) -> None:
    """By one request, whether boto's client makes it or not."""
    bucket = s3.fill(server, {"a.ubj": b"one"})
    async with FaultProxy(server.url) as proxy:
        store, said = open_s3(proxy, bucket), []
        for _ in range(2):
            with pytest.raises(
                ModelNotFoundError, match=r"no model 'b\.ubj': s3://.* answered 404 NoSuchKey"
            ) as raised:
                await store.fetch("b.ubj")
            said.append(str(raised.value))
            assert await read(await store.fetch("a.ubj")) == b"one"
        assert by_boto(proxy) == [True, True, False, False]
        assert said[0] == said[1]


async def test_a_message_in_another_encoding_is_no_other_error(rclone: s3.S3Server, open_s3: Open) -> None:
    """A server that speaks no UTF-8 has no such model all the same."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        await read(await store.fetch("a.ubj"))
        said = "<Error><Code>NoSuchKey</Code><Message>Schlüssel fehlt</Message></Error>".encode("latin-1")
        proxy.next(answer(404, said))
        with pytest.raises(ModelNotFoundError):
            await store.fetch("a.ubj")


async def test_what_goes_well_pays_for_retries(rclone: s3.S3Server, open_s3: Open, pauses: list[float]) -> None:
    """An outage uses up boto's account for retries; the calls after it fill it, though boto does not make them."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        await read(await store.fetch("a.ubj"))
        proxy.next(slow_down(), times=None)
        retried = -1
        while len(pauses) > retried:
            retried = len(pauses)
            with pytest.raises(StoreUnavailableError):
                await store.fetch("a.ubj")
        proxy.clear()
        for _ in range(20):
            await read(await store.fetch("a.ubj"))
        proxy.next(slow_down())
        assert await read(await store.fetch("a.ubj")) == b"one"
        assert len(pauses) == retried + 1


async def test_one_that_is_cancelled_leaves_no_connection(rclone: s3.S3Server, open_s3: Open) -> None:
    """F11: while it waits for the answer."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        await read(await store.fetch("a.ubj"))
        waiting = stall()
        proxy.next(waiting)
        fetch = asyncio.create_task(store.fetch("a.ubj"))
        await waiting.reached.wait()
        fetch.cancel()
        await asyncio.wait([fetch])
        assert fetch.cancelled()
        assert by_boto(proxy) == [True, False]
        await proxy.quiet()


# What a pattern is taken from

KEY = "f o+o%/a~b('1')*.ubj"
URL = "https://bucket.s3.eu-west-3.amazonaws.com/f%20o%2Bo%25/a~b%28%271%27%29%2A.ubj"
KEYS = Credentials("AKIAIOSFODNN7EXAMPLE", "secret", "token")
NOTHING: Mapping[str, str] = {}


def signed(url: str = URL, more: Mapping[str, str] = NOTHING, *, credentials: Credentials = KEYS) -> Any:
    headers = {"User-Agent": "modelcache", "x-amz-checksum-mode": "ENABLED", **more}
    request = AWSRequest("GET", url, headers=headers)
    S3SigV4Auth(credentials, "s3", "eu-west-3").add_auth(request)
    return request.prepare()


def test_a_signature_is_botos_own() -> None:
    """In the path and in the host, with a token and without, with an ETag and without."""
    for url in (URL, "http://127.0.0.1:9000/bucket/" + URL.partition(".com/")[2]):
        for credentials in (KEYS, Credentials("AKIAIOSFODNN7EXAMPLE", "secret")):
            for more in (NOTHING, {"If-None-Match": '"e"'}):
                request = signed(url, more, credentials=credentials)
                assert pattern_of(request, KEY, credentials) is not None


@pytest.mark.parametrize(
    ("request_", "key", "credentials"),
    [
        (signed(), KEY, Credentials("AKIAIOSFODNN7EXAMPLE", "another", "token")),
        (signed(), KEY, Credentials("AKIAIOSFODNN7EXAMPLE", "secret")),
        (signed(), "b.ubj", KEYS),
        (signed(URL + "?versionId=3"), KEY, KEYS),
        (signed(more={"X-Amz-S3session-Token": "express"}), KEY, KEYS),
        (signed(more={"X-Amzn-Trace-Id": "Root=1"}), KEY, KEYS),
    ],
    ids=["another secret", "no token", "another key", "a query", "a session", "an unknown header"],
)
def test_what_is_not_understood_is_no_pattern(request_: Any, key: str, credentials: Credentials) -> None:
    """Boto's client goes on to make such requests."""
    assert pattern_of(request_, key, credentials) is None

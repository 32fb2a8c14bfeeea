"""S3Store, against two servers that have nothing to do with each other."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from anyio import to_thread

import zoo
from modelcache import (
    Artifact,
    ArtifactStore,
    ModelNotFoundError,
    NotModified,
    S3Store,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    __version__,
    open_store,
)
from modelcache.testing import check_store
from servers import s3
from servers.fault_proxy import FaultProxy, answer, rewrite

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from conftest import MakeRegistry
    from servers.s3 import Open


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    return b"".join([chunk async for chunk in artifact.chunks])


def paths(proxy: FaultProxy) -> list[str]:
    found = [request.target.partition("?")[0].rpartition("/")[2] for request in proxy.requests]
    proxy.requests.clear()
    return found


@pytest.mark.parametrize(("server", "folder"), [("rclone", "/some/folder/"), ("moto", "")], indirect=["server"])
async def test_it_keeps_the_contract(server: s3.S3Server, open_s3: Open, folder: str) -> None:
    """The suite that every store has to pass, with and without a folder in the bucket."""

    async def make(artifacts: Mapping[str, bytes]) -> ArtifactStore:
        placed = {f"{folder}{name}".removeprefix("/"): data for name, data in artifacts.items()}
        return open_s3(server, await to_thread.run_sync(s3.fill, server, placed) + folder)

    await check_store(make)


async def test_a_registry_serves_from_it(rclone: s3.S3Server, make_registry: MakeRegistry) -> None:
    """From the bucket to an answer, by URL; and nothing of the client is left when the registry is closed."""
    model, rows = zoo.model(), zoo.rows(3)
    bucket = s3.fill(rclone, {"models/m.tar.gz": model.targz, "models/n.ubj": model.ubj})
    store = open_store(f"s3://{bucket}/models?region=eu-west-1&endpoint_url={rclone.url}", **s3.KEYS)
    registry = await make_registry(store)
    for name in ("m", "n"):
        assert np.array_equal(await registry.predict(name, rows), model.expected(rows))
    assert f"s3://{bucket}/models 2 ready" in repr(registry)


# Names

ODD = ("with space", "pläne/日本", "a+b%20c", "100%", "a&b=c;d", "what?#", "~tilde'(1)!*", "two  spaces")


async def test_names_are_taken_as_they_are(server: s3.S3Server, open_s3: Open) -> None:
    """Nothing in a name or a folder means anything to the protocol."""
    store = open_s3(server, s3.fill(server, {f"f o+o%/{name}.ubj": name.encode() for name in ODD}) + "/f o+o%")
    for name in ODD:
        assert await read(await store.fetch(name)) == name.encode()
    assert sorted([name async for name in store.names()]) == sorted(ODD)
    assert [name async for name in store.names("with s")] == ["with space"]
    assert [name async for name in store.names("with space.u")] == []


async def test_a_known_name_is_one_request(rclone: s3.S3Server, open_s3: Open) -> None:
    """The suffix that answered, or was listed, is remembered; for a new name the likely one is asked for at once."""
    bucket = s3.fill(rclone, {"a.ubj": b"a", "b.ubj": b"b", "c.json": b"c", "both.json": b"1", "both.tar.gz": b"2"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        for name, asked in (
            ("a", ["a.tar.gz", "a.json", "a.ubj"]),  # in turn: the first, then the others at once
            ("a", ["a.ubj"]),
            ("b", ["b.tar.gz", "b.ubj"]),
            ("c", ["c.json", "c.tar.gz", "c.ubj"]),
            ("c", ["c.json"]),
        ):
            await read(await store.fetch(name))
            assert sorted(paths(proxy)) == sorted(asked)
        fresh = open_s3(proxy, bucket)
        assert [name async for name in fresh.names()] == ["a", "b", "both", "c"]
        paths(proxy)
        assert [await read(await fresh.fetch(name)) for name in ("a", "b", "both", "c")] == [b"a", b"b", b"2", b"c"]
        assert paths(proxy) == ["a.ubj", "b.ubj", "both.tar.gz", "c.json"]


async def test_a_server_is_told_who_asks(rclone: s3.S3Server, open_s3: Open) -> None:
    """Requests name modelcache and its version."""
    bucket = s3.fill(rclone, {"a.ubj": b"a"})
    async with FaultProxy(rclone.url) as proxy:
        await read(await open_s3(proxy, bucket).fetch("a.ubj"))
        (asked,) = proxy.requests
        assert str(asked.get("user-agent")).startswith(f"modelcache/{__version__} ")


async def test_a_remembered_suffix_that_is_gone_is_looked_for_again(rclone: s3.S3Server, open_s3: Open) -> None:
    """A model that is uploaded again in another form is found, and one that is deleted is not."""
    bucket = s3.fill(rclone, {"a.ubj": b"binary"})
    store = open_s3(rclone, bucket)
    assert await read(await store.fetch("a")) == b"binary"
    rclone.client.delete_object(Bucket=bucket, Key="a.ubj")
    rclone.put(bucket, "a.json", b"text")
    assert await read(await store.fetch("a")) == b"text"
    rclone.client.delete_object(Bucket=bucket, Key="a.json")
    with pytest.raises(ModelNotFoundError, match=r"no model 'a' in s3://bucket-\d+ \(looked for a\.tar\.gz, a\.ubj, a"):
        await store.fetch("a")


async def test_names_come_a_page_at_a_time(rclone: s3.S3Server, open_s3: Open) -> None:
    """The listing of a large bucket begins with its first page, and each name comes once."""
    bucket = rclone.make_bucket(s3.new_bucket())
    assert rclone.folder is not None
    folder = rclone.folder / bucket
    keys = [f"m{number:04}{suffix}" for number in range(350) for suffix in (".json", ".x.ubj", ".ubj")]
    for key in [*keys, "README.md"]:
        (folder / key).touch()
    async with FaultProxy(rclone.url) as proxy:
        names = open_s3(proxy, bucket).names()
        first = await anext(names)
        assert len(proxy.requests) == 1
        listed = [first, *[name async for name in names]]
        assert len(proxy.requests) == 2
    assert sorted(listed) == sorted({key.removesuffix(".json").removesuffix(".ubj") for key in keys})


# Versions


async def test_an_unchanged_object_is_not_sent(server: s3.S3Server, open_s3: Open) -> None:
    """Uploaded with the checksum that boto adds by default; with it aiobotocore's own check fails on a 304."""
    bucket = s3.fill(server, {"a.ubj": b"one"})
    store = open_s3(server, bucket)
    first = await store.fetch("a")
    assert await read(first) == b"one"
    assert isinstance(first, Artifact)
    assert first.version == hashlib.md5(b"one").hexdigest()
    assert await store.fetch("a", if_version=first.version) == NotModified(first.version)
    server.put(bucket, "a.ubj", b"two")
    assert await read(await store.fetch("a", if_version=first.version)) == b"two"


async def test_the_version_id_is_part_of_the_version(moto: s3.S3Server, open_s3: Open) -> None:
    """In a bucket with versions; the same bytes uploaded again are not sent again."""
    bucket = s3.fill(moto, {"a.ubj": b"one"}, versions=True)
    store = open_s3(moto, bucket)
    first = await store.fetch("a")
    assert isinstance(first, Artifact)
    etag, _, version_id = first.version.partition("@")
    assert etag == hashlib.md5(b"one").hexdigest()
    assert version_id
    await read(first)
    moto.put(bucket, "a.ubj", b"one")
    assert await store.fetch("a", if_version=first.version) == NotModified(first.version)


# Checksums

DATA = bytes(range(256)) * 100


def encoded(checksum: bytes) -> str:
    return base64.b64encode(checksum).decode()


CRC32 = encoded(zlib.crc32(DATA).to_bytes(4, "big"))
SHA1, SHA256 = encoded(hashlib.sha1(DATA).digest()), encoded(hashlib.sha256(DATA).digest())
WRONG = encoded(bytes(4))


async def test_announced_checksums_are_enforced(moto: s3.S3Server, open_s3: Open) -> None:
    """A4: of the whole object; a SHA-256 is left to the worker, and one of parts or in an unknown form says nothing."""
    bucket = s3.fill(moto, {"a.ubj": DATA})
    async with FaultProxy(moto.url) as proxy:
        store = open_s3(proxy, bucket)
        for announced in (
            {"crc32": CRC32}, {"sha1": SHA1}, {"sha256": SHA256, "crc32": WRONG}, {"crc32": WRONG + "-3"},
            {"crc32": WRONG, "type": "COMPOSITE"}, {"crc64nvme": WRONG}, {},
        ):  # fmt: skip
            fields = {"x-amz-checksum-crc32": None}
            proxy.next(rewrite(answer={**fields, **{f"x-amz-checksum-{k}": v for k, v in announced.items()}}))
            artifact = await store.fetch("a.ubj")
            assert isinstance(artifact, Artifact)
            assert artifact.digest == (hashlib.sha256(DATA).hexdigest() if "sha256" in announced else None)
            assert await read(artifact) == DATA
        for kind in ("crc32", "sha1"):
            proxy.next(rewrite(answer={"x-amz-checksum-crc32": None, f"x-amz-checksum-{kind}": WRONG}))
            with pytest.raises(StoreUnavailableError, match=f"a.ubj was damaged on its way: S3 announced the {kind}"):
                await read(await store.fetch("a.ubj"))


async def test_a_sha256_is_asked_for(moto: s3.S3Server, open_s3: Open) -> None:
    """S3 tells a checksum only to those who ask for it."""
    bucket = s3.fill(moto, {})
    moto.put(bucket, "a.ubj", DATA, ChecksumAlgorithm="SHA256")
    artifact = await open_s3(moto, bucket).fetch("a")
    assert isinstance(artifact, Artifact)
    assert artifact.digest == hashlib.sha256(DATA).hexdigest()
    await read(artifact)


# Errors


def refusal(code: str, message: str = "Reason.") -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


async def test_each_refusal_names_its_remedy(rclone: s3.S3Server, open_s3: Open) -> None:
    """S1: one request, a typed error, and what to do."""
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, "bucket")
        for status, code, kind, said in (
            (403, "AccessDenied", StoreAccessDeniedError, "s3:ListBucket on the bucket (without which S3 answers so"),
            (403, "", StoreAccessDeniedError, "Allow s3:GetObject"),
            (400, "ExpiredToken", StoreAccessDeniedError, "have expired: renew them"),
            (400, "InvalidToken", StoreAccessDeniedError, "check the keys, the profile"),
            (403, "InvalidAccessKeyId", StoreAccessDeniedError, "check the keys, the profile"),
            (403, "SignatureDoesNotMatch", StoreAccessDeniedError, "check the keys, the profile"),
            (403, "RequestTimeTooSkewed", StoreAccessDeniedError, "Set the clock"),
            (404, "NoSuchBucket", StoreError, "Check its name, endpoint_url"),
            (301, "PermanentRedirect", StoreError, "name it by region="),
            (403, "InvalidObjectState", StoreError, "restore it"),
            (400, "InvalidRequest", StoreError, "s3://bucket answered 400 InvalidRequest, 'Reason'."),
            (404, "NoSuchKey", ModelNotFoundError, "no model 'a.ubj'"),
            (400, "KeyTooLongError", ModelNotFoundError, "no model 'a.ubj'"),
        ):
            refused = answer(status, refusal(code), Content_Type="application/xml")
            proxy.next(refused, when=lambda request: request.method == "GET", times=None)
            with pytest.raises(kind) as raised:
                await store.fetch("a.ubj")
            proxy.clear()
            assert type(raised.value) is kind
            assert said in str(raised.value)
            assert raised.value.model == "a.ubj"
        with pytest.raises(StoreError, match=r"404 NoSuchBucket"):
            await anext(open_s3(rclone, "no-such-bucket").names())


async def test_a_missing_name_may_be_answered_by_a_refusal(rclone: s3.S3Server, open_s3: Open) -> None:
    """Without s3:ListBucket what is not there is refused: the suffix that is there is found all the same."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        proxy.next(answer(403, refusal("AccessDenied")), when=lambda request: ".ubj" not in request.target, times=None)
        store = open_s3(proxy, bucket)
        assert await read(await store.fetch("a")) == b"one"
        with pytest.raises(StoreAccessDeniedError, match="Allow s3:GetObject"):
            await store.fetch("b")


async def test_a_server_that_is_not_there_is_named(open_s3: Open) -> None:
    """S1: nobody listens; the error may pass, and says where it was looked for."""
    store = S3Store("s3://bucket?endpoint_url=http://127.0.0.1:9", attempts=1, **s3.KEYS)
    with pytest.raises(StoreUnavailableError, match=r"connection to http://127\.0\.0\.1:9 failed.*Check endpoint_url"):
        await store.fetch("a")
    await store.close()


# Opening

WHERE = "endpoint_url=http://127.0.0.1:9000"


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An account in which nothing of Amazon is configured."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


async def test_credentials_come_by_the_standard_chain(rclone: s3.S3Server, clean_environment: Path) -> None:
    """From a profile; without any, or with a profile that is not there, the error says what to set, until it is set."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    store = S3Store(f"s3://{bucket}?endpoint_url={rclone.url}")
    with pytest.raises(StoreAccessDeniedError, match=r"no credentials for s3://.*Set AWS_PROFILE"):
        await store.fetch("a")
    keys = f"aws_access_key_id={s3.ACCESS_KEY}\naws_secret_access_key={s3.SECRET_KEY}\n"
    (clean_environment / "credentials").write_text(f"[default]\n{keys}")
    assert await read(await store.fetch("a")) == b"one"
    await store.close()
    with pytest.raises(StoreAccessDeniedError, match="nobody"):
        await S3Store(f"s3://{bucket}?profile=nobody").fetch("a")


async def test_a_role_is_assumed_when_the_client_is_made(
    moto: s3.S3Server, open_s3: Open, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile with a role is asked of the token service, and what blocks in that is done in a thread."""
    bucket = s3.fill(moto, {"a.ubj": b"one"})
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)
    role = "role_arn=arn:aws:iam::123456789012:role/reader\ncredential_source=Environment\nregion=us-east-1\n"
    (clean_environment / "config").write_text(f"[profile reader]\n{role}")
    store = open_s3(moto, bucket, profile="reader", access_key_id=None, secret_access_key=None)
    assert await read(await store.fetch("a.ubj")) == b"one"
    assert store._client is not None
    credentials = store._client._client._request_signer._credentials
    assert credentials.method == "assume-role"
    assert not credentials.refresh_needed(refresh_in=0)


def test_a_store_is_named_without_its_credentials(monkeypatch: pytest.MonkeyPatch, clean_environment: Path) -> None:
    """``url`` tells stores apart, ``repr`` is for people; neither has anything that lets one in."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000/")
    for url in ("s3://b/f", "s3://b/f/", f"s3://b/f?{WHERE}", "s3://b/f?region=eu-west-1&anonymous=true"):
        store = S3Store(url, **s3.KEYS)
        assert (store.url, repr(store)) == (f"s3://b/f?{WHERE}", "s3://b/f")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert (S3Store("s3://b/").url, repr(S3Store("s3://b/"))) == ("s3://b", "s3://b")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3:///folder", "names no bucket"),
        ("bucket", "names no bucket"),
        ("s3://KEY:SECRET@bucket", "Keep credentials out of the URL"),
        ("s3://bucket?secret_access_key=SECRET", "no option secret_access_key, only endpoint_url, region"),
        ("s3://bucket?path_style=perhaps", "write true or false"),
        ("s3://bucket?endpoint_url=localhost:9000", "http://host:port"),
        ("s3://bucket?endpoint_url=http://KEY:SECRET@host", "http://host:port"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, said: str) -> None:
    """When the store is made, and no message repeats a secret."""
    with pytest.raises(StoreError, match=said) as raised:
        S3Store(url)
    assert "SECRET" not in str(raised.value)


async def test_the_bucket_is_in_the_path_of_an_endpoint_with_a_name(rclone: s3.S3Server, open_s3: Open) -> None:
    """Few servers have a host name for each bucket; whoever has one that needs it says ``path_style=false``."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        named = proxy.url.replace("127.0.0.1", "localhost")
        store = open_s3(proxy, bucket, endpoint_url=named)
        assert await read(await store.fetch("a.ubj")) == b"one"
        assert proxy.requests[-1].target == f"/{bucket}/a.ubj"
        other = open_s3(proxy, f"{bucket}?path_style=false", endpoint_url=named, attempts=1)
        with suppress(StoreError):  # such a name may resolve, and rclone answers then
            await read(await other.fetch("a.ubj"))
        assert other._client is not None
        assert other._client._client.meta.config.s3 == {"addressing_style": "virtual"}


async def test_a_public_bucket_needs_no_credentials(moto: s3.S3Server, clean_environment: Path) -> None:
    """``anonymous`` signs nothing, and looks for no credentials."""
    bucket = s3.fill(moto, {})
    moto.put(bucket, "a.ubj", b"one", ACL="public-read")
    async with FaultProxy(moto.url) as proxy:
        store = S3Store(f"s3://{bucket}?anonymous=true&endpoint_url={proxy.url}", manifest=None)
        assert await read(await store.fetch("a.ubj")) == b"one"
        assert [request.get("authorization") for request in proxy.requests] == [None]
        await store.close()


async def test_a_bucket_that_can_have_no_such_name_is_refused(open_s3: Open, rclone: s3.S3Server) -> None:
    """Before any request."""
    with pytest.raises(StoreError, match="Check the name of the bucket"):
        await open_s3(rclone, "no bucket").fetch("a.ubj")


async def test_one_client_is_made_and_made_again_after_close(rclone: s3.S3Server, open_s3: Open) -> None:
    """First fetches that come together share it; a call after close makes a new one."""
    bucket = s3.fill(rclone, {"a.ubj": b"one"})
    async with FaultProxy(rclone.url) as proxy:
        store = open_s3(proxy, bucket)
        given_up = asyncio.create_task(store.fetch("a.ubj"))
        await asyncio.sleep(0)
        fetches = [asyncio.create_task(store.fetch("a.ubj")) for _ in range(4)]
        await asyncio.sleep(0)
        given_up.cancel()
        assert [await read(await fetch) for fetch in fetches] == [b"one"] * 4
        assert given_up.cancelled()
        client = store._client
        await read(await store.fetch("a.ubj"))
        assert store._client is client
        await store.close()
        await store.close()
        await proxy.quiet()
        assert await read(await store.fetch("a.ubj")) == b"one"


def test_boto_is_imported_when_a_store_is_opened() -> None:
    """Neither importing nor making a store costs what boto costs."""
    code = "import modelcache, sys, json; modelcache.S3Store('s3://b'); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert imported & {"aiobotocore", "botocore", "boto3", "aiohttp"} == set()

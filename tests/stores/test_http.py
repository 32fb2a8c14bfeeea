"""HTTPStore: files on a web server; faults are made at the wire, between it and a real nginx."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import zlib
from contextlib import aclosing
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from anyio import to_thread

import oracle
import zoo
from conftest import settle
from modelcache import (
    Artifact,
    ArtifactChangedError,
    ArtifactStore,
    HTTPStore,
    MissingDependencyError,
    ModelNotFoundError,
    NotModified,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    open_store,
)
from modelcache.stores.backoff import Backoff
from modelcache.testing import check_store
from servers import nginx
from servers.fault_proxy import FaultProxy, answer, call, cut, rewrite, slow_down, stall, truncate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    from conftest import MakeRegistry

    MakeStore = Callable[..., HTTPStore]

DATA = bytes(range(256)) * 2000
OTHER = DATA[::-1]
EARLIER = (1_500_000_000, 1_500_000_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nginx.Nginx]:
    with nginx.serving(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(autouse=True)
def folder(server: nginx.Nginx) -> Path:
    """What is served, empty but for a.ubj."""
    shutil.rmtree(server.root)
    server.root.mkdir()
    write(server.root / "a.ubj", DATA)
    return server.root


@pytest.fixture
async def proxy(server: nginx.Nginx) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
async def pauses() -> list[float]:
    """The seconds that stores would have paused."""
    return []


@pytest.fixture
async def make_store(proxy: FaultProxy, pauses: list[float]) -> AsyncIterator[MakeStore]:
    """Make stores at the proxy; when they are closed no connection, descriptor or task is left."""
    made: list[HTTPStore] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    def make(path: str = "/", *, url: str = proxy.url, **options: Any) -> HTTPStore:
        store = HTTPStore(url + path, **{"manifest": None, **options})
        store._options = replace(store._options, backoff=Backoff(draw=lambda: 1.0, pause=pause))
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()
    await proxy.quiet()


def write(file: Path, data: bytes) -> None:
    """Write a file of the past, so that what is written next has another time."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    os.utime(file, EARLIER)


def replace_with(file: Path, data: bytes) -> Callable[[], None]:
    def change() -> None:
        file.with_name("new").write_bytes(data)
        file.with_name("new").rename(file)

    return change


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    chunks: Any = artifact.chunks
    async with aclosing(chunks):
        return b"".join([chunk async for chunk in chunks])


# The contract


@pytest.mark.parametrize("location", ["", "dated/", "rangeless/", "gzip/", "moved/"])
async def test_it_keeps_the_contract(server: nginx.Nginx, make_store: MakeStore, location: str) -> None:
    """The suite that every store has to pass, at servers that lack one thing or another."""

    def fill(artifacts: Mapping[str, bytes]) -> None:
        for name, data in artifacts.items():
            write(server.root / "contract" / name, data)
        (server.root / "contract" / "index.json").write_text(json.dumps(list(artifacts)))

    async def make(artifacts: Mapping[str, bytes]) -> ArtifactStore:
        await to_thread.run_sync(fill, artifacts)
        return make_store(f"/{location}contract/", index="index.json")

    await check_store(make)


async def test_requests_share_connections(proxy: FaultProxy, make_store: MakeStore, folder: Path) -> None:
    """One session, opened by the first call: what was read, not there or not modified leaves a connection to use."""
    store = make_store()
    assert proxy.connections == 0
    for _ in range(3):
        artifact = await store.fetch("a")
        assert await read(artifact) == DATA
        with pytest.raises(ModelNotFoundError):
            await store.fetch("missing")
        await store.fetch("a", if_version=artifact.version)
    assert proxy.connections == 1
    await store.close()
    assert await read(await store.fetch("a")) == DATA, "a store may be used again after it was closed"


async def test_first_calls_open_one_session(proxy: FaultProxy, make_store: MakeStore, folder: Path) -> None:
    """Many calls at once on a new store share what the first of them opens, and leave nothing of it."""
    descriptors = oracle.open_descriptors()
    store = make_store(max_connections=4)
    fetched = await asyncio.gather(*(store.fetch("a") for _ in range(4)))
    assert {len(await read(artifact)) for artifact in fetched} == {len(DATA)}
    assert proxy.connections == 4
    await store.close()
    await proxy.quiet()
    await asyncio.sleep(0)
    assert oracle.open_descriptors() == descriptors


async def test_close_during_the_first_call_leaves_no_session(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being opened is closed, too, and whoever opened it is told; later calls open another."""
    client = await to_thread.run_sync(import_module, "modelcache.stores.http_client")
    environment, is_opening, goes_on = client._of_environment, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(options: Any) -> Any:
        loop.call_soon_threadsafe(is_opening.set)
        goes_on.wait()
        return environment(options)

    monkeypatch.setattr(client, "_of_environment", wait)
    store = make_store()
    fetching = asyncio.create_task(store.fetch("a"))
    await is_opening.wait()
    closing = asyncio.create_task(store.close())
    await settle()
    goes_on.set()
    await asyncio.wait((fetching, closing))
    assert store._client is None, "nobody would close it"
    with pytest.raises(StoreError, match="was closed"):
        await fetching
    await proxy.quiet()
    assert await read(await store.fetch("a")) == DATA


@pytest.mark.parametrize("begun", [False, True])
async def test_an_artifact_that_is_given_up_holds_no_connection(
    proxy: FaultProxy, make_store: MakeStore, begun: bool
) -> None:
    """aclose() ends a download at once, whether or not anything was read."""
    proxy.next(stall(after=1000))
    artifact = await make_store().fetch("a")
    assert isinstance(artifact, Artifact)
    chunks: Any = artifact.chunks
    if begun:
        await anext(chunks)
    assert proxy.open_connections == 1
    await chunks.aclose()
    await proxy.quiet()


@pytest.mark.parametrize("fault", [stall(), stall(after=1000)])
async def test_a_call_that_is_cancelled_holds_no_connection(
    proxy: FaultProxy, make_store: MakeStore, fault: stall
) -> None:
    """Before there is an answer, and in the middle of one."""
    store = make_store()
    proxy.next(fault)

    async def fetch_and_read() -> None:
        await read(await store.fetch("a.ubj"))

    call = asyncio.create_task(fetch_and_read())
    await fault.reached.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await proxy.quiet()


async def test_a_registry_serves_from_it(proxy: FaultProxy, folder: Path, make_registry: MakeRegistry) -> None:
    """A4: a model that is replaced in the middle of its download is loaded again, and answers as the new one."""
    old, new = zoo.model(trees=3, seed=1), zoo.model(trees=4, seed=2)
    await to_thread.run_sync(write, folder / "m.ubj", old.ubj)
    proxy.next(cut(after=1000), when=lambda request: request.target == "/m.ubj")
    proxy.next(call(replace_with(folder / "m.ubj", new.ubj)), when=lambda request: "range" in request)
    registry = await make_registry(open_store(proxy.url, manifest=None))
    assert np.array_equal(await registry.predict("m", zoo.rows(3)), new.expected(zoo.rows(3)))
    assert registry.stats().load_failures == 0
    assert proxy.url in repr(registry)


# Names


async def test_names_are_encoded_segment_by_segment(proxy: FaultProxy, make_store: MakeStore, folder: Path) -> None:
    """No character of a name means anything to HTTP."""
    name = "tenant a/100%_ü?x=1#y+z;~:@"
    write(folder / f"{name}.ubj", b"one")
    assert await read(await make_store().fetch(name + ".ubj")) == b"one"
    assert proxy.requests[0].target == "/tenant%20a/100%25_%C3%BC%3Fx%3D1%23y%2Bz%3B~%3A%40.ubj"


async def test_the_suffix_that_answered_is_remembered(proxy: FaultProxy, make_store: MakeStore, folder: Path) -> None:
    """It is asked for first as long as its file is there; else the others are, in their order."""
    store = make_store()
    for _ in range(2):
        await read(await store.fetch("a"))
    assert [request.target for request in proxy.requests] == ["/a.tar.gz", "/a.ubj", "/a.ubj"]
    (folder / "a.ubj").rename(folder / "a.json")
    assert await read(await store.fetch("a")) == DATA
    with pytest.raises(ModelNotFoundError, match=r"no model 'b' at .* \(looked for b\.tar\.gz, b\.ubj, b\.json\)"):
        await store.fetch("b")


@pytest.mark.parametrize(
    "index",
    [
        b'["b.ubj", "a.tar.gz", "a.ubj", "x/c", "../d", "e.ubj.json"]',
        b"\xef\xbb\xbfb\r\na.ubj\n\nx/c.json\n/d\na\ne.ubj.json",
    ],
)
async def test_an_index_lists_the_names(make_store: MakeStore, folder: Path, index: bytes) -> None:
    """A JSON list or lines, with suffixes or without: sorted, each name once, and none that no call could ask for."""
    write(folder / "list of models", index)
    store = make_store(index="list of models")
    assert [name async for name in store.names()] == ["a", "b", "e.ubj.json", "x/c"]
    assert [name async for name in store.names("x/")] == ["x/c"]


@pytest.mark.parametrize(
    ("options", "index", "message"),
    [
        ({}, None, r'cannot be listed: .* HTTPStore\(url, index="index.json"\)'),
        ({"index": "i"}, None, "There is no index i at http://"),
        ({"index": "i"}, b"[1]", "is a JSON list, but not of names"),
        ({"index": "i"}, b'["a"', "neither a JSON list of names nor"),
        ({"index": "i"}, b"\xff", "neither a JSON list of names nor"),
        ({"index": "i"}, b"[" * 100_000, "neither a JSON list of names nor"),
        ({"index": "i"}, b"a\n" * 60_000, "The index i at .* is larger than 100,000 bytes"),
    ],
)
async def test_a_listing_that_cannot_be_made(
    make_store: MakeStore, folder: Path, *, options: dict[str, str], index: bytes | None, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without an index, or with one that is none, names() says what to do; it never is of any size."""
    monkeypatch.setattr("modelcache.stores.http._INDEX_LIMIT", 100_000)
    if index is not None:
        write(folder / "i", index)
    with pytest.raises(StoreError, match=message):
        _ = [name async for name in make_store(**options).names()]


async def test_the_digest_of_an_index_is_enforced(proxy: FaultProxy, make_store: MakeStore, folder: Path) -> None:
    """A list that was cut short is no list of all names."""
    write(folder / "i", b"a\nb\n")
    digest = base64.b64encode(hashlib.sha256(b"a\nb\n").digest()).decode()
    proxy.next(rewrite(answer={"Repr-Digest": f"sha-256=:{digest}:"}), truncate(to=2))
    store = make_store(index="i")
    with pytest.raises(StoreUnavailableError, match="The index has another SHA-256 than the server announced"):
        _ = [name async for name in store.names()]
    proxy.next(rewrite(answer={"Repr-Digest": f"sha-256=:{digest}:"}))
    assert [name async for name in store.names()] == ["a", "b"]


# Versions


@pytest.mark.parametrize(("location", "field"), [("/", "if-none-match"), ("/dated/", "if-modified-since")])
async def test_what_is_unchanged_is_not_sent(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, location: str, field: str
) -> None:
    """The ETag is the version, else the time with the length; what is another version is sent."""
    store = make_store(location)
    first = await store.fetch("a.ubj")
    await read(first)
    assert await store.fetch("a.ubj", if_version=first.version) == NotModified(first.version)
    await to_thread.run_sync(replace_with(folder / "a.ubj", OTHER))
    second = await store.fetch("a.ubj", if_version=first.version)
    assert await read(second) == OTHER
    assert second.version != first.version
    assert proxy.statuses == [200, 304, 200]
    assert [field in request for request in proxy.requests] == [False, True, True]


async def test_a_weak_etag_is_good_enough_to_revalidate(proxy: FaultProxy, make_store: MakeStore) -> None:
    """It says that nothing of importance has changed, but not that the bytes are the same: no range is asked for."""
    store = make_store()
    proxy.next(rewrite(answer={"ETag": 'W/"1"'}), cut(after=1000))
    artifact = await store.fetch("a.ubj")
    assert artifact.version == 'W/"1"'
    with pytest.raises(ArtifactChangedError, match=r"broke off at byte 1,000 and cannot go on: .* no strong ETag"):
        await read(artifact)
    proxy.next(answer(304), when=lambda request: request.get("if-none-match") == 'W/"1"')
    assert await store.fetch("a.ubj", if_version='W/"1"') == NotModified('W/"1"')
    assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    "validator",
    [
        {"ETag": '"1"'},
        {"ETag": 'W/"1"'},
        {"Repr-Digest": "sha-256=:" + base64.b64encode(hashlib.sha256(DATA).digest()).decode() + ":"},
    ],
)
async def test_a_server_that_never_says_not_modified(
    proxy: FaultProxy, make_store: MakeStore, validator: dict[str, str]
) -> None:
    """If it sends the same version again, it is not read again."""
    proxy.next(
        rewrite(request={"If-None-Match": None}, answer={"Last-Modified": None, "ETag": None, **validator}), times=None
    )
    store = make_store()
    artifact = await store.fetch("a")
    assert await read(artifact) == DATA
    assert await store.fetch("a", if_version=artifact.version) == NotModified(artifact.version)


async def test_without_a_validator_each_fetch_is_another_version(proxy: FaultProxy, make_store: MakeStore) -> None:
    """Nothing can say that the bytes are the same, so nothing is ever said to be."""
    store = make_store("/undated/")
    first = await store.fetch("a")
    second = await store.fetch("a", if_version=first.version)
    assert await read(first) == await read(second) == DATA
    assert first.version != second.version


# Downloads that break


@pytest.mark.parametrize("fault", [cut(after=100_000), cut(after=100_000, reset=True)])
async def test_a_download_that_breaks_goes_on_where_it_broke(
    proxy: FaultProxy, make_store: MakeStore, fault: cut, pauses: list[float]
) -> None:
    """S5: with a Range, if the ETag still holds; no byte is missing, or delivered twice."""
    proxy.next(fault)
    proxy.next(cut(after=100_000), when=lambda request: "range" in request)
    artifact = await make_store().fetch("a.ubj")
    assert await read(artifact) == DATA
    assert proxy.statuses == [200, 206, 206]
    assert all(request.get("if-range") == artifact.version for request in proxy.requests[1:])
    assert pauses == [0.1, 0.1], "the bytes between two breaks show that it is worth going on"


async def test_a_download_that_stalls_goes_on(proxy: FaultProxy, make_store: MakeStore) -> None:
    """S1: a connection on which nothing comes for read_timeout is given up."""
    proxy.next(stall(after=100_000))
    assert await read(await make_store(read_timeout=0.1).fetch("a.ubj")) == DATA
    assert proxy.statuses == [200, 206]


async def test_a_server_without_ranges_is_read_as_far_again(proxy: FaultProxy, make_store: MakeStore) -> None:
    """It answers with the whole file, which has the same ETag: what was delivered is skipped."""
    proxy.next(cut(after=100_000))
    assert await read(await make_store("/rangeless/").fetch("a.ubj")) == DATA
    assert proxy.statuses == [200, 200]


@pytest.mark.parametrize("location", ["/", "/dated/"])
async def test_a_download_that_breaks_before_its_first_byte_is_made_again(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, location: str
) -> None:
    """Nothing has been delivered, so any validator will do; but it is the version that was announced, or an error."""
    store = make_store(location)
    proxy.next(cut(after=0))
    assert await read(await store.fetch("a.ubj")) == DATA
    assert [request.get("range") for request in proxy.requests] == [None, None]
    proxy.next(cut(after=0))
    artifact = await store.fetch("a.ubj")
    await to_thread.run_sync(replace_with(folder / "a.ubj", OTHER))
    with pytest.raises(ArtifactChangedError):
        await read(artifact)


@pytest.mark.parametrize("location", ["/", "/rangeless/"])
async def test_an_object_that_changes_between_two_ranges_is_not_mixed(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, location: str
) -> None:
    """A4: the rest of another version is never appended."""
    proxy.next(cut(after=100_000))
    proxy.next(call(replace_with(folder / "a.ubj", OTHER)))
    store = make_store(location)
    artifact = await store.fetch("a.ubj")
    with pytest.raises(ArtifactChangedError, match=r"a\.ubj was replaced while it was downloaded") as caught:
        await read(artifact)
    assert caught.value.model == "a.ubj"
    assert await read(await store.fetch("a.ubj")) == OTHER


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (answer(416), ArtifactChangedError, "was replaced while it was downloaded"),
        (answer(404), ModelNotFoundError, "The server answered 404"),
        (answer(403), StoreAccessDeniedError, "The server answered 403"),
        (rewrite(answer={"ETag": '"another"'}), ArtifactChangedError, "was replaced while it was downloaded"),
        (rewrite(answer={"ETag": None}), ArtifactChangedError, "was replaced while it was downloaded"),
        (rewrite(answer={"Content-Range": "bytes 100001-5/6"}), StoreUnavailableError, "sends something else"),
        (rewrite(answer={"Content-Range": None}), StoreUnavailableError, "sends something else"),
        (rewrite(answer={"Content-Encoding": "gzip"}), StoreUnavailableError, "sends something else"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_not_the_rest_is_not_taken_for_it(
    proxy: FaultProxy, make_store: MakeStore, fault: answer | rewrite, kind: type[Exception], message: str
) -> None:
    """Whatever a server says to a request for the rest, it is the rest of this version or an error."""
    proxy.next(cut(after=100_000))
    proxy.next(fault)
    artifact = await make_store().fetch("a.ubj")
    with pytest.raises(kind, match=message) as caught:
        await read(artifact)
    assert type(caught.value) is kind


async def test_a_download_that_always_breaks_fails(
    proxy: FaultProxy, make_store: MakeStore, pauses: list[float]
) -> None:
    """S1: tries end, with an error that says how far it came."""
    proxy.next(cut(after=100_000))
    proxy.next(cut(after=0), times=None)
    artifact = await make_store().fetch("a.ubj")
    with pytest.raises(StoreUnavailableError, match=r"a\.ubj broke off at byte 100,000 of 512,000, 5 times in a row"):
        await read(artifact)
    assert pauses == [0.1, 0.2, 0.4, 0.8]


async def test_a_length_is_enforced(proxy: FaultProxy, make_store: MakeStore) -> None:
    """An answer that ends before the announced length is a broken one; what comes after it is not read."""
    proxy.next(rewrite(answer={"Content-Length": "600000"}), cut(after=len(DATA)))
    artifact = await make_store().fetch("a.ubj")
    assert isinstance(artifact, Artifact)
    assert artifact.size == 600_000
    with pytest.raises(StoreUnavailableError):
        await read(artifact)
    assert proxy.requests[1].get("range") == "bytes=512000-599999"


@pytest.mark.parametrize("field", ["Repr-Digest", "Content-Digest", "Digest"])
async def test_an_announced_digest_is_the_artifacts(proxy: FaultProxy, make_store: MakeStore, field: str) -> None:
    """A2, A4: it goes to the worker, which enforces it: a truncation that looks complete is found."""
    digest = hashlib.sha256(DATA)
    encoded = base64.b64encode(digest.digest()).decode()
    value = f"md5=abc, SHA-256={encoded}" if field == "Digest" else f"sha-512=:aa:, sha-256=:{encoded}:"
    proxy.next(rewrite(answer={field: value}), truncate(to=1000))
    artifact = await make_store().fetch("a.ubj")
    assert isinstance(artifact, Artifact)
    assert artifact.digest == digest.hexdigest()
    assert await read(artifact) == DATA[:1000]


@pytest.mark.parametrize("value", ["sha-256=:%%%:", "sha-256=:YWJj:"])
async def test_a_digest_that_is_none_is_an_error(proxy: FaultProxy, make_store: MakeStore, value: str) -> None:
    """What cannot be enforced is not passed over, and holds no connection."""
    proxy.next(rewrite(answer={"Repr-Digest": value}))
    store = make_store()
    with pytest.raises(StoreError, match="announced the"):
        await store.fetch("a.ubj")
    await proxy.quiet()


# Compression


async def test_it_asks_for_the_bytes_as_they_are(proxy: FaultProxy, make_store: MakeStore) -> None:
    """A server that would compress for others has no reason to."""
    artifact = await make_store("/gzip/").fetch("a.ubj")
    assert isinstance(artifact, Artifact)
    assert artifact.size == len(DATA)
    assert proxy.requests[0].get("accept-encoding") == "identity"
    assert await read(artifact) == DATA


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    "packed",
    [gzip.compress(DATA), gzip.compress(DATA[:1000]) + gzip.compress(DATA[1000:]), gzip.compress(bytes(10 << 20))],
)
async def test_what_is_compressed_anyway_is_decompressed(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, packed: bytes, broken: bool
) -> None:
    """In bounded pieces, and of unknown size: the announced length is of the compressed bytes."""
    write(folder / "b.ubj.gz", packed)
    digest = base64.b64encode(hashlib.sha256(packed).digest()).decode()
    proxy.next(rewrite(answer={"Repr-Digest": f"sha-256=:{digest}:"}), *([cut(after=500)] if broken else []))
    artifact = await make_store("/packed/").fetch("b.ubj")
    assert isinstance(artifact, Artifact)
    assert (artifact.size, artifact.digest) == (None, None)
    chunks = [chunk async for chunk in artifact.chunks]
    assert b"".join(chunks) == gzip.decompress(packed)
    assert max(map(len, chunks)) <= 256 << 10


@pytest.mark.parametrize(("coding", "pack"), [("x-gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_other_names_of_what_can_be_undone(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, coding: str, pack: Callable[[bytes], bytes]
) -> None:
    """Both registered forms of DEFLATE are undone."""
    write(folder / "b.ubj", pack(DATA))
    proxy.next(rewrite(answer={"Content-Encoding": f"identity, {coding.upper()}"}))
    assert await read(await make_store().fetch("b.ubj")) == DATA


@pytest.mark.parametrize("nested", [False, True])
async def test_an_archive_stays_an_archive(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, nested: bool
) -> None:
    """Some servers announce the compression that is the file's own: only one that was added is undone."""
    archive = gzip.compress(b"pretend to be tar" * 50_000)
    write(folder / "b.tar.gz", gzip.compress(archive) if nested else archive)
    proxy.next(rewrite(answer={"Content-Encoding": "gzip"}))
    assert await read(await make_store().fetch("b")) == archive


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        (gzip.compress(DATA)[:-20], {"Content-Encoding": "gzip"}, "what it sent ends in the middle"),
        (DATA, {"Content-Encoding": "gzip"}, "says that it compresses, and sends something else"),
        (DATA, {"Content-Encoding": "br"}, "compresses b.ubj by br, although it was asked not to"),
        (DATA, {"Content-Encoding": "gzip, gzip"}, "compresses b.ubj by gzip, gzip"),
        (gzip.compress(DATA), {"Content-Encoding": "gzip", "Digest": "sha-256=YWJj"}, "and announced 616263"),
    ],
)
async def test_compression_that_cannot_be_undone(
    proxy: FaultProxy, make_store: MakeStore, folder: Path, *, data: bytes, fields: dict[str, str | None], message: str
) -> None:
    """Damaged, unknown or not what was announced: an error, and never a part."""
    write(folder / "b.ubj", data)
    proxy.next(rewrite(answer=fields))
    store = make_store()
    with pytest.raises(StoreError, match=message):
        await read(await store.fetch("b.ubj"))


# Redirects


async def test_redirects_within_the_origin_are_followed(proxy: FaultProxy, make_store: MakeStore) -> None:
    """With the credentials, since they lead to the same server."""
    store = make_store("/moved/private/", auth=(nginx.USER, nginx.PASSWORD))
    assert await read(await store.fetch("a.ubj")) == DATA
    assert proxy.statuses == [302, 200]
    assert proxy.requests[0].get("authorization") == proxy.requests[1].get("authorization")


async def test_a_redirect_brings_no_credentials(proxy: FaultProxy, make_store: MakeStore) -> None:
    """Whatever login a Location has: the store's own is sent to its own server, and no other anywhere."""
    proxy.next(answer(302, Location=proxy.url.replace("http://", "http://other:login@") + "/private/a.ubj"))
    store = make_store(auth=(nginx.USER, nginx.PASSWORD))
    assert await read(await store.fetch("a.ubj")) == DATA


async def test_redirects_to_elsewhere_are_refused(
    server: nginx.Nginx, proxy: FaultProxy, make_store: MakeStore
) -> None:
    """S5: another port is another origin; nothing is sent there."""
    async with FaultProxy(server.url) as elsewhere:
        port = elsewhere.url.rpartition(":")[2]
        with pytest.raises(
            StoreAccessDeniedError, match=rf"redirects to {elsewhere.url}: allow it by .*redirect_origins"
        ):
            await make_store(f"/away/{port}/").fetch("a.ubj")
        assert elsewhere.connections == 0


async def test_redirects_to_elsewhere_take_no_credentials(
    server: nginx.Nginx, proxy: FaultProxy, make_store: MakeStore
) -> None:
    """S5: where they are allowed, neither auth nor a header of the store's goes along, but what the download needs."""
    async with FaultProxy(server.url) as elsewhere:
        port = elsewhere.url.rpartition(":")[2]
        store = make_store(
            f"/away/{port}/",
            auth=("user", "secret"),
            headers={"X-Token": "t"},
            redirect_origins=[elsewhere.url + "/x/"],
        )
        elsewhere.next(cut(after=100_000))
        artifact = await store.fetch("a.ubj")
        assert await read(artifact) == DATA
        assert isinstance(await store.fetch("a.ubj", if_version=artifact.version), NotModified)
        assert elsewhere.statuses == [200, 206, 304]
        assert all("authorization" in request and "x-token" in request for request in proxy.requests)
        assert not any("authorization" in request or "x-token" in request for request in elsewhere.requests)
        await store.close()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://user:pw@[", "which is no URL"),
        ("ftp://host/a.ubj", "redirects to ftp://host"),
        ("mailto:x", "which is no URL"),
        ("/a.ubj", "redirects in a circle"),
    ],
)
async def test_redirects_to_nowhere(proxy: FaultProxy, make_store: MakeStore, location: str, message: str) -> None:
    """A Location that is no place, or always the same one, ends in an error."""
    proxy.next(answer(302, Location=location), times=None)
    with pytest.raises(StoreError, match=message):
        await make_store().fetch("a.ubj")


# Credentials


async def test_credentials_are_sent_and_never_shown(
    proxy: FaultProxy, make_store: MakeStore, server: nginx.Nginx
) -> None:
    """S5: of the URL, of auth or in a header; neither the repr, the url nor an error has them."""
    with_login = proxy.url.replace(
        "http://", f"http://{nginx.USER}:{nginx.PASSWORD.replace('/', '%2F').replace('@', '%40')}@"
    )
    token = base64.b64encode(f"{nginx.USER}:{nginx.PASSWORD}".encode()).decode()
    for store in (
        make_store("/private", url=with_login),
        make_store("/private/", auth=(nginx.USER, nginx.PASSWORD)),
        make_store("/private/", headers={"authorization": f"Basic {token}"}),
    ):
        assert await read(await store.fetch("a")) == DATA
        assert repr(store) == str(store) == store.url == f"{proxy.url}/private"
        proxy.next(answer(500), times=None)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.fetch("a")
        assert "s3cret" not in repr(caught.value)
        proxy.clear()


async def test_wrong_credentials_are_not_tried_again(
    proxy: FaultProxy, make_store: MakeStore, pauses: list[float]
) -> None:
    """S1: a refusal is final, and says what to do; 403 may also mean that a file is not there."""
    with pytest.raises(
        StoreAccessDeniedError, match=r"401 Unauthorized when asked for a: give auth or headers"
    ) as caught:
        await make_store("/private/", auth=("reader", "wrong")).fetch("a")
    assert caught.value.model == "a"
    assert (proxy.statuses, pauses) == ([401] * 3, [])
    proxy.next(answer(403), when=lambda request: request.target == "/a.tar.gz")
    assert await read(await make_store().fetch("a")) == DATA


async def test_netrc_is_asked_for_a_login(
    proxy: FaultProxy, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the store's host, once, unless there are credentials already; one that is missing or damaged is none."""
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    refused: list[HTTPStore] = [make_store("/private/")]
    with pytest.raises(StoreAccessDeniedError):
        await refused[0].fetch("a")
    file.write_text(f"machine 127.0.0.1 login {nginx.USER} password {nginx.PASSWORD}")
    store = make_store("/private/")
    assert await read(await store.fetch("a")) == DATA
    file.write_text("machine 127.0.0.1 password")
    assert await read(await store.fetch("a")) == DATA
    for other in (make_store("/private/"), make_store("/private/", auth=("reader", "wrong"))):
        with pytest.raises(StoreAccessDeniedError):
            await other.fetch("a")


async def test_a_proxy_of_the_environment_is_used(
    proxy: FaultProxy, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only a proxy reaches the store, and NO_PROXY does not exempt it."""
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert await read(await make_store(url="http://models.example").fetch("a.ubj")) == DATA
    assert await read(await make_store().fetch("a.ubj")) == DATA
    assert [request.target for request in proxy.requests] == ["http://models.example/a.ubj", "/a.ubj"]


# Failures


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (answer(500), 0.1),
        (answer(429, Retry_After="7"), 7.0),
        (slow_down(3), 3.0),
        (answer(503, Retry_After="Fri, 01 Jan 2016 00:00:00 GMT"), 0.1),
        (answer(503, Retry_After="soon"), 0.1),
        (cut(after=None), 0.1),
        (cut(after=None, reset=True), 0.1),
    ],
)
async def test_what_may_pass_is_tried_again(
    proxy: FaultProxy, make_store: MakeStore, pauses: list[float], fault: answer | cut, expected: float
) -> None:
    """S1: after a pause that the server may ask for; the artifact comes as if nothing had been."""
    store = make_store()
    await read(await store.fetch("a.ubj"))
    proxy.next(fault, times=2)  # one of them may be repeated by aiohttp itself, on a connection that was used before
    assert await read(await store.fetch("a.ubj")) == DATA
    assert pauses[0] == expected


@pytest.mark.parametrize(
    ("fault", "message", "retry_after"),
    [
        (slow_down(4), "The server answered 503 Scripted when asked for a", 4.0),
        (slow_down(3600), "The server answered 503", 3600.0),
        (cut(after=None), "The server did not answer: ServerDisconnectedError", None),
    ],
)
async def test_tries_end(
    proxy: FaultProxy,
    make_store: MakeStore,
    pauses: list[float],
    *,
    fault: answer | cut,
    message: str,
    retry_after: float,
) -> None:
    """S1: after five tries, or at once if the server asks for more patience than a load has."""
    proxy.next(fault, times=None)
    with pytest.raises(StoreUnavailableError, match=message) as caught:
        await make_store().fetch("a")
    assert caught.value.retry_after == retry_after
    assert caught.value.model == "a"
    assert len(pauses) == (0 if retry_after == 3600 else 4)


async def test_a_server_that_does_not_answer_is_not_waited_for(proxy: FaultProxy, make_store: MakeStore) -> None:
    """S1: read_timeout bounds the wait for an answer as well."""
    proxy.next(stall())
    assert await read(await make_store(read_timeout=0.1).fetch("a.ubj")) == DATA


async def test_a_server_that_is_not_there(make_store: MakeStore, pauses: list[float]) -> None:
    """S1: a refused connection is tried again, and then told."""
    with pytest.raises(StoreUnavailableError, match=r"The server did not answer: .*127\.0\.0\.1:1"):
        await make_store(url="http://127.0.0.1:1").fetch("a")
    assert len(pauses) == 4


@pytest.mark.parametrize("status", [204, 206, 304, 400, 418])
async def test_other_answers_are_errors(
    proxy: FaultProxy, make_store: MakeStore, pauses: list[float], status: int
) -> None:
    """Neither tried again nor taken for an artifact: among them what was not asked for."""
    proxy.next(answer(status))
    with pytest.raises(
        StoreError, match=f"The server answered {status} Scripted when asked for a, which no file"
    ) as caught:
        await make_store().fetch("a")
    assert type(caught.value) is StoreError
    assert pauses == []


async def test_what_is_not_http(make_store: MakeStore, pauses: list[float]) -> None:
    """An answer in another protocol makes no sense, now or later."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 smtp.example ESMTP\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(StoreError, match="The server's answer makes no sense"):
            await make_store(url=f"http://127.0.0.1:{port}").fetch("a")
    assert pauses == []


async def test_certificates_are_checked(server: nginx.Nginx, make_store: MakeStore, pauses: list[float]) -> None:
    """What cannot be trusted now cannot be trusted later; a context of one's own decides what can."""
    for url in (server.tls_url, server.url.replace("http", "https")):
        with pytest.raises(StoreError, match=r"There is no secure connection: .*give an ssl_context") as caught:
            await make_store(url=url).fetch("a")
        assert type(caught.value) is StoreError
    assert pauses == []
    context = await to_thread.run_sync(lambda: ssl.create_default_context(cafile=server.certificate))
    context.check_hostname = False
    store = make_store(url=server.tls_url, ssl_context=context)
    assert await read(await store.fetch("a")) == DATA
    unencrypted = make_store("/plainly/", url=server.tls_url, ssl_context=context, redirect_origins=[server.url])
    with pytest.raises(StoreAccessDeniedError, match="that is not encrypted, and is not followed"):
        await unencrypted.fetch("a")


# Opening


def test_a_url_opens_it() -> None:
    """Both schemes; case, default ports and a final slash make no other store, and options are passed on."""
    for url in ("http://Models.example:80/x y/", "http://models.example/x%20y", "http://u:p@models.example/x%20y/"):
        store = open_store(url)
        assert isinstance(store, HTTPStore)
        assert store.url == "http://models.example/x%20y"
    assert repr(open_store("https://[::1]:8443", index="i", read_timeout=1)) == "https://[::1]:8443"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://u:hush@host/", "does not begin with http:// or https://"),
        ("https://", "it has no host"),
        ("https://münchen.example/", "it has no host, or one that is not ASCII"),
        ("https://u:hush@host:port/", "its host or port is malformed"),
        ("https://u:hush@host:0/", "its host or port is malformed"),
        ("https://u:hush?@host/", "its host or port is malformed"),
        ("https://u:hush@[::1/", "its host or port is malformed"),
        ("https://host/?token=hush", "it has a query or a fragment"),
        ("https://host/#x", "it has a query or a fragment"),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, problem: str) -> None:
    """When the store is made, and without showing a secret."""
    with pytest.raises(StoreError, match=problem) as caught:
        HTTPStore(url)
    assert "hush" not in str(caught.value)


def test_aiohttp_is_imported_when_it_is_needed() -> None:
    """Importing modelcache, or making a store, imports no HTTP client; one that is missing is told then."""
    code = (
        "import sys, modelcache; modelcache.HTTPStore('https://host'); "
        "print([name for name in ('aiohttp', 'aiobotocore') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_missing_aiohttp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that brings it is in the message."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'modelcache\[http\]'"):
        HTTPStore("https://host")

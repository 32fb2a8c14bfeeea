"""ObstoreStore: whatever obstore reads."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import obstore.store as stores
import pytest
from aiohttp import web

import zoo
from modelcache import (
    Artifact,
    MissingDependencyError,
    ModelNotFoundError,
    NotModified,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    UnsafeArtifactError,
    open_store,
)
from modelcache.stores.obstore import ObstoreStore
from modelcache.testing import check_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from conftest import MakeRegistry

    Server = Callable[..., ObstoreStore]


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    return b"".join([chunk async for chunk in artifact.chunks])


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Make stores over a server that answers as it is told, by an S3 client of obstore's."""
    made: list[Any] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        response: web.StreamResponse = await made[0](request)
        return response

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"

    def make(handler: Any) -> ObstoreStore:
        made[:] = [handler]
        return ObstoreStore(
            "s3://bucket/models", endpoint=address, access_key_id="AKIA", secret_access_key="SECRET", region="eu-1",
            client_options={"allow_http": True}, retry_config={"max_retries": 0}, manifest=None,
        )  # fmt: skip

    yield make
    await runner.cleanup()


@pytest.mark.parametrize("kind", ["memory", "local"])
async def test_it_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    """The suite that every store has to pass."""

    async def make(artifacts: Mapping[str, bytes]) -> ObstoreStore:
        store = stores.MemoryStore() if kind == "memory" else stores.LocalStore(tmp_path)
        for name, data in artifacts.items():
            await obstore.put_async(store, name, data)
        return ObstoreStore(store)

    await check_store(make)


@pytest.fixture
async def obstore_running() -> None:
    """Start obstore's own threads, which stay, and their descriptors with them."""
    await obstore.put_async(stores.MemoryStore(), "x", b"")


async def test_it_serves_models_by_its_url(obstore_running: None, make_registry: MakeRegistry, tmp_path: Path) -> None:
    """`obstore+` before a URL that obstore knows is all there is to it; a manifest is enforced."""
    model = zoo.model()
    (tmp_path / "tenant").mkdir()
    (tmp_path / "tenant" / "other.ubj").write_bytes(model.ubj)
    (tmp_path / "good.tar.gz").write_bytes(model.targz)
    registry = await make_registry(f"obstore+{tmp_path.as_uri()}")
    assert np.array_equal(await registry.predict("good", zoo.rows(3)), model.expected(zoo.rows(3)))
    assert [name async for name in registry.names("ten")] == ["tenant/other"]
    (tmp_path / "MANIFEST.json").write_bytes(b'{"sha256": {}}')
    other = await make_registry(f"obstore+{tmp_path.as_uri()}")
    with pytest.raises(UnsafeArtifactError):
        await other.predict("good", zoo.rows(3))
    assert sorted([name async for name in other.names()]) == ["good", "tenant/other"]


async def test_a_large_object_comes_in_chunks(tmp_path: Path) -> None:
    """Nothing as large as the object is held."""
    (tmp_path / "a.ubj").write_bytes(bytes(3 << 20))
    artifact = await ObstoreStore(tmp_path.as_uri()).fetch("a")
    assert isinstance(artifact, Artifact)
    sizes = [len(chunk) async for chunk in artifact.chunks]
    assert sum(sizes) == artifact.size == 3 << 20
    assert max(sizes) <= 1 << 20


async def test_an_etag_is_asked_about_and_nothing_else_is(server: Server) -> None:
    """A revalidation is one conditional request; a version that was no ETag is compared here."""
    asked: list[str | None] = []
    headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers.get("If-None-Match"))
        if asked[-1] == '"1"':
            return web.Response(status=304, headers={"ETag": '"1"'})
        return web.Response(body=b"x", headers=headers)

    store = server(answer)
    assert await store.fetch("a.ubj", if_version='"1"') == NotModified('"1"')
    headers["ETag"] = '"2"'
    found = await store.fetch("a.ubj", if_version='"0"')
    assert (found.version, await read(found)) == ('"2"', b"x")
    del headers["ETag"]
    dated = await store.fetch("a.ubj")
    assert await store.fetch("a.ubj", if_version=dated.version) == NotModified(dated.version)
    assert asked == ['"1"', '"0"', None, None]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (404, ModelNotFoundError, "There is no model 'a' in s3://bucket/models"),
        (403, StoreAccessDeniedError, r"s3://bucket/models.* may not be read with these credentials.*and listing"),
        (401, StoreAccessDeniedError, "may not be read with these credentials"),
        (500, StoreUnavailableError, r"Reading a\.tar\.gz from s3://bucket/models.* failed"),
    ],
)
async def test_answers_become_our_errors(server: Server, status: int, kind: type[Exception], words: str) -> None:
    """S1: what is not there, what is forbidden, and what may work later are told apart."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    with pytest.raises(kind, match=words) as caught:
        await server(answer).fetch("a")
    assert "SECRET" not in str(caught.value)


async def test_whoever_may_not_list_still_reads(server: Server) -> None:
    """S3 answers 403 for what is not there to those who may not list: the other suffixes are tried all the same."""

    async def answer(request: web.Request) -> web.Response:
        if request.path.endswith(".json"):
            return web.Response(body=b"x", headers={"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})
        return web.Response(status=403)

    found = await server(answer).fetch("a")
    assert isinstance(found, Artifact)
    assert found.suffix == ".json"


async def test_a_download_that_breaks_fails(server: Server) -> None:
    """A4: fewer bytes than announced are an error of the store."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Length": "100", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        )
        await response.prepare(request)
        await response.write(b"x" * 50)
        assert request.transport is not None
        request.transport.close()
        return response

    with pytest.raises(StoreUnavailableError, match=r"Reading a\.ubj from"):
        await read(await server(answer).fetch("a.ubj"))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a URL that obstore does not know nor a missing package fails later than at once."""
    with pytest.raises(StoreError, match=r"obstore cannot open this URL: .*nobody://x"):
        open_store("obstore+nobody://x")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'modelcache\[obstore\]'"):
        open_store("obstore+memory:///")


def test_its_url_names_it_without_secrets(tmp_path: Path) -> None:
    """Stores of different places differ, stores of one place do not, and no key is shown."""
    bucket = {"access_key_id": "AKIA", "secret_access_key": "SECRET", "region": "eu-1"}

    def at(endpoint: str) -> str:
        return ObstoreStore(stores.S3Store("b", prefix="p", endpoint=endpoint, **bucket)).url  # type: ignore[arg-type]

    assert at("http://one") == at("http://one") == "obstore.S3Store://http://one/b/p"
    assert at("http://two") != at("http://one")
    assert ObstoreStore(stores.LocalStore(tmp_path)).url == f"obstore.LocalStore://{tmp_path}"
    assert "secret" not in ObstoreStore(stores.HTTPStore("http://me:secret@host/x")).url
    assert ObstoreStore(stores.MemoryStore()).url != ObstoreStore(stores.MemoryStore()).url
    assert repr(ObstoreStore("s3://bucket/models?x=secret")) == "obstore s3://bucket/models"
    one, other = (
        ObstoreStore("s3://bucket/m", config={"endpoint": host, **bucket}) for host in ("http://a", "http://b")
    )
    assert one.url != other.url, "the same bucket of another server"

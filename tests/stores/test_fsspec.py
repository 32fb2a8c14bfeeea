"""FsspecStore: whatever fsspec reads."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from aiohttp import web
from anyio import to_thread

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
from modelcache.stores import fsspec as adapter
from modelcache.stores.fsspec import FsspecStore
from modelcache.stores.urls import without_secrets
from modelcache.testing import check_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from conftest import MakeRegistry


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder in fsspec's memory."""
    name = f"/{uuid4().hex}"
    yield f"memory:/{name}"
    if fsspec.filesystem("memory").exists(name):
        fsspec.filesystem("memory").rm(name, recursive=True)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[str]:
    """An HTTP server over a folder, which fsspec reads by an asynchronous file system."""
    app = web.Application()
    app.router.add_static("/", tmp_path, show_index=True)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def put(url: str, artifacts: Mapping[str, bytes]) -> None:
    system, root = fsspec.core.url_to_fs(url)
    for name, data in artifacts.items():
        path = f"{root}/{name}"
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data)


async def read(artifact: Artifact | NotModified) -> bytes:
    assert isinstance(artifact, Artifact)
    return b"".join([chunk async for chunk in artifact.chunks])


@pytest.mark.parametrize("place", ["memory", "file"])
async def test_it_keeps_the_contract(place: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite that every store has to pass, with files of many ranges."""
    monkeypatch.setattr(adapter, "_RANGE", 100_000)
    url = {"memory": folder, "file": tmp_path.as_uri()}[place]

    async def make(artifacts: Mapping[str, bytes]) -> FsspecStore:
        await to_thread.run_sync(put, url, artifacts)
        return FsspecStore(url)

    await check_store(make)


class Unlisted(FsspecStore):
    """Without a listing: over HTTP, fsspec takes whatever a page links to for a file."""

    names: Any = None


async def test_an_asynchronous_file_system_runs_on_its_own_loop(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the contract too, and takes no thread of ours but to be opened and closed."""
    ours: list[Any] = []
    run_sync = to_thread.run_sync

    async def noted(call: Any, *arguments: Any) -> Any:
        ours.append(call)
        return await run_sync(call, *arguments)

    async def make(artifacts: Mapping[str, bytes]) -> FsspecStore:
        await run_sync(put, tmp_path.as_uri(), artifacts)
        monkeypatch.setattr(to_thread, "run_sync", noted)
        return Unlisted(server, manifest=None)

    await check_store(make)
    assert [call for call in ours if getattr(call, "__name__", "") != "clear"] == [adapter._open]


async def test_it_serves_models_by_its_url(make_registry: MakeRegistry, folder: str) -> None:
    """`fsspec+` before a URL that fsspec knows is all there is to it; a manifest is enforced."""
    model = zoo.model()
    put(folder, {"good.tar.gz": model.targz, "tenant/other.ubj": model.ubj})
    registry = await make_registry(f"fsspec+{folder}")
    assert np.array_equal(await registry.predict("good", zoo.rows(3)), model.expected(zoo.rows(3)))
    assert [name async for name in registry.names("ten")] == ["tenant/other"]
    put(folder, {"MANIFEST.json": b'{"sha256": {}}'})
    other = await make_registry(f"fsspec+{folder}")
    with pytest.raises(UnsafeArtifactError):
        await other.predict("good", zoo.rows(3))
    assert [name async for name in other.names()] == ["good", "tenant/other"]


async def test_a_file_that_changes_is_another_version(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A4: written over between two fetches it is another version, between two ranges the read fails."""
    monkeypatch.setattr(adapter, "_RANGE", 2)
    store = FsspecStore(folder)
    put(folder, {"a.ubj": b"1234"})
    first = await store.fetch("a")
    assert isinstance(await store.fetch("a", if_version=first.version), NotModified)
    assert isinstance(first, Artifact)
    assert await anext(first.chunks) == b"12"
    put(folder, {"a.ubj": b"5678"})
    with pytest.raises(StoreUnavailableError, match=r"a\.ubj was changed in memory://.* while it was read"):
        _ = [chunk async for chunk in first.chunks]
    second = await store.fetch("a", if_version=first.version)
    assert second.version != first.version
    assert await read(second) == b"5678"


async def test_it_never_runs_on_the_event_loop(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks, the making of the file system included, is done in threads."""
    put(folder, {"a.ubj": b"1"})
    threads = set()

    def noting(call: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            threads.add(threading.current_thread())
            return call(*arguments, **options)

        return noted

    system = type(fsspec.filesystem("memory"))
    for method in ("__init__", "info", "cat_file", "find"):
        monkeypatch.setattr(system, method, noting(getattr(system, method)))
    store = FsspecStore(folder)
    await read(await store.fetch("a"))
    assert [name async for name in store.names()] == ["a"]
    assert threads
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FileNotFoundError("x"), ModelNotFoundError, "There is no model 'a' in memory://"),
        (PermissionError("x"), StoreAccessDeniedError, "memory://.* may not be read: x"),
        (RuntimeError("x"), StoreUnavailableError, r"Reading a\.tar\.gz from memory://.* failed: RuntimeError: x"),
    ],
)
async def test_errors_of_file_systems_become_ours(
    folder: str, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
) -> None:
    """S1: what is not there, what is forbidden, and what may work later are told apart, and keep their cause."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", fail)
    with pytest.raises(kind, match=words):
        await FsspecStore(folder).fetch("a")


async def test_what_tells_no_size_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a size there are no ranges, and a whole file of any size is not read into memory."""
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", lambda *_: {"type": "file"})
    with pytest.raises(StoreError, match="does not tell the size"):
        await FsspecStore(folder).fetch("a")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fsspec, nor the package of a file system, nor one that there is none for fails later than at once."""
    with pytest.raises(MissingDependencyError, match=r"fsspec cannot open gs://bucket: .*gcsfs"):
        open_store("fsspec+gs://bucket")
    with pytest.raises(StoreError, match="fsspec cannot open nobody://x: Protocol not known"):
        open_store("fsspec+nobody://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'modelcache\[fsspec\]'"):
        open_store("fsspec+memory://x")


def test_its_url_names_it_without_secrets() -> None:
    """Neither a password nor a signature is shown; other options are another place."""
    secret = FsspecStore("ftp://me:secret@host/models?sig=secret")
    assert secret.url == "ftp://me@host/models"
    assert repr(secret) == "fsspec ftp://me@host/models"
    for hidden in ("sftp://me:p@ss@host/x", "sftp://me:pa/ss@host/x"):
        assert without_secrets(hidden) == "sftp://me@host/x"
    assert without_secrets("https://token@host/x") == "https://host/x"
    plain, other = FsspecStore("memory://x"), FsspecStore("memory://x", endpoint="http://other")
    assert plain.url == "memory://x"
    assert other.url.startswith("memory://x#")
    assert FsspecStore("memory://container@account/x").url == "memory://container@account/x", "an address of Azure's"


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"ETag": '"1"', "size": 1, "seen": 1}, {"ETag": '"1"', "size": 1, "seen": 2}, True),
        ({"ETag": '"1"', "size": 1}, {"ETag": '"2"', "size": 1}, False),
        ({"LastModified": 1, "size": 1}, {"LastModified": 2, "size": 1}, False),
        ({"mtime": 1, "size": 1}, {"mtime": 1, "size": 2}, False),
        ({"size": 1, "odd": "x"}, {"size": 1, "odd": "y"}, False),
    ],
)
def test_a_version_is_what_changes_with_the_content(one: dict[str, Any], two: dict[str, Any], same: bool) -> None:
    """An ETag or a time, and the size; where there is neither, everything that is said of the file."""
    assert (adapter._version(one) == adapter._version(two)) is same

"""A manifest is enforced by every store that is shipped, and costs a request now and then, not one for each fetch."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from modelcache import Artifact, HTTPStore, LocalStore, S3Store, UnsafeArtifactError
from servers import nginx, s3
from servers.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from modelcache import ArtifactStore

DATA = {"listed.ubj": b"{listed", "other.ubj": b"{other"}
DIGEST = hashlib.sha256(DATA["listed.ubj"]).hexdigest()
FILES = DATA | {"MANIFEST.json": json.dumps({"sha256": {"listed.ubj": DIGEST}}).encode()}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    files: dict[str, bytes] = request.param[1]
    if request.param[0] == "http":
        with nginx.serving(tmp_path) as server:
            fill(server.root, files)
            yield server.url
    elif request.param[0] == "s3":
        with s3.rclone(tmp_path) as server:
            bucket = server.make_bucket("bucket")
            for name, data in files.items():
                server.put(bucket, name, data)
            yield server.url
    else:
        fill(tmp_path, files)
        yield str(tmp_path)


@pytest.fixture
async def store(served: str, request: pytest.FixtureRequest) -> AsyncIterator[tuple[ArtifactStore, FaultProxy | None]]:
    kind = request.node.callspec.params["served"][0]
    if kind == "local":
        yield LocalStore(served), None
        return
    async with FaultProxy(served) as proxy:
        made: ArtifactStore = (
            HTTPStore(proxy.url) if kind == "http" else S3Store("s3://bucket", endpoint_url=proxy.url, **s3.KEYS)
        )
        try:
            yield made, proxy
        finally:
            await made.close()


@pytest.mark.parametrize("served", [(kind, FILES) for kind in ("local", "http", "s3")], indirect=True, ids=str)
async def test_a_manifest_is_enforced(store: tuple[ArtifactStore, FaultProxy | None]) -> None:
    """What is listed is announced with its digest; what is not listed is refused, and no connection is kept for it."""
    listed = await store[0].fetch("listed")
    assert isinstance(listed, Artifact)
    assert listed.digest == DIGEST
    assert b"".join([chunk async for chunk in listed.chunks]) == DATA["listed.ubj"]
    with pytest.raises(UnsafeArtifactError, match=r"is not in MANIFEST\.json"):
        await store[0].fetch("other")
    if not isinstance(store[0], HTTPStore):
        assert [name async for name in store[0].names()] == ["listed", "other"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("served", [(kind, DATA) for kind in ("http", "s3")], indirect=True, ids=str)
async def test_a_manifest_that_is_not_there_is_looked_for_once(store: tuple[ArtifactStore, FaultProxy | None]) -> None:
    """Ten fetches, and one look for the manifest among them."""
    proxy = store[1]
    assert proxy is not None
    for _ in range(10):
        found = await store[0].fetch("other.ubj")
        assert isinstance(found, Artifact)
        assert b"".join([chunk async for chunk in found.chunks]) == DATA["other.ubj"]
    asked = [request.target.partition("?")[0].rpartition("/")[2] for request in proxy.requests]
    assert (asked.count("other.ubj"), asked.count("MANIFEST.json")) == (10, 1)

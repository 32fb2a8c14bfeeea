"""Manifests: the SHA-256 of every artifact, enforced where there is one."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import zoo
from conftest import settle
from modelcache import (
    Artifact,
    CorruptArtifactError,
    LocalStore,
    MemoryStore,
    ModelNotFoundError,
    NotModified,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    UnsafeArtifactError,
)
from modelcache.stores import Manifest, manifest
from modelcache.testing import FakeClock, GatedStore

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import MakeRegistry

FILE = "MANIFEST.json"
A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()


def listing(**digests: str) -> bytes:
    return json.dumps({"sha256": {f"{name}.ubj": digest for name, digest in digests.items()}}).encode()


class Counting(MemoryStore):
    """Notes with which version it was asked."""

    def __init__(self, artifacts: dict[str, bytes] | None = None) -> None:
        super().__init__(artifacts)
        self.asked: list[str | None] = []

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        self.asked.append(if_version)
        return await super().fetch(name, if_version=if_version)


def made(store: MemoryStore) -> tuple[Manifest, FakeClock]:
    clock = FakeClock()
    return Manifest(FILE, store.fetch, clock=clock), clock


async def test_what_it_lists_has_a_digest() -> None:
    """The digest is that of the file, in lower case; a file that is not listed is refused, with what to do."""
    listed, _ = made(MemoryStore({FILE: listing(a=A.upper())}))
    assert await listed.digest_of("a.ubj") == A
    with pytest.raises(UnsafeArtifactError, match=r"a\.json is not in MANIFEST\.json.*`modelcache manifest") as caught:
        await listed.digest_of("a.json")
    assert caught.value.model == "a.json"


async def test_one_that_was_seen_is_not_denied_away() -> None:
    """A store that says "denied" of what is not there has no manifest, unless it had one a moment ago."""
    store, clock, denied = MemoryStore({FILE: listing(a=A)}), FakeClock(), True

    async def read(name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        if denied:
            raise StoreAccessDeniedError("no")
        return await store.fetch(name, if_version=if_version)

    listed = Manifest(FILE, read, denied_is_absent=True, clock=clock)
    assert await listed.digest_of("a.ubj") is None
    denied = False
    clock.advance(60)
    assert await listed.digest_of("a.ubj") == A
    denied = True
    clock.advance(1)
    with pytest.raises(StoreAccessDeniedError):
        await listed.digest_of("a.ubj")


async def test_without_one_anything_goes() -> None:
    """A store without a manifest announces no digests; one that is to have none never looks."""
    store = Counting()
    absent, _ = made(store)
    off = Manifest(None, store.fetch)
    assert await absent.digest_of("a.ubj") is None
    assert await off.digest_of(FILE) is None
    assert len(store.asked) == 1


async def test_the_manifest_is_no_model() -> None:
    """Whoever asks for it by name is told so, whether or not it is there."""
    listed, _ = made(MemoryStore())
    with pytest.raises(ModelNotFoundError, match="is the store's manifest, and no model"):
        await listed.digest_of(FILE)


async def test_it_is_asked_for_once_a_second_and_read_when_it_has_changed() -> None:
    """The second look asks whether it is still that version; a change counts within a second."""
    store = Counting({FILE: listing(a=A)})
    listed, clock = made(store)
    for _ in range(3):
        assert await listed.digest_of("a.ubj") == A
    clock.advance(0.9)
    await listed.digest_of("a.ubj")
    assert store.asked == [None]
    clock.advance(0.1)
    assert await listed.digest_of("a.ubj") == A
    assert store.asked == [None, hashlib.sha256(listing(a=A)).hexdigest()[:16]]
    store.put(FILE, listing(b=B))
    clock.advance(1)
    assert await listed.digest_of("b.ubj") == B
    with pytest.raises(UnsafeArtifactError):
        await listed.digest_of("a.ubj")
    assert len(store.asked) == 3


async def test_one_that_is_absent_is_looked_for_once_a_minute() -> None:
    """A store without one pays a request a minute; one that comes is enforced, and one that goes is not."""
    store = Counting()
    listed, clock = made(store)
    await listed.digest_of("a.ubj")
    store.put(FILE, listing(b=B))
    clock.advance(59)
    assert await listed.digest_of("a.ubj") is None
    assert len(store.asked) == 1
    clock.advance(1)
    with pytest.raises(UnsafeArtifactError):
        await listed.digest_of("a.ubj")
    store.remove(FILE)
    clock.advance(1)
    assert await listed.digest_of("a.ubj") is None


async def test_concurrent_fetches_share_one_look() -> None:
    """However many loads wait for it, it is read once, and a failure is everybody's, each with an error of its own."""
    store = GatedStore({FILE: listing(a=A)})
    listed, clock = made(store)
    asking = [asyncio.create_task(listed.digest_of("a.ubj")) for _ in range(5)]
    await store.fetched(1)
    await settle()
    store.open(FILE)
    assert await asyncio.gather(*asking) == [A] * 5
    assert store.fetches == [FILE]
    store.shut(FILE)
    clock.advance(1)
    failing = [asyncio.create_task(listed.digest_of("a.ubj")) for _ in range(5)]
    await store.fetched(2)
    await settle()
    store.fail(FILE, StoreUnavailableError("down", model=FILE))
    errors = await asyncio.gather(*failing, return_exceptions=True)
    assert [str(error) for error in errors] == ["down"] * 5
    assert len({id(error) for error in errors}) == 5
    assert {getattr(error, "model", "") for error in errors} == {None}, "who asks for a model hears of that model"
    assert len(store.fetches) == 2
    store.open(FILE)
    assert await listed.digest_of("a.ubj") == A, "a failure is not remembered"


async def test_a_look_that_is_given_up_is_made_by_the_next() -> None:
    """Cancelling the one who reads it costs the others nothing but another request."""
    store = GatedStore({FILE: listing(a=A)})
    listed, _ = made(store)
    first, second = (asyncio.create_task(listed.digest_of("a.ubj")) for _ in range(2))
    await store.fetched(1)
    await settle()
    first.cancel()
    store.open(FILE)
    assert await second == A
    assert first.cancelled()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"{}", b"7", b'{"sha256": []}', b'{"sha256": {"a.ubj": 7}}', b'{"sha256": {"a.ubj": "00"}}',
        b'{"a.ubj": "' + A.encode() + b'"}', b'{"sha256": {"a.ubj": "' + A.encode() + b'\\n"}}', b"[" * 100_000,
        b"\xff",
    ],
    ids=range(12),
)  # fmt: skip
async def test_nothing_is_served_past_a_malformed_one(data: bytes) -> None:
    """Any file of that name that is no manifest stops the store, and the error shows the form."""
    listed, _ = made(MemoryStore({FILE: data}))
    with pytest.raises(StoreError, match=r'not of the form \{"sha256": .*nothing is served past it'):
        await listed.digest_of("a.ubj")


async def test_one_that_breaks_after_it_was_good_stops_the_store() -> None:
    """What an earlier one listed is not served on."""
    store = MemoryStore({FILE: listing(a=A)})
    listed, clock = made(store)
    await listed.digest_of("a.ubj")
    store.put(FILE, b"{")
    clock.advance(1)
    with pytest.raises(StoreError):
        await listed.digest_of("a.ubj")


async def test_what_it_refuses_is_let_go_of() -> None:
    """A store may hold a connection open from the fetch on; what is listed goes through with its digest."""
    closed = []

    async def chunks(name: str) -> Any:
        try:
            yield b"a"
        finally:
            closed.append(name)

    listed, _ = made(MemoryStore({FILE: listing(a=A)}))
    for name in ("a.ubj", "b.ubj"):
        data = chunks(name)
        await anext(data)
        found = Artifact(version="1", size=1, suffix=".ubj", chunks=data)
        if name == "a.ubj":
            assert await listed.enforce(name, found) == replace(found, digest=A)
            assert await listed.enforce(name, NotModified("1")) == NotModified("1")
        else:
            with pytest.raises(UnsafeArtifactError):
                await listed.enforce(name, found)
    assert closed == ["b.ubj"]


async def test_one_that_is_cut_short_or_endless_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are as many as announced, and no more than a manifest may have."""
    data = listing(a=A)

    async def chunks() -> Any:
        yield data[:-10]

    async def read(name: str, *, if_version: str | None = None) -> Artifact:
        return Artifact(version="1", size=len(data), suffix="", chunks=chunks())

    with pytest.raises(StoreError, match="was cut short"):
        await Manifest(FILE, read).digest_of("a.ubj")
    monkeypatch.setattr(manifest, "_LARGEST", 10)
    with pytest.raises(StoreError, match="more than 10 bytes"):
        await Manifest(FILE, read).digest_of("a.ubj")


async def test_one_that_may_not_be_read_stops_the_store() -> None:
    """Whether there is one is not known then; the error says how to do without."""

    async def read(name: str, *, if_version: str | None = None) -> Artifact:
        raise StoreAccessDeniedError("403.")

    with pytest.raises(StoreAccessDeniedError, match=r"403\. Of a store that has no manifest, say so: manifest=None"):
        await Manifest(FILE, read).digest_of("a.ubj")


async def test_a_folder_with_a_manifest(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A folder's models are those listed, each as listed: damaged ones and added ones are refused before parsing."""
    good, other = zoo.model(), zoo.model(seed=1)
    (tmp_path / "good.ubj").write_bytes(good.ubj)
    (tmp_path / "swapped.ubj").write_bytes(other.ubj)
    (tmp_path / "good.tar.gz").write_bytes(other.targz)
    digest = hashlib.sha256(good.ubj).hexdigest()
    (tmp_path / FILE).write_bytes(listing(good=digest, swapped=digest))
    registry = await make_registry(tmp_path)
    rows = zoo.rows(2)
    assert np.array_equal(await registry.predict("good.ubj", rows), good.expected(rows))
    with pytest.raises(CorruptArtifactError, match=f"the store announced {digest}"):
        await registry.predict("swapped", rows)
    with pytest.raises(UnsafeArtifactError, match=r"good\.tar\.gz is not in MANIFEST\.json"):
        await registry.predict("good", rows)
    assert [name async for name in registry.names()] == ["good", "swapped"]
    with pytest.raises(ModelNotFoundError):
        await registry.predict("MANIFEST", rows)


async def test_a_folder_may_have_none_or_another(tmp_path: Path) -> None:
    """The file's name is an option, and None turns it off: then it is a file like any other."""
    (tmp_path / "a.ubj").write_bytes(b"a")
    (tmp_path / FILE).write_bytes(listing(a=B))
    (tmp_path / "digests.json").write_bytes(listing(a=A))
    for name, digest in ((None, None), ("digests.json", A), (FILE, B)):
        artifact = await LocalStore(tmp_path, manifest=name).fetch("a")
        assert isinstance(artifact, Artifact)
        assert artifact.digest == digest
    assert "MANIFEST" in [name async for name in LocalStore(tmp_path, manifest=None).names()]

"""MemoryStore: artifacts in a dict."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from modelcache import Artifact, ArtifactStore, InvalidModelNameError, MemoryStore, ModelNotFoundError
from modelcache.testing import check_store

if TYPE_CHECKING:
    from collections.abc import Mapping


async def make(artifacts: Mapping[str, bytes]) -> MemoryStore:
    return MemoryStore(artifacts)


async def test_it_keeps_the_contract() -> None:
    """The suite that every store has to pass."""
    await check_store(make)


async def test_put_and_remove_change_what_it_has() -> None:
    """The version is a digest of the bytes: the same bytes are the same version again."""
    store = MemoryStore()
    assert isinstance(store, ArtifactStore)
    store.put("a.ubj", b"one")
    first = await store.fetch("a")
    store.put("a.ubj", b"two")
    second = await store.fetch("a")
    store.put("a.ubj", b"one")
    again = await store.fetch("a")
    assert first.version == again.version != second.version
    assert isinstance(first, Artifact)
    assert [chunk async for chunk in first.chunks] == [b"one"]
    store.remove("a.ubj")
    with pytest.raises(ModelNotFoundError, match=r"has no model 'a': put\(name, data\) adds one"):
        await store.fetch("a")
    with pytest.raises(KeyError):
        store.remove("a.ubj")


async def test_it_announces_what_its_bytes_hash_to() -> None:
    """A2: the digest is that of all bytes, and the version is its start."""
    artifact = await MemoryStore({"a.ubj": b"one"}).fetch("a")
    assert isinstance(artifact, Artifact)
    assert artifact.digest == hashlib.sha256(b"one").hexdigest()
    assert artifact.digest.startswith(artifact.version)


async def test_it_copies_what_it_is_given() -> None:
    """What happens to the caller's buffer afterwards changes no artifact."""
    data: Any = bytearray(b"one")
    store = MemoryStore({"a.ubj": data})
    data[:] = b"two"
    artifact = await store.fetch("a")
    assert isinstance(artifact, Artifact)
    assert [chunk async for chunk in artifact.chunks] == [b"one"]


@pytest.mark.parametrize("name", ["../a.ubj", "", "a/../b.ubj"])
def test_a_name_that_no_call_could_ask_for_is_refused(name: str) -> None:
    """A name is checked when it is put, not when it is missed."""
    with pytest.raises(InvalidModelNameError, match="Use names like"):
        MemoryStore({name: b""})


@pytest.mark.parametrize("name", ["Chicago_IL", "a.txt", ".ubj"])
def test_a_name_without_a_suffix_is_refused(name: str) -> None:
    """An artifact without one of the suffixes would never be found."""
    with pytest.raises(InvalidModelNameError, match=r"Add its suffix: \.tar\.gz, \.ubj, \.json"):
        MemoryStore({name: b""})


def test_its_repr_counts() -> None:
    """The repr is the first part of a registry's."""
    assert repr(MemoryStore({"a.ubj": b"", "b.ubj": b""})) == "memory (2 artifacts)"

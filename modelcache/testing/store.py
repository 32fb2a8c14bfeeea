"""The contract of a store, as a suite that anybody can run on theirs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from modelcache.errors import ModelNotFoundError
from modelcache.stores.base import Artifact, ArtifactStore, NotModified

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

_ARTIFACTS = {
    "plain.ubj": b"{" + bytes(range(256)) * 3,
    "both.tar.gz": b"the archive wins over the others",
    "both.ubj": b"second",
    "both.json": b"third",
    "tenant_a/nested.json": b"{}",
    "with space.ubj": b"x",
    "large.ubj": bytes(range(256)) * 8192,
    "empty.ubj": b"",
}


async def check_store(factory: Callable[[Mapping[str, bytes]], Awaitable[ArtifactStore]]) -> None:
    """Raise AssertionError if the stores that ``factory`` makes break the contract of :class:`ArtifactStore`.

    ``await factory(artifacts)`` has to return a fresh store that holds exactly ``artifacts``: bytes by file name.
    """
    store = await factory(_ARTIFACTS)
    try:
        await _check_bytes(store)
        await _check_suffixes(store)
        await _check_versions(store)
        await _check_missing(store)
        await _check_names(store)
    finally:
        await store.close()
    await store.close()  # harmless when done twice


async def _check_bytes(store: ArtifactStore) -> None:
    for file, data in _ARTIFACTS.items():
        artifact = await _fetch(store, file)
        got = await _read(artifact)
        assert got == data, f"{file}: {len(got)} bytes delivered, {len(data)} stored, or they differ"
        assert artifact.size in (None, len(data)), f"{file}: announced {artifact.size} bytes, has {len(data)}"
        digest = hashlib.sha256(data).hexdigest()
        assert artifact.digest in (None, digest), f"{file}: announced the SHA-256 {artifact.digest}, has {digest}"
    one, two = await _fetch(store, "large"), await _fetch(store, "plain")
    assert await _read(two) == _ARTIFACTS["plain.ubj"], "two fetches at once disturb each other"
    assert await _read(one) == _ARTIFACTS["large.ubj"], "two fetches at once disturb each other"


async def _check_suffixes(store: ArtifactStore) -> None:
    for name, file, suffix in (
        ("plain", "plain.ubj", ".ubj"),
        ("both", "both.tar.gz", ".tar.gz"),
        ("both.json", "both.json", ".json"),
        ("tenant_a/nested", "tenant_a/nested.json", ".json"),
        ("with space", "with space.ubj", ".ubj"),
    ):
        for _ in range(2):  # the second time the suffix is remembered
            artifact = await _fetch(store, name)
            assert await _read(artifact) == _ARTIFACTS[file], f"{name} has to find {file}"
            assert artifact.suffix == suffix, f"{name}: suffix {artifact.suffix!r} instead of {suffix!r}"


async def _check_versions(store: ArtifactStore) -> None:
    first, again = await _fetch(store, "plain"), await _fetch(store, "plain")
    await _read(first)
    await _read(again)
    assert isinstance(first.version, str), "a version is text"
    assert first.version, "a version is not empty"
    assert first.version == again.version, "the version of an unchanged artifact changed"
    same = await store.fetch("plain", if_version=first.version)
    assert isinstance(same, NotModified), "an unchanged artifact has to answer if_version with NotModified"
    other = await store.fetch("plain", if_version="another version")
    assert isinstance(other, Artifact), "another if_version has to answer with the artifact"
    await _read(other)


async def _check_missing(store: ArtifactStore) -> None:
    for name in ("missing", "plain.json", "tenant_a", "tenant_a/missing", "plain.ubj/below"):
        try:
            found = await store.fetch(name)
        except ModelNotFoundError:
            continue
        except Exception as error:
            raise AssertionError(f"a fetch of {name!r} has to raise ModelNotFoundError, not {error!r}") from error
        raise AssertionError(f"a fetch of {name!r} has to raise ModelNotFoundError, not return {found!r}")


async def _check_names(store: ArtifactStore) -> None:
    listing = getattr(store, "names", None)
    if listing is None:
        return
    every = [name async for name in listing("")]
    expected = ["both", "empty", "large", "plain", "tenant_a/nested", "with space"]
    assert sorted(every) == expected, f"names('') gave {sorted(every)}, not {expected}"
    below = [name async for name in listing("tenant_a/")]
    assert below == ["tenant_a/nested"], f"names('tenant_a/') gave {below}"


async def _fetch(store: ArtifactStore, name: str) -> Artifact:
    artifact = await store.fetch(name)
    assert isinstance(artifact, Artifact), f"a fetch of {name} returned {artifact!r}, not an Artifact"
    return artifact


async def _read(artifact: Artifact) -> bytes:
    data = b"".join([chunk async for chunk in artifact.chunks])
    aclose = getattr(artifact.chunks, "aclose", None)
    if aclose is not None:
        await aclose()
    return data

"""Artifacts that are replaced while they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from anyio import to_thread

import zoo
from modelcache import Artifact, ArtifactChangedError, LoadFailed, LocalStore, NotModified, StoreUnavailableError
from modelcache.testing import GatedStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from conftest import MakeRegistry

OLD, NEW = zoo.model(trees=3, seed=1), zoo.model(trees=4, seed=2)
ROWS = zoo.rows(3)


async def test_a_file_that_is_replaced_while_it_is_read_is_loaded_as_it_was(
    make_registry: MakeRegistry, tmp_path: Path
) -> None:
    """A4: the caller gets the answer of the version that was found; the new one is there for the next load."""

    class Folder(LocalStore):
        """A folder in which somebody replaces the file between its being found and its being read."""

        fetches = 0

        async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
            found = await super().fetch(name, if_version=if_version)
            self.fetches += 1
            if self.fetches == 1:
                await to_thread.run_sync(new.rename, tmp_path / "m.ubj")
            return found

    (tmp_path / "m.ubj").write_bytes(OLD.ubj)
    new = tmp_path / "new"
    new.write_bytes(NEW.ubj)
    store = Folder(tmp_path)
    registry = await make_registry(store)
    assert np.array_equal(await registry.predict("m", ROWS), OLD.expected(ROWS))
    await registry.unload("m")
    assert np.array_equal(await registry.predict("m", ROWS), NEW.expected(ROWS))
    assert store.fetches == 2
    assert registry.stats().load_failures == 0


class Restless(GatedStore):
    """A store whose artifact changes after its first half, ``changes`` times."""

    def __init__(self, changes: int, error: type[StoreUnavailableError] = ArtifactChangedError) -> None:
        super().__init__({"m.ubj": OLD.ubj, "m.tar.gz": OLD.targz})
        self.changes, self.error = changes, error
        self.open("m", "m.tar.gz")

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        found = await super().fetch(name, if_version=if_version)
        assert isinstance(found, Artifact)
        return Artifact(version="1", size=found.size, suffix=found.suffix, chunks=self._interrupted(found.chunks))

    async def _interrupted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        data = b"".join([chunk async for chunk in chunks])
        yield data[: len(data) // 2]
        if self.changes:
            self.changes -= 1
            raise self.error("m was replaced.")
        yield data[len(data) // 2 :]


@pytest.mark.parametrize("name", ["m", "m.tar.gz"])
@pytest.mark.parametrize("options", [{}, {"memory_budget": "1 MiB"}])
async def test_a_load_follows_five_changes(make_registry: MakeRegistry, name: str, options: dict[str, Any]) -> None:
    """A4: at once, with no pause that a clock could measure; nothing of the earlier tries stays charged."""
    store = Restless(5)
    registry = await make_registry(store, **options)
    assert np.array_equal(await registry.predict(name, ROWS), OLD.expected(ROWS))
    assert store.fetches == [name] * 6
    assert registry.stats().bytes_reserved == 0


async def test_a_load_does_not_follow_changes_for_ever(make_registry: MakeRegistry) -> None:
    """A4: the sixth is the caller's error, typed, and one failed load."""
    store = Restless(6)
    registry = await make_registry(store, failure_ttl=0)
    failed: list[Any] = []
    registry.subscribe(failed.append)
    with pytest.raises(ArtifactChangedError, match=r"m was replaced\."):
        await registry.load("m")
    assert store.fetches == ["m"] * 6
    assert [type(event) for event in failed] == [LoadFailed]
    await registry.load("m")


async def test_no_other_failure_begins_again(make_registry: MakeRegistry) -> None:
    """S1: a store tries again by itself; the loader would only multiply that."""
    store = Restless(1, StoreUnavailableError)
    registry = await make_registry(store, failure_ttl=0)
    with pytest.raises(StoreUnavailableError):
        await registry.load("m")
    assert store.fetches == ["m"]

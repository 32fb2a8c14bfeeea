"""What is shipped to plug-in writers: the suites pass what is right, catch what is wrong, and the fakes behave."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest

import zoo
from conftest import settle
from modelcache import Artifact, MemoryStore, ModelNotFoundError, NotModified, StoreError, StoreUnavailableError
from modelcache.names import SUFFIXES, split_suffix
from modelcache.testing import FakeClock, GatedStore, check_predictor, check_store
from modelcache.worker.predictors import XGBoostPredictor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Stores, each with one fault


class Changed(MemoryStore):
    """Changes each artifact that it delivers."""

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        found = await super().fetch(name, if_version=if_version)
        return self.change(found, name) if isinstance(found, Artifact) else found

    def change(self, artifact: Artifact, name: str) -> Artifact | NotModified:
        return artifact


class CutsShort(Changed):
    def change(self, artifact: Artifact, name: str) -> Artifact:
        async def first(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            async for chunk in chunks:
                yield chunk
                return

        return replace(artifact, chunks=first(artifact.chunks))


class AnnouncesWrongly(Changed):
    def change(self, artifact: Artifact, name: str) -> Artifact:
        return replace(artifact, size=(artifact.size or 0) + 1)


class AnnouncesAnotherDigest(Changed):
    def change(self, artifact: Artifact, name: str) -> Artifact:
        return replace(artifact, digest=hashlib.sha256(name.encode()).hexdigest())


class ForgetsItsSuffix(Changed):
    def change(self, artifact: Artifact, name: str) -> Artifact:
        return replace(artifact, suffix="")


class HasEverNewVersions(Changed):
    versions = 0

    def change(self, artifact: Artifact, name: str) -> Artifact:
        self.versions += 1
        return replace(artifact, version=f"{self.versions}")


class HasNoVersions(Changed):
    def change(self, artifact: Artifact, name: str) -> Artifact:
        return replace(artifact, version="")


class SharesItsReader(Changed):
    """Two fetches read from one place."""

    chunks: AsyncIterator[bytes] | None = None

    def change(self, artifact: Artifact, name: str) -> Artifact:
        if name in ("large", "plain"):
            self.chunks, last = artifact.chunks, self.chunks
            return replace(artifact, chunks=last) if last and name == "plain" else artifact
        return artifact


class PrefersAnotherSuffix(MemoryStore):
    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        for suffix in () if split_suffix(name)[1] else reversed(SUFFIXES):
            if name + suffix in self._artifacts:
                return await super().fetch(name + suffix, if_version=if_version)
        return await super().fetch(name, if_version=if_version)


class NeverSaysNotModified(MemoryStore):
    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        return await super().fetch(name)


class AlwaysSaysNotModified(MemoryStore):
    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        return NotModified(if_version) if if_version else await super().fetch(name)


class RaisesKeyError(MemoryStore):
    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        try:
            return await super().fetch(name, if_version=if_version)
        except ModelNotFoundError:
            raise KeyError(name) from None


class FindsWhatIsMissing(MemoryStore):
    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        return await super().fetch("plain" if name == "missing" else name, if_version=if_version)


class ListsSuffixes(MemoryStore):
    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        for name in self._artifacts:
            yield name


class ListsTwice(MemoryStore):
    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        for name in self._artifacts:
            if name.startswith(prefix):
                yield split_suffix(name)[0]


class IgnoresThePrefix(MemoryStore):
    async def names(self, prefix: str = "") -> AsyncIterator[str]:
        async for name in super().names():
            yield name


class ClosesOnce(MemoryStore):
    closed = False

    async def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


BAD_STORES = [
    CutsShort, AnnouncesWrongly, AnnouncesAnotherDigest, ForgetsItsSuffix, HasEverNewVersions, HasNoVersions,
    SharesItsReader, PrefersAnotherSuffix, NeverSaysNotModified, AlwaysSaysNotModified, RaisesKeyError,
    FindsWhatIsMissing, ListsSuffixes, ListsTwice, IgnoresThePrefix, ClosesOnce,
]  # fmt: skip


@pytest.mark.parametrize("store", BAD_STORES)
async def test_check_store_catches_a_fault(store: type[MemoryStore]) -> None:
    """Each of these stores is right but for one clause of the contract; the error says which."""

    async def make(artifacts: Any) -> MemoryStore:
        return store(artifacts)

    with pytest.raises(AssertionError, match=r"\w"):
        await check_store(make)


async def test_check_store_takes_a_store_that_cannot_list() -> None:
    """names() is optional, and a store may know neither sizes nor digests."""

    class Sizeless(Changed):
        names = None  # type: ignore[assignment]

        def change(self, artifact: Artifact, name: str) -> Artifact:
            return replace(artifact, size=None, digest=None)

    async def make(artifacts: Any) -> MemoryStore:
        return Sizeless(artifacts)

    await check_store(make)


# Predictors, each with one fault

UBJ = zoo.model(names=True).ubj


class Right(XGBoostPredictor):
    """What the others differ from by one thing."""

    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        self = super().load(data, threads=threads)
        self.spoil()
        return self

    def spoil(self) -> None:
        """Overridden by those whose fault is in what they say of themselves."""


class SaysFloat64(Right):
    def predict(self, rows: Any, output: str) -> Any:
        return super().predict(rows, output).astype(np.float64)


class ForgetsRows(Right):
    def predict(self, rows: Any, output: str) -> Any:
        return super().predict(rows, output)[:2]


class AddsADimension(Right):
    def predict(self, rows: Any, output: str) -> Any:
        return super().predict(rows, output).reshape(-1, 1, 1)


class DependsOnTheBatch(Right):
    def predict(self, rows: Any, output: str) -> Any:
        values = super().predict(rows, output)
        return values + np.float32(len(values) > 65)


class WritesIntoItsRows(Right):
    def predict(self, rows: Any, output: str) -> Any:
        values = super().predict(rows, output)
        rows[:] = 0
        return values


class FailsOnMissing(Right):
    def predict(self, rows: Any, output: str) -> Any:
        assert not np.isnan(rows).any(), "missing values"
        return super().predict(rows, output)


class TakesAnyOutput(Right):
    def predict(self, rows: Any, output: str) -> Any:
        return super().predict(rows, "value")


class FailsWithoutAWord(Right):
    def predict(self, rows: Any, output: str) -> Any:
        if output != "value":
            raise ValueError
        return super().predict(rows, output)


class TakesAnyBytes(Right):
    @classmethod
    def load(cls, data: memoryview, *, threads: int) -> Self:
        return super().load(memoryview(UBJ), threads=threads)


class HasNoFeatures(Right):
    def spoil(self) -> None:
        self.n_features = 0


class HasOneNameTooFew(Right):
    def spoil(self) -> None:
        assert self.feature_names
        self.feature_names = self.feature_names[1:]


class ListsItsNames(Right):
    def spoil(self) -> None:
        self.feature_names = list(self.feature_names or ())  # type: ignore[assignment]


class HasNoOutputs(Right):
    def spoil(self) -> None:
        self.n_outputs = 0


BAD_PREDICTORS = [
    SaysFloat64, ForgetsRows, AddsADimension, DependsOnTheBatch, WritesIntoItsRows, FailsOnMissing, TakesAnyOutput,
    FailsWithoutAWord, TakesAnyBytes, HasNoFeatures, HasOneNameTooFew, ListsItsNames, HasNoOutputs,
]  # fmt: skip


@pytest.mark.parametrize("predictor", BAD_PREDICTORS)
def test_check_predictor_catches_a_fault(predictor: type[Right]) -> None:
    """Each of these predictors is right but for one clause of the contract."""
    with pytest.raises(AssertionError, match=r"\w"):
        check_predictor(lambda: (predictor, UBJ))


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass", "softmax", "linear", "dart", "stopped"])
def test_the_shipped_predictor_keeps_the_contract(kind: str) -> None:
    """The suite passes XGBoost's models of every kind, with names and without."""
    check_predictor(lambda: (XGBoostPredictor, zoo.model(kind).ubj))
    check_predictor(lambda: (Right, UBJ))


# The fakes


def test_a_fake_clock_moves_when_told() -> None:
    """It stands still between two moves."""
    clock = FakeClock(5.0)
    assert (clock(), clock()) == (5.0, 5.0)
    clock.advance(2.5)
    assert clock() == 7.5


async def test_a_gated_store_finishes_fetches_when_told() -> None:
    """open lets those through that wait and those to come, shut makes the next wait, fail ends those that wait."""
    store = GatedStore({"a.ubj": b"one", "b.ubj": b"two"})
    one, two = (asyncio.create_task(store.fetch(name)) for name in "ab")
    await store.fetched(2)
    assert store.fetches == ["a", "b"]
    await settle()
    assert not one.done()
    store.open("a")
    assert isinstance(await one, Artifact)
    assert isinstance(await store.fetch("a"), Artifact)
    assert not two.done()
    store.fail("b", StoreUnavailableError("down"))
    with pytest.raises(StoreUnavailableError):
        await two
    store.shut("a")
    again = asyncio.create_task(store.fetch("a"))
    await store.fetched(4)
    await settle()
    assert not again.done()
    again.cancel()
    await settle()
    store.open("a")
    assert isinstance(await store.fetch("a"), Artifact), "one that was cancelled at the gate is no obstacle"
    assert not store.closed
    await store.close()
    assert store.closed


async def test_a_gated_store_keeps_the_contract_once_open() -> None:
    """With its gates open it is a store like any other."""

    class Open(GatedStore):
        async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
            self.open(name)
            return await super().fetch(name, if_version=if_version)

    async def make(artifacts: Any) -> GatedStore:
        return Open(artifacts)

    await check_store(make)


def test_errors_of_a_store_take_its_own_arguments() -> None:
    """A store's own kind of StoreError may have another signature, and still reaches every waiter as itself."""

    class ThrottledError(StoreError):
        def __init__(self, wait: float) -> None:
            super().__init__(f"try again in {wait} s", retry_after=wait)

    error = ThrottledError(3.0)
    fresh = error.fresh()
    assert (type(fresh), str(fresh), fresh.retry_after, fresh.__cause__) == (
        ThrottledError,
        "try again in 3.0 s",
        3.0,
        error,
    )

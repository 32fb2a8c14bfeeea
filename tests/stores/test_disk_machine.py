"""Local copies against simple models, in any order that hypothesis can think of: two objects share a folder.

DiskMachine is about DiskTier alone. Its model is what each name was last published with. A tier may have lost it to an
eviction; what it finds is the last publication if its own, or if it has just been opened, else that or an earlier one,
since a hit asks nobody. After each step files, index and figures agree, and the budget is kept.

FreshnessMachine is about what two registries make of it, whose versions are numbers that the store counts up. Rules S3
and A4: no load gives a version older than what the last refresh of that registry has, nor, in a registry that was
opened since, than what that of any registry has. The exception of the last: another process has published, after that
refresh, what it had begun to load before.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cachetools
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disk_rig import BUDGET, STORE, check, content, put, read, sha256
from modelcache import Artifact, DiskTier, ModelNotFoundError, NotModified, StoreUnavailableError, origin
from modelcache.origin import DamagedCopyError, Found, Origin, Saving
from modelcache.pool.artifacts import Saved
from modelcache.pool.pool import XGBOOST
from modelcache.stores.disk_tier import DiskCopy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

POLICIES: dict[str, Any] = {
    "gdsf": "gdsf", "lru": "lru", "s3fifo": "s3fifo", "cachetools": lambda: cachetools.LFUCache(4),
}  # fmt: skip

names = st.sampled_from("abcdef")
versions = st.sampled_from("12")
sizes = st.sampled_from([0, 1500, 2500, 4000, BUDGET, BUDGET + 1])
tiers = st.integers(0, 1)
few = st.sampled_from("aaab")
"""Where it takes several steps with one name to go wrong."""
kept_or_not = st.sampled_from([1500, 1500, BUDGET + 1])
mostly = st.sampled_from([True, True, True, False])


class DiskMachine(RuleBasedStateMachine):
    """Two tiers on one folder."""

    @initialize(policies=st.tuples(*[st.sampled_from(sorted(POLICIES))] * 2))
    def begin(self, policies: tuple[str, str]) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="disk-machine-"))
        self.runner = asyncio.Runner()
        self.policies = policies
        self.tiers = [DiskTier(self.root, budget=BUDGET, policy=POLICIES[policy]) for policy in policies]
        for tier in self.tiers:
            self.run(tier.open())
        self.published: dict[str, tuple[str, bytes]] = {}
        self.history: set[tuple[str, str, bytes]] = set()
        self.clock = 0.0
        self.last = self.tiers[0]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    @rule(which=tiers, name=names, version=versions, size=sizes, alias=st.booleans())
    def publish(self, which: int, name: str, version: str, size: int, alias: bool) -> None:
        tier = self.last = self.tiers[which]
        data = content("alias" if alias else name, version, size)
        self.clock += 1
        before = tier.bytes, tier.evictions
        copy = self.run(put(tier, name, data, version, validated_at=self.clock))
        if size > BUDGET:
            assert copy is None
            assert (tier.bytes, tier.evictions) == before, "nothing is evicted for what does not fit"
            return
        assert copy.path.read_bytes() == data
        assert self.run(tier.find(STORE, name)) == copy
        self.published[name] = version, data
        self.history.add((name, version, data))

    @rule(which=tiers, name=names)
    def load(self, which: int, name: str) -> None:
        """Find and read; again if the file was gone, as the index is asked then."""
        tier = self.last = self.tiers[which]
        data = self.run(read(tier, name)) or self.run(read(tier, name))
        copy = self.run(tier.find(STORE, name))
        if copy is None:
            assert not data
        else:
            assert (name, copy.version, data) in self.history

    @rule(which=tiers, name=names)
    def forget(self, which: int, name: str) -> None:
        tier = self.last = self.tiers[which]
        self.run(tier.forget(STORE, name))
        assert self.run(tier.find(STORE, name)) is None
        self.published.pop(name, None)

    @rule(which=tiers, name=names)
    def damage(self, which: int, name: str) -> None:
        tier = self.last = self.tiers[which]
        copy = self.run(tier.find(STORE, name))
        if copy is None or not copy.path.exists() or not copy.size:
            return
        copy.path.write_bytes(bytes(copy.size))
        while self.run(tier.find(STORE, name)) is not None:  # the file may have been published by the other since
            assert self.run(read(tier, name)) is None

    @rule(which=tiers, name=names)
    def revalidate(self, which: int, name: str) -> None:
        tier = self.tiers[which]
        copy = self.run(tier.find(STORE, name))
        self.clock += 1
        if copy is not None:
            self.run(tier.revalidated(copy, self.clock))
            after = self.run(tier.find(STORE, name))
            assert after is None or after.validated_at == self.clock or after.version != copy.version

    @rule(which=tiers, afresh=st.booleans())
    def reopen(self, which: int, afresh: bool) -> None:
        self.run(self.tiers[which].close())
        if afresh:
            self.tiers[which] = DiskTier(self.root, budget=BUDGET, policy=POLICIES[self.policies[which]])
        tier = self.last = self.tiers[which]
        self.run(tier.open())
        for name, (version, data) in self.published.items():
            copy = self.run(tier.find(STORE, name))
            assert copy is None or (copy.version, copy.path.read_bytes()) == (version, data)

    @invariant()
    def all_agree(self) -> None:
        check(self.root, BUDGET)
        assert sum(file.stat().st_size for file in (self.root / "models").iterdir()) <= self.last.budget
        for tier in self.tiers:
            assert not list(tier.incoming().parent.iterdir())
            assert {kind[0] for kind in tier._warned} <= {"too large"}

    def teardown(self) -> None:
        if hasattr(self, "root"):
            for tier in self.tiers:
                self.run(tier.close())
            self.runner.close()
            check(self.root, BUDGET)
            shutil.rmtree(self.root)


class Counting:
    """A store that has a number of each name, and tells which of them are out of reach."""

    url = STORE

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.is_down = False

    async def fetch(self, name: str, *, if_version: str | None = None) -> Artifact | NotModified:
        if self.is_down:
            raise StoreUnavailableError("The store is down.")
        if name in self.deleted:
            raise ModelNotFoundError("There is none.")
        version = str(self.counts[name])
        if version == if_version:
            return NotModified(version)
        return Artifact(version=version, size=None, suffix=".ubj", chunks=no_chunks())

    async def close(self) -> None:
        """Nothing is open."""


async def no_chunks() -> AsyncIterator[bytes]:
    return
    yield


class Copying(NamedTuple):
    """A load whose callers have been answered, and of which the copy is not published yet."""

    name: str
    found: Found
    incoming: Path


class Reader:
    """One registry, as far as it has to do with copies: it does what loader.py does, one step at a time."""

    def __init__(self, root: Path, store: Counting, refresh_after: float | None, floor: dict[str, int]) -> None:
        self.tier = DiskTier(root, budget=BUDGET)
        self.origin = Origin(store, self.tier, refresh_after=refresh_after, predictor=XGBOOST)
        self.store = store
        self.resident: dict[str, str] = {}
        self.loading: dict[str, Found] = {}
        self.copying: list[Copying] = []
        self.floor = floor
        """What the last refresh has returned."""

    def check(self, name: str, version: str) -> None:
        assert int(version) >= self.floor.get(name, 0), "older than what the last refresh has returned"

    async def find(self, name: str, *, fresh: bool) -> None:
        """Begin a load; with ``fresh`` that of a refresh."""
        with suppress(ModelNotFoundError, StoreUnavailableError):
            found = await self.origin.find(name, held=self.resident.get(name), fresh=fresh)
            version = found.version if isinstance(found, NotModified) else found.source.version
            self.check(name, version)
            if isinstance(found, NotModified):
                self.floor[name] = int(version)
            else:
                self.loading[name] = found
            return
        if fresh and not self.store.is_down:
            self.resident.pop(name, None)

    async def land(self, name: str, *, fresh: bool, size: int) -> None:
        """Complete a load: a copy that is gone is no load, and what the store has delivered is copied."""
        found = self.loading.pop(name)
        version = found.source.version
        if isinstance(found.source, DiskCopy):
            if not found.source.path.exists():
                with suppress(DamagedCopyError):
                    await self.origin.drop(found.source, FileNotFoundError())
                return
        else:
            incoming = self.tier.incoming()
            incoming.write_bytes(content(name, version, size))
            self.copying.append(Copying(name, found, incoming))
        self.check(name, version)
        self.resident[name] = version
        if fresh:
            self.floor[name] = int(version)

    async def keep(self, copying: Copying, *, is_written: bool) -> None:
        written: asyncio.Future[Saved | None] = asyncio.get_running_loop().create_future()
        data = copying.incoming.read_bytes()
        written.set_result(Saved(len(data), sha256(data)) if is_written else None)
        saving = Saving(copying.incoming, written)
        await self.origin.keep(copying.name, copying.found, saving, received=7, cost=1.0)


class FreshnessMachine(RuleBasedStateMachine):
    """Two registries on one folder, and a store whose artifacts change."""

    @initialize(refresh_after=st.sampled_from([None, 3.0]))
    def begin(self, refresh_after: float | None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="freshness-machine-"))
        self.runner = asyncio.Runner()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(origin, "wall_clock", self.tick)
        self.now = time.time() - 1_000_000
        self.store = Counting()
        self.store.counts = {"a": 1, "b": 1}
        self.refresh_after = refresh_after
        self.belated: set[str] = set()
        self.readers = [self.opened(), self.opened()]

    def tick(self) -> float:
        self.now += 1
        return self.now

    def opened(self, *others: Reader) -> Reader:
        floor: dict[str, int] = {}
        for name in {*"ab"} - self.belated:
            floor[name] = max([0, *(other.floor.get(name, 0) for other in others)])
        reader = Reader(self.root, self.store, self.refresh_after, floor)
        self.runner.run(reader.origin.open())
        return reader

    @rule(name=few)
    def put(self, name: str) -> None:
        self.store.counts[name] += 1
        self.store.deleted.discard(name)

    @precondition(lambda self: not self.store.deleted)
    @rule(name=few)
    def delete(self, name: str) -> None:
        self.store.deleted.add(name)

    @rule(which=tiers, name=few, fresh=st.booleans())
    def ask_in_vain(self, which: int, name: str, fresh: bool) -> None:
        """The store is down for a moment: a copy is loaded as it is, or nothing."""
        reader = self.readers[which]
        if name not in reader.loading and (fresh or name not in reader.resident):
            self.store.is_down = True
            self.runner.run(reader.find(name, fresh=fresh))
            self.store.is_down = False

    @rule(which=tiers, name=few, size=kept_or_not, lands=mostly)
    def load(self, which: int, name: str, size: int, lands: bool) -> None:
        """A call of a cold model, which is answered now or when this comes again."""
        reader = self.readers[which]
        if name not in reader.resident and name not in reader.loading:
            self.runner.run(reader.find(name, fresh=False))
        if name in reader.loading and lands:
            self.runner.run(reader.land(name, fresh=False, size=size))

    @precondition(lambda self: any(reader.loading for reader in self.readers))
    @rule(which=tiers, name=few)
    def fail_load(self, which: int, name: str) -> None:
        """What the store has does not load, or is unloaded before it does; the older version serves on."""
        self.readers[which].loading.pop(name, None)

    @rule(which=tiers, name=few, size=kept_or_not, loads=mostly)
    def refresh(self, which: int, name: str, size: int, loads: bool) -> None:
        """A load that had begun before does not enter the table."""
        reader = self.readers[which]
        earlier = reader.loading.pop(name, None)
        self.runner.run(reader.find(name, fresh=True))
        if name in reader.loading and loads:
            self.runner.run(reader.land(name, fresh=True, size=size))
        reader.loading.pop(name, None)
        if earlier is not None and isinstance(earlier.source, Artifact):  # its callers get it, and it is copied
            incoming = reader.tier.incoming()
            incoming.write_bytes(content(name, earlier.source.version, size))
            reader.copying.append(Copying(name, earlier, incoming))

    @precondition(lambda self: any(reader.copying for reader in self.readers))
    @rule(which=tiers, last=st.booleans(), is_written=mostly)
    def publish(self, which: int, last: bool, is_written: bool) -> None:
        reader = self.readers[which] if self.readers[which].copying else self.readers[not which]
        copying = reader.copying.pop(-1 if last else 0)
        if any(int(copying.found.source.version) < other.floor.get(copying.name, 0) for other in self.readers):
            self.belated.add(copying.name)
        self.runner.run(reader.keep(copying, is_written=is_written))

    @precondition(lambda self: any(reader.resident for reader in self.readers))
    @rule(which=tiers, name=few)
    def evict(self, which: int, name: str) -> None:
        self.readers[which].resident.pop(name, None)

    @rule(which=tiers)
    def restart(self, which: int) -> None:
        self.runner.run(self.readers[which].origin.close())
        self.readers[which] = self.opened(*self.readers)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            for reader in self.readers:
                self.runner.run(reader.origin.close())
            self.runner.close()
            self.patch.undo()
            shutil.rmtree(self.root)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_what_another_process_publishes_late_is_no_older_copy_to_serve() -> None:
    """A4: it had begun to load the old version before the refresh, of whose version there is no copy."""
    state = FreshnessMachine()
    state.begin(refresh_after=None)
    state.load(which=0, name="a", size=1500, lands=True)
    state.put(name="a")
    state.refresh(which=1, name="a", size=BUDGET + 1, loads=True)
    state.publish(which=0, last=False, is_written=True)
    assert state.readers[0].tier.copies == 1
    state.evict(which=1, name="a")
    state.load(which=1, name="a", size=1500, lands=False)
    assert state.readers[1].loading["a"].source.version == "2"
    state.restart(which=0)
    assert state.readers[0].tier.copies == 0
    state.teardown()


TestFreshnessMachine = FreshnessMachine.TestCase
TestFreshnessMachine.settings = settings(TestDiskMachine.settings, max_examples=30, stateful_step_count=40)

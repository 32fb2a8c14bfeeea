"""DiskTier against a simple model, in any order that hypothesis can think of: two objects share a folder.

The model is what each name was last published with. A tier may have lost it to an eviction; what it finds is the last
publication if its own, or if it has just been opened, else that or an earlier one, since a hit asks nobody. After each
step files, index and figures agree, and the budget is kept.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cachetools
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from disk_rig import BUDGET, STORE, check, content, put, read
from modelcache.stores.disk_tier import DiskTier

if TYPE_CHECKING:
    from collections.abc import Coroutine

POLICIES: dict[str, Any] = {
    "gdsf": "gdsf", "lru": "lru", "s3fifo": "s3fifo", "cachetools": lambda: cachetools.LFUCache(4),
}  # fmt: skip

names = st.sampled_from("abcdef")
versions = st.sampled_from("12")
sizes = st.sampled_from([0, 1500, 2500, 4000, BUDGET, BUDGET + 1])
tiers = st.integers(0, 1)


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


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

"""DiskTier: local copies of artifacts, under a budget of their own, shared by processes that may die at any moment."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import time
from contextlib import closing, suppress
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread

import disk_rig
import oracle
from disk_rig import BUDGET, STORE, check, content, put, read, sha256
from modelcache.cache.policies import Evictable, LRUPolicy
from modelcache.errors import RegistryClosedError, StoreAccessDeniedError, StoreError, StoreUnavailableError
from modelcache.stores import disk_folder, disk_index
from modelcache.stores.disk_tier import DiskCopy, DiskTier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    MakeTier = Callable[..., Awaitable[DiskTier]]


@pytest.fixture
async def make_tier(tmp_path: Path) -> AsyncIterator[MakeTier]:
    """Make opened tiers; after the test they are closed, and no descriptor and no temporary file is left."""
    made: list[DiskTier] = []
    descriptors = oracle.open_descriptors()

    async def make(path: Path = tmp_path / "cache", **options: Any) -> DiskTier:
        tier = DiskTier(path, **({"budget": BUDGET} | options))
        made.append(tier)
        await tier.open()
        return tier

    yield make
    for tier in made:
        await tier.close()
        incoming = tier.path / "incoming"
        assert not incoming.exists() or tier is not made[-1] or not list(incoming.iterdir())
    await oracle.descriptors_come_back(descriptors)


@pytest.fixture(scope="module")
def mother() -> Iterator[disk_rig.Mother]:
    """The process that forks children."""
    mother = disk_rig.Mother()
    yield mother
    mother.end()


async def test_a_published_copy_is_found(make_tier: MakeTier, tmp_path: Path) -> None:
    """What was published is what find() returns: the same facts, and a file with exactly these bytes."""
    tier = await make_tier()
    assert await tier.find(STORE, "a") is None
    copy = await put(tier, "a", b"one", "v1", suffix=".json", artifact_bytes=42, validated_at=5.0)
    assert copy is not None
    assert await tier.find(STORE, "a") is copy
    assert copy == DiskCopy(
        store=STORE, name="a", version="v1", suffix=".json", size=3, digest=sha256(b"one"), artifact_bytes=42,
        validated_at=5.0, folder=tmp_path / "cache" / "models", serial=copy.serial,
    )  # fmt: skip
    assert copy.path.read_bytes() == b"one"
    assert await tier.find("s3://another", "a") is None, "stores are told apart"
    assert (tier.bytes, tier.copies, tier.evictions, tier.budget) == (3, 1, 0, BUDGET)
    assert repr(tier) == f"<DiskTier {tmp_path / 'cache'} 1 copies, 3 B of 9.8 KiB>"
    check(tier.path, BUDGET, tier)


async def test_a_hit_asks_nobody(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that this process knows is found without a thread and without a turn of the loop."""
    tier = await make_tier()
    copy = await put(tier, "a", b"one")
    monkeypatch.setattr(tier, "_in_thread", None)
    finding = tier.find(STORE, "a")
    with pytest.raises(StopIteration) as found:
        finding.send(None)
    assert found.value.value is copy


async def test_a_new_version_takes_the_place_of_the_old(make_tier: MakeTier) -> None:
    """One name has one copy; the file of the old one goes, unless another name needs it."""
    tier = await make_tier()
    await put(tier, "a", b"one", "v1")
    await put(tier, "b", b"one", "v1")
    await put(tier, "a", b"three", "v2")
    assert await read(tier, "a") == b"three"
    assert await read(tier, "b") == b"one"
    check(tier.path, BUDGET, tier)
    await put(tier, "b", b"three", "v2")
    assert (tier.bytes, tier.copies, tier.evictions) == (5, 2, 0)
    check(tier.path, BUDGET, tier)


async def test_equal_bytes_are_kept_and_counted_once(make_tier: MakeTier) -> None:
    """Files are named by their content: two names with equal bytes share one, and the last to go removes it."""
    tier = await make_tier()
    first = await put(tier, "a", bytes(6000))
    second = await put(tier, "b", bytes(6000))
    assert first is not None
    assert second is not None
    assert first.path == second.path
    assert (tier.bytes, tier.copies, tier.evictions) == (6000, 2, 0), "twice would be beyond the budget"
    await tier.forget(STORE, "a")
    assert await read(tier, "b") == bytes(6000)
    await tier.forget(STORE, "b")
    await tier.forget(STORE, "b")  # harmless
    assert (tier.bytes, tier.copies) == (0, 0)
    check(tier.path, BUDGET, tier)


async def test_it_survives_a_restart(make_tier: MakeTier) -> None:
    """What one object has published the next one finds, with all facts, and evicts in the order of use."""
    tier = await make_tier(policy="lru")
    copies = {name: await put(tier, name, content(name, "1", 3000)) for name in "abc"}
    await tier.find(STORE, "a")
    await tier.close()
    await tier.close()
    again = await make_tier(policy="lru")
    assert (again.bytes, again.copies) == (9000, 3)
    await put(again, "d", content("d", "1", 3000))
    assert {name: await again.find(STORE, name) for name in "abc"} == copies | {"b": None}
    check(again.path, BUDGET, again)


async def test_the_policy_knows_after_a_restart_what_was_used(make_tier: MakeTier) -> None:
    """Uses are in the index: a copy that was used often outlives one that came later and costs as much."""
    tier = await make_tier()
    for name in "abc":
        await put(tier, name, content(name, "1", 3000))
    for _ in range(5):
        await tier.find(STORE, "a")
    await tier.find(STORE, "b")
    await tier.close()
    tier = await make_tier()
    for name in "de":
        await put(tier, name, content(name, "1", 3000))
    assert [name for name in "abcde" if await tier.find(STORE, name)] == ["a", "b", "e"]


async def test_eviction_is_the_policy_s(make_tier: MakeTier) -> None:
    """GDSF, the default, lets go what is cheap to get again; evictions are counted."""
    tier = await make_tier()
    await put(tier, "dear", content("dear", "1", 4000), cost=60.0)
    await put(tier, "cheap", content("cheap", "1", 4000), cost=0.1)
    await put(tier, "new", content("new", "1", 4000), cost=1.0)
    assert [name for name in ("dear", "cheap", "new") if await tier.find(STORE, name)] == ["dear", "new"]
    assert tier.evictions == 1
    check(tier.path, BUDGET, tier)


class FicklePolicy(LRUPolicy):
    """Goes wrong in one way."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def insert(self, entry: Evictable) -> None:
        if self.mode == "insert":
            raise RuntimeError("insert")
        super().insert(entry)

    def evict(self) -> Evictable | None:
        if self.mode == "evict":
            raise RuntimeError("evict")
        return None if self.mode == "lost track" else super().evict()


@pytest.mark.parametrize("mode", ["insert", "evict", "lost track"])
async def test_a_policy_that_fails_is_replaced(
    make_tier: MakeTier, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """L7: a policy that raises or loses track costs no copy but the least recently used, and a warning."""
    tier = await make_tier(policy=FicklePolicy(mode))
    for name in "abc":
        await put(tier, name, content(name, "1", 3000))
    await tier.find(STORE, "a")
    await put(tier, "d", content("d", "1", 3000))
    assert [name for name in "abcd" if await tier.find(STORE, name)] == ["a", "c", "d"]
    assert "least-recently-used order replaces it" in caplog.text
    check(tier.path, BUDGET, tier)


def test_a_wrong_option_is_refused_at_once(tmp_path: Path) -> None:
    """A budget or a policy that nobody could mean is refused where it is written."""
    with pytest.raises(ValueError, match="is no size"):
        DiskTier(tmp_path, budget="lots")
    with pytest.raises(ValueError, match="no eviction policy is named"):
        DiskTier(tmp_path, policy="best")


async def test_the_default_budget_is_half_of_the_free_space(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tier has counts as free: a restart does not halve the budget again."""
    monkeypatch.setattr(disk_folder.CacheFolder, "free", lambda _: 5000)
    tier = await make_tier(budget=None)
    assert tier.budget == 2500
    await put(tier, "a", bytes(1000))
    await tier.close()
    monkeypatch.setattr(disk_folder.CacheFolder, "free", lambda _: 4000)
    assert (await make_tier(budget=None)).budget == 2500


async def test_a_smaller_budget_evicts_when_opened(make_tier: MakeTier) -> None:
    """Copies from before are kept as far as the budget of today goes."""
    tier = await make_tier(policy="lru")
    for name in "abc":
        await put(tier, name, content(name, "1", 3000))
    await tier.close()
    small = await make_tier(policy="lru", budget="4 kB")
    assert (small.copies, small.evictions) == (1, 2)
    assert await small.find(STORE, "c") is not None
    check(small.path, 4000, small)


async def test_a_copy_larger_than_the_budget_is_not_kept(make_tier: MakeTier, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is evicted for it; the file is removed, and the warning comes once."""
    tier = await make_tier()
    await put(tier, "a", bytes(9000))
    for name in "bc":
        assert await put(tier, name, bytes(BUDGET + 1)) is None
    assert await tier.find(STORE, "a") is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"the disk cache {tier.path} does not keep b: it has 10,001 bytes, more than the whole budget of 10,000"
    ]
    assert not list(tier.incoming().parent.iterdir())


@pytest.mark.parametrize(
    "lie", [{"size": 4}, {"digest": "../../../etc/passwd"}, {"digest": "AB" * 32}, {"version": "\udce9"}]
)
async def test_what_cannot_be_true_is_not_published(
    make_tier: MakeTier, caplog: pytest.LogCaptureFixture, lie: dict[str, Any]
) -> None:
    """A size that is not the file's, a digest that is none, text that no database takes: no copy, and no error."""
    tier = await make_tier()
    assert await put(tier, "a", b"one", **lie) is None
    assert len(caplog.records) == 1
    assert await tier.find(STORE, "a") is None
    assert not list(tier.incoming().parent.iterdir())
    check(tier.path, BUDGET, tier)


async def test_a_file_that_was_never_written_is_no_copy(make_tier: MakeTier, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that died before it wrote leaves nothing to publish, and nothing to discard."""
    tier = await make_tier()
    missing = tier.incoming()
    facts: dict[str, Any] = {"version": "1", "suffix": "", "size": 1, "artifact_bytes": 1, "cost": 1, "validated_at": 0}
    assert await tier.publish(missing, store=STORE, name="a", digest=sha256(b""), **facts) is None
    assert "could not keep a: [Errno 2]" in caplog.text
    await tier.discard(missing)
    half = tier.incoming()
    half.write_bytes(b"half")
    await tier.discard(half)
    assert not half.exists()
    assert half != missing


async def test_a_cancelled_publication_leaves_no_file(make_tier: MakeTier) -> None:
    """Cancelled before its thread has begun, its file is removed by the next call that has one."""
    tier = await make_tier()
    publication = asyncio.ensure_future(put(tier, "a", b"one"))
    await asyncio.sleep(0)
    publication.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publication
    await tier.find(STORE, "b")
    await put(tier, "c", b"three")
    assert not list(tier.incoming().parent.iterdir())
    check(tier.path, BUDGET)


async def test_a_damaged_copy_is_dropped(make_tier: MakeTier) -> None:
    """The reader tells by the digest; the file goes, with every name that shares it, and can be published again."""
    tier = await make_tier()
    copy = await put(tier, "a", b"one")
    await put(tier, "b", b"one")
    assert copy is not None
    copy.path.write_bytes(b"onE")
    assert await read(tier, "a") is None
    assert await tier.find(STORE, "b") is None
    assert (tier.bytes, tier.copies) == (0, 0)
    check(tier.path, BUDGET, tier)
    await put(tier, "a", b"one")
    assert await read(tier, "a") == b"one"


async def test_publishing_heals_a_damaged_file(make_tier: MakeTier) -> None:
    """The file of a publication always takes the place of the one that is there."""
    tier = await make_tier()
    copy = await put(tier, "a", b"one")
    assert copy is not None
    copy.path.write_bytes(b"onE")
    await put(tier, "b", b"one")
    check(tier.path, BUDGET, tier)
    await tier.drop(copy)
    assert await read(tier, "a") == b"one", "what was dropped is the publication before"


async def test_revalidation_moves_the_date(make_tier: MakeTier) -> None:
    """validated_at is what the store said last, here and after a restart, and moves for that version only."""
    tier = await make_tier()
    old = await put(tier, "a", b"one", "v1", validated_at=5.0)
    assert old is not None
    await tier.revalidated(old, 9.0)
    assert await tier.find(STORE, "a") == replace(old, validated_at=9.0)
    new = await put(tier, "a", b"two", "v2", validated_at=10.0)
    await tier.revalidated(old, 11.0)
    assert await tier.find(STORE, "a") == new
    await tier.close()
    assert await (await make_tier()).find(STORE, "a") == new


async def test_a_copy_that_another_has_evicted_is_not_revalidated(make_tier: MakeTier) -> None:
    """The index is asked anyway: what it does not list is a miss from then on."""
    tier, other = await make_tier(policy="lru"), await make_tier(policy="lru")
    copy = await put(tier, "a", content("a", "1", 6000))
    assert copy is not None
    await put(other, "b", content("b", "1", 6000))
    await tier.revalidated(copy, 9.0)
    assert await tier.find(STORE, "a") is None


async def test_a_version_that_the_store_gave_earlier_does_not_replace_a_later_one(make_tier: MakeTier) -> None:
    """F10, between processes: a slow load must not bring the old version back.

    1. A asks the store, and gets v1. 2. B asks, gets v2, and publishes it. 3. A has loaded v1, and would publish it.
    """
    tier, other = await make_tier(), await make_tier()
    await put(other, "a", b"two", "v2", validated_at=20.0)
    assert await put(tier, "a", b"one", "v1", validated_at=10.0) is None
    assert await read(tier, "a") == b"two"
    check(tier.path, BUDGET)
    future = time.time() + 1e6  # the clock was set back since
    await put(other, "a", b"three", "v3", validated_at=future)
    assert await put(tier, "a", b"four", "v4", validated_at=30.0) is not None
    assert await read(tier, "a") == b"four"


# Publications that wait together


async def test_publications_that_wait_are_made_together(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while a thread is busy shares one visit and one transaction, and each call gets its own copy."""
    tier = await make_tier()
    groups: list[int] = []
    publish = tier._catalogue.publish
    monkeypatch.setattr(tier._catalogue, "publish", lambda group: groups.append(len(group)) or publish(group))  # type: ignore[func-returns-value]
    copies = await asyncio.gather(*(put(tier, name, name.encode()) for name in "abcdef"))
    assert len(groups) < 6
    assert sum(groups) == 6
    assert [copy and copy.name for copy in copies] == [*"abcdef"]
    assert [await read(tier, name) for name in "abcdef"] == [name.encode() for name in "abcdef"]
    check(tier.path, BUDGET, tier)


@pytest.mark.parametrize("lie", [{"version": "\udce9"}, {"size": 4}, {"digest": "no digest"}, {"name": "\udce9"}])
async def test_one_that_cannot_be_published_takes_none_with_it(make_tier: MakeTier, lie: dict[str, Any]) -> None:
    """The others of its group are made without it."""
    tier = await make_tier()
    bad = {"name": "bad", "version": "1"} | lie
    copies = await asyncio.gather(
        put(tier, "a", b"one"), put(tier, "b", b"two"), put(tier, data=b"bad", **bad), put(tier, "c", b"three")
    )
    assert [copy and copy.name for copy in copies] == ["a", "b", None, "c"]
    assert [await read(tier, name) for name in "abc"] == [b"one", b"two", b"three"]
    assert not list(tier.incoming().parent.iterdir())
    check(tier.path, BUDGET, tier)


async def test_a_group_larger_than_the_budget(make_tier: MakeTier) -> None:
    """Later ones evict earlier ones of their group, which get None: nothing is found whose file was never moved."""
    tier = await make_tier(policy="lru")
    names = "abcdef"
    copies = await asyncio.gather(*(put(tier, name, content(name, "1", 4000)) for name in names))
    assert [name for name in names if await read(tier, name)] == ["e", "f"]
    assert all(copies[-2:])
    assert all(copy is None or copy.name == name for copy, name in zip(copies, names, strict=True))
    check(tier.path, BUDGET, tier)


async def test_a_group_with_one_name_and_equal_bytes(make_tier: MakeTier) -> None:
    """The last version of a name stays, and what another name needs of the earlier ones."""
    tier = await make_tier()
    await put(tier, "x", b"zero")
    await asyncio.gather(
        put(tier, "x", b"xx"), put(tier, "a", b"one", "v1"), put(tier, "a", b"two", "v2"), put(tier, "b", b"one", "v1"),
        put(tier, "a", b"three", "v3"), put(tier, "c", b"three", "v3"),
    )  # fmt: skip
    assert [await read(tier, name) for name in "abc"] == [b"three", b"one", b"three"]
    assert (tier.copies, tier.bytes) == (4, 10)
    check(tier.path, BUDGET, tier)


async def test_what_waits_is_found_and_is_there_after_a_close(make_tier: MakeTier) -> None:
    """A name that is about to be published is no miss; close() publishes what waits."""
    tier = await make_tier()
    puts = [asyncio.ensure_future(put(tier, name, name.encode())) for name in "abc"]
    await asyncio.sleep(0)
    assert await tier.find(STORE, "c") is not None
    puts += [asyncio.ensure_future(put(tier, name, name.encode())) for name in "def"]
    await asyncio.sleep(0)
    await tier.close()
    assert all(await asyncio.gather(*puts))
    tier = await make_tier()
    assert tier.copies == 6
    check(tier.path, BUDGET, tier)


async def test_a_publication_that_waits_for_others_is_not_waited_for(make_tier: MakeTier) -> None:
    """It may gather others for hours: whoever asks for its name, or closes the tier, has it made at once."""
    tier = await make_tier()
    first = asyncio.ensure_future(put(tier, "a", b"one", within=3600))
    await asyncio.sleep(0)
    assert await read(tier, "a") == b"one"
    first.cancel()
    others = [asyncio.ensure_future(put(tier, name, b"two", within=3600)) for name in "bc"]
    await asyncio.sleep(0)
    await tier.close()
    for other in others:
        other.cancel()
    tier = await make_tier()
    assert [await read(tier, name) for name in "abc"] == [b"one", b"two", b"two"]
    check(tier.path, BUDGET, tier)


async def test_a_cancelled_leader_does_not_stop_its_group(make_tier: MakeTier) -> None:
    """Whoever has taken the waiting ones to the thread may be cancelled; the thread, or the next one, goes on."""
    tier = await make_tier()
    puts = [asyncio.ensure_future(put(tier, name, name.encode())) for name in "abcd"]
    await asyncio.sleep(0)
    puts[0].cancel()
    puts[2].cancel()
    await asyncio.wait(puts)
    assert puts[1].result()
    assert puts[3].result()
    assert await read(tier, "d") == b"d"
    await put(tier, "e", b"e")
    assert not list(tier.incoming().parent.iterdir())
    check(tier.path, BUDGET)


async def test_equal_bytes_do_not_take_the_place_of_sound_ones(make_tier: MakeTier) -> None:
    """A file that has its bytes stays: replacing one makes some file systems write the new one to the disk at once."""
    tier = await make_tier()
    first = await put(tier, "a", b"one")
    assert first is not None
    before = first.path.stat().st_ino
    await put(tier, "b", b"one")
    assert first.path.stat().st_ino == before
    assert not list(tier.incoming().parent.iterdir())
    found = await tier.find(STORE, "a")
    assert found is not None
    assert found.serial > first.serial, "to drop the first is not to drop what was published since"


# Several processes


async def test_a_miss_asks_nobody_while_nobody_publishes(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has all that there is, until another process has published something; and again after that is read."""
    tier, other = await make_tier(), await make_tier()
    looks: list[str] = []
    look_up = tier._catalogue.look_up
    monkeypatch.setattr(tier._catalogue, "look_up", lambda *what: looks.append(what[1]) or look_up(*what))  # type: ignore[func-returns-value]
    await put(tier, "mine", b"one")
    assert await tier.find(STORE, "a") is None
    assert looks == []
    await put(other, "theirs", b"two")
    assert await tier.find(STORE, "a") is None
    assert looks == ["a"]
    assert await tier.find(STORE, "theirs") is not None
    await put(tier, "mine", b"three")
    looks.clear()
    assert await tier.find(STORE, "a") is None
    assert looks == []
    await tier.forget(STORE, "theirs")
    assert await tier.find(STORE, "theirs") is None
    assert looks == []


async def test_a_publication_that_was_announced_but_not_made_hides_no_other(make_tier: MakeTier) -> None:
    """1. A announces, and is killed before it commits. 2. B publishes. 3. C, who has seen the first mark, finds it."""
    tier, other = await make_tier(), await make_tier()
    assert other._catalogue._changes is not None
    other._catalogue._changes.change()
    assert await tier.find(STORE, "a") is None
    await put(other, "a", b"one")
    assert await read(tier, "a") == b"one"


@pytest.mark.parametrize("damage", ["truncated", "removed", "zeroed", "removed, and there is another"])
async def test_what_others_do_to_the_mark_hides_nothing(make_tier: MakeTier, damage: str) -> None:
    """What is published after it is found, by those who had the file open and by those who come, and nobody crashes."""
    tier, other = await make_tier(), await make_tier()
    await put(tier, "before", b"one")
    assert await tier.find(STORE, "after") is None
    mark = tier.path / "changes"
    if damage in ("truncated", "zeroed"):
        os.truncate(mark, 0)
        mark.write_bytes(bytes(8) if damage == "zeroed" else b"")
    else:
        mark.unlink()
    late = await make_tier() if "another" in damage else other
    await put(late, "after", b"two")
    for one in (tier, other, late, await make_tier()):
        assert await read(one, "before") == b"one"
        assert await read(one, "after") == b"two"
        assert await one.find(STORE, "never") is None
    await put(tier, "again", b"three")
    for one in (tier, other, late):
        assert await read(one, "again") == b"three"


async def test_another_object_finds_what_was_published_since(make_tier: MakeTier) -> None:
    """A miss asks the index that all share; what another has evicted is a miss once it was dropped."""
    tier, other = await make_tier(policy="lru"), await make_tier(policy="lru")
    await put(other, "a", content("a", "1", 6000))
    assert await read(tier, "a") == content("a", "1", 6000)
    await put(other, "b", content("b", "1", 6000))
    stale = await tier.find(STORE, "a")
    assert stale is not None
    assert not stale.path.exists()
    assert await read(tier, "a") is None
    assert await tier.find(STORE, "a") is None
    await put(tier, "c", content("c", "1", 6000))
    assert await read(other, "b") is None, "it makes room with what the other has published"
    check(tier.path, BUDGET, tier)


async def test_a_stale_drop_spares_what_was_published_since(make_tier: MakeTier) -> None:
    """A copy is dropped by identity: another process may have replaced the file that was found damaged."""
    tier, other = await make_tier(), await make_tier()
    found = await put(tier, "a", b"one")
    assert found is not None
    await other.drop(found)
    await put(other, "a", b"one")
    await tier.drop(found)
    assert await read(tier, "a") == b"one"
    check(tier.path, BUDGET, tier)


async def test_files_that_others_removed_do_not_pile_up(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranking forgets them now and then."""
    monkeypatch.setattr("modelcache.stores.disk_catalogue._STRANGERS", 5)
    tier, other = await make_tier(), await make_tier()
    for number in range(40):
        await put(other, "a", b"%d" % number)
        await put(tier, "b", b"b%d" % number)
    assert len(tier._catalogue.ranking) <= 2 + 5
    check(tier.path, BUDGET)


async def test_processes_share_a_folder(make_tier: MakeTier, tmp_path: Path, mother: disk_rig.Mother) -> None:
    """Publishing, finding and evicting the same names side by side: right bytes or none, the budget always kept."""
    orders = [{"do": "share", "root": str(tmp_path / "cache"), "seed": seed, "rounds": 120} for seed in range(3)]
    assert mother.run(*orders) == [0, 0, 0]
    check(tmp_path / "cache", BUDGET)
    tier = await make_tier()
    check(tier.path, BUDGET, tier)


async def test_a_process_is_killed_at_any_step(make_tier: MakeTier, tmp_path: Path, mother: disk_rig.Mother) -> None:
    """SIGKILL before each change of a file and each statement: no copy is wrong, nothing is left at the next open."""
    template = tmp_path / "template"
    tier = await make_tier(template, policy="lru")
    for name in "abc":
        await put(tier, name, content(name, "1", 3000))
    await tier.close()
    outcomes, codes = set(), [-9]
    steps = count()
    while codes[-1]:
        roots = {tmp_path / f"killed at {step}": step for step in islice(steps, 16)}
        for root in roots:
            shutil.copytree(template, root)
        codes = mother.run(*({"do": "publish_some", "root": str(root), "step": step} for root, step in roots.items()))
        assert set(codes) <= {-9, 0}
        for root in roots:
            outcomes.add(await _survivors(make_tier, root))
    assert next(steps) > 80
    assert outcomes == {"abc", "bcd", "cd"}


async def _survivors(make_tier: MakeTier, root: Path) -> str:
    tier = await make_tier(root, policy="lru")
    found = {name: await read(tier, name) for name in "abcd"}
    assert all(data in (None, *_versions(name)) for name, data in found.items())
    check(root, BUDGET, tier)
    assert os.listdir(root / "incoming") == [tier.incoming().parent.name]  # noqa: PTH208
    await tier.close()
    return "".join(name for name in found if found[name])


def _versions(name: str) -> list[bytes]:
    return [content(name, version, 4000 if name == "d" else 3000) for version in "12"]


async def test_a_live_process_keeps_its_files(make_tier: MakeTier) -> None:
    """Only what dead processes were writing is removed, told by their locks."""
    tier = await make_tier()
    writing = tier.incoming()
    writing.write_bytes(b"half")
    dead = writing.parent.parent / "0123456789abcdef"
    dead.mkdir()
    (dead / "1").write_bytes(b"half")
    unlisted, foreign = (tier.path / "models" / name for name in (sha256(b"?"), "notes.txt"))
    for file in (unlisted, foreign):
        file.write_bytes(b"?")
    await make_tier()
    assert writing.exists()
    assert not dead.exists()
    assert not unlisted.exists()
    assert foreign.exists(), "what is no copy is not ours"
    foreign.unlink()
    await tier.open()  # harmless when done twice
    assert writing.exists()


async def test_copies_whose_files_are_gone_are_forgotten(make_tier: MakeTier) -> None:
    """Somebody tidied up, or the power failed: what is not there, or not whole, is not listed after an open."""
    tier = await make_tier()
    copies = {name: await put(tier, name, content(name, "1", 100)) for name in "abc"}
    await tier.close()
    assert copies["a"]
    assert copies["b"]
    copies["a"].path.unlink()
    copies["b"].path.write_bytes(b"")
    tier = await make_tier()
    assert [name for name in "abc" if await tier.find(STORE, name)] == ["c"]
    check(tier.path, BUDGET, tier)


# Faults of the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_full_disk(small_disk: Path, make_tier: MakeTier, caplog: pytest.LogCaptureFixture) -> None:
    """A4: nothing is kept, nothing raised; what is there goes on being found, and there is one warning of each kind."""
    tier = await make_tier(small_disk / "cache", budget="1 MiB")
    kept = [name for name in "abcd" if await put(tier, name, content(name, "1", 20_000))]
    _fill(small_disk / "ballast")
    incoming = tier.incoming()
    with pytest.raises(OSError, match="No space left"):
        incoming.write_bytes(bytes(40_000))
    await tier.discard(incoming)
    _fill(small_disk / "more ballast")
    empty = sha256(b"")
    facts: dict[str, Any] = {"suffix": "", "size": 0, "artifact_bytes": 1, "cost": 1, "validated_at": 2000.0}
    refused = 0
    for number in range(200):  # until the database has no room for its log
        incoming = tier.incoming()
        incoming.touch()
        name = f"model {number} " + "x" * 1000
        copy = await tier.publish(incoming, store=STORE, name=name, version="1", digest=empty, **facts)
        refused += copy is None
    assert refused
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == ["database or disk is full"]
    assert [name for name in kept if await read(tier, name)] == kept
    check(tier.path, 1 << 20)
    (small_disk / "ballast").unlink()
    assert await put(tier, "e", b"room again") is not None
    check(tier.path, 1 << 20, tier)


def _fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


async def test_a_disk_that_is_full_from_the_start(small_disk: Path, make_tier: MakeTier) -> None:
    """There is no tier then, and the error says why."""
    _fill(small_disk / "ballast")
    with pytest.raises(StoreUnavailableError, match=r"could not be opened: .*(full|space|I/O)"):
        await make_tier(small_disk / "cache")


async def test_a_read_only_disk(small_disk: Path, make_tier: MakeTier) -> None:
    """A folder that nobody can write to is no place for a cache: the error names the remedy."""
    await (await make_tier(small_disk / "cache")).close()
    await to_thread.run_sync(subprocess.check_call, ["mount", "-o", "remount,ro", str(small_disk)])
    with pytest.raises(StoreAccessDeniedError, match=r"Read-only file system.*: make the folder writable"):
        await make_tier(small_disk / "cache")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EACCES, StoreAccessDeniedError, "cannot be written to .*: make the folder writable for this user"),
        (errno.EROFS, StoreAccessDeniedError, "cannot be written to .*: make the folder writable for this user"),
        (errno.EIO, StoreUnavailableError, "could not be opened: .*Input/output error"),
    ],
)
async def test_a_folder_that_cannot_be_opened(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError], message: str
) -> None:
    """The error names the folder and the remedy, and leaves no descriptor open."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk_index.Index, "sizes", fail)
    with pytest.raises(kind, match=message) as caught:
        await make_tier()
    assert type(caught.value) is kind


async def test_a_path_that_is_no_folder(make_tier: MakeTier, tmp_path: Path) -> None:
    """A file in the place of the folder, or on the way to it, is named."""
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"is not a folder .*: give disk_cache a folder"):
            await make_tier(path)


async def test_an_index_that_fails_while_open_is_no_failure_of_a_load(
    make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    """Every call does without it, and each kind of fault is warned of once."""
    tier = await make_tier()
    copy = await put(tier, "a", b"one")
    assert copy is not None
    with closing(sqlite3.connect(tier.path / "index.sqlite3")) as database:
        database.executescript("DROP TABLE totals; DROP TABLE copies")
    for _ in range(2):
        assert await tier.find(STORE, "b") is None
        assert await put(tier, "c", b"three") is None
        await tier.revalidated(copy, 9.0)
        await tier.forget(STORE, "a")
        await tier.drop(copy)
    assert len(caplog.records) == 5
    assert all("no such table" in record.getMessage() for record in caplog.records)
    assert not list(tier.incoming().parent.iterdir())


async def test_a_locked_index_is_not_waited_for_for_ever(
    make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is stopped in a transaction costs the others copies, not calls; look-ups do not even notice."""
    monkeypatch.setattr(disk_index, "_BUSY_TIMEOUT", 0.0)
    tier, other = await make_tier(), await make_tier()
    await put(other, "a", b"one")
    with closing(sqlite3.connect(tier.path / "index.sqlite3", isolation_level=None)) as stopped:
        stopped.execute("BEGIN IMMEDIATE")
        assert await put(tier, "b", b"two") is None
        assert await read(tier, "a") == b"one"
    assert "could not keep b: database is locked" in caplog.text
    assert await put(tier, "b", b"two") is not None


async def test_a_process_that_never_finishes_opening_is_named(
    make_tier: MakeTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the lock of the folder is waited for, and not for ever."""
    monkeypatch.setattr(disk_folder, "_PATIENCE", 0.0)
    await (await make_tier()).close()
    folder = disk_folder.CacheFolder(tmp_path / "cache")
    with folder.to_itself(), pytest.raises(StoreUnavailableError, match="another process has been opening"):
        await make_tier()


# A damaged or foreign index


async def _damage(tier: DiskTier, how: str) -> None:
    index = tier.path / "index.sqlite3"
    data = index.read_bytes()
    if how == "garbage":
        index.write_bytes(b"no database at all" * 500)
    elif how == "cut":
        index.write_bytes(data[: len(data) // 2])
    elif how == "scrambled":
        index.write_bytes(data[:4096] + os.urandom(len(data) - 4096))
    elif how == "undecodable":
        index.write_bytes(data.replace(b"copies (serial)", b"copies (seri\xbfl)"))
    else:
        with closing(sqlite3.connect(index)) as database:
            database.executescript(how)


@pytest.mark.parametrize(
    "how",
    [
        "garbage",
        "cut",
        "scrambled",
        "undecodable",
        "DROP TABLE copies",
        "DELETE FROM totals",
        "PRAGMA user_version = 99",
        "PRAGMA ignore_check_constraints = 1; UPDATE copies SET validated_at = 'yesterday'",
    ],
)
async def test_a_damaged_index_is_set_aside(make_tier: MakeTier, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """Or one of another layout: the tier starts empty, without the files that nobody can name any more."""
    tier = await make_tier()
    for name in "abc":
        await put(tier, name, content(name, "1", 1000))
    await tier.close()
    await _damage(tier, how)
    again = await make_tier()
    assert "starts empty: its index" in caplog.text
    assert (again.bytes, again.copies) == (0, 0)
    assert (again.path / "index.damaged").exists()
    await put(again, "a", b"one")
    assert await read(again, "a") == b"one"
    check(again.path, BUDGET, again)


async def test_a_damaged_index_that_others_use_is_refused(make_tier: MakeTier) -> None:
    """Two processes with two indexes would remove each other's files."""
    tier = await make_tier()
    await put(tier, "a", b"one")
    with closing(sqlite3.connect(tier.path / "index.sqlite3")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"cannot be read .*, and another process uses it: end that, or"):
        await make_tier()
    assert await read(tier, "a") == b"one"


async def test_the_database_of_another_program_is_left_alone(make_tier: MakeTier, tmp_path: Path) -> None:
    """A folder that belongs to something else is refused, and nothing in it is touched."""
    (tmp_path / "cache").mkdir()
    with closing(sqlite3.connect(tmp_path / "cache" / "index.sqlite3")) as database:
        database.execute("CREATE TABLE songs (title)")
    before = (tmp_path / "cache" / "index.sqlite3").read_bytes()
    with pytest.raises(StoreError, match=r"is the database of another program: give disk_cache a folder of its own"):
        await make_tier()
    assert (tmp_path / "cache" / "index.sqlite3").read_bytes() == before


async def test_wrong_totals_are_counted_again(make_tier: MakeTier) -> None:
    """Sums that do not fit the rows would keep the budget wrong for ever."""
    tier = await make_tier()
    await put(tier, "a", b"one")
    await tier.close()
    await _damage(tier, "UPDATE totals SET bytes = 1000000, copies = 7, serial = 0")
    tier = await make_tier()
    await put(tier, "b", b"two")
    check(tier.path, BUDGET, tier)


# The rest


async def test_models_are_for_their_user_alone(make_tier: MakeTier) -> None:
    """Folders are 0700 and files 0600, whatever the umask and the writer say."""
    before = os.umask(0)
    try:
        tier = await make_tier()
        await put(tier, "a", b"one")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tier.path, *tier.path.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert any("-wal" in path.name for path in modes)


async def test_a_tier_that_is_not_open_says_so(tmp_path: Path) -> None:
    """Making one touches nothing, and a call before open() is a mistake of the program, not a miss."""
    tier = DiskTier(tmp_path / "cache")
    assert repr(tier) == f"<DiskTier {tmp_path / 'cache'} 0 copies, 0 B of 0 B, closed>"
    for call in (tier.find(STORE, "a"), put(tier, "a", b"one"), tier.forget(STORE, "a")):
        with pytest.raises(RegistryClosedError, match=r"is not open: await its open\(\) first"):
            await call
    await tier.close()
    assert not (tmp_path / "cache").exists()


async def test_calls_at_once_take_turns(make_tier: MakeTier) -> None:
    """Any number of loads may publish and look up together; none is lost."""
    tier, other = await make_tier(budget="1 MiB"), await make_tier(budget="1 MiB")
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    names = [f"m{number}" for number in range(50)]
    copies = await asyncio.gather(*(put(tier, name, content(name, "1", 100)) for name in names))
    assert all(copies)
    found = await asyncio.gather(*(other.find(STORE, name) for name in names))
    assert found == list(copies)
    check(tier.path, 1 << 20, tier)

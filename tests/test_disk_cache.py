"""Rules A4, S2 and S3 of the disk cache: local copies, loaded without the store where they may be, and never wrong."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

import odd
import oracle
import zoo
from loops import LOOPS
from modelcache import (
    DiskTier,
    ModelCacheError,
    ModelNotFoundError,
    ModelRegistry,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    origin,
)
from modelcache.pool.artifacts import ArtifactChannel
from upright import Upright

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache.pool.artifacts import Saved
    from zoo import Model

CHANGE_MARK = 8
"""Bytes of a file that is no copy."""
ROWS = zoo.rows(2)
OLD, NEW = zoo.model(), zoo.model(seed=1)


@pytest.fixture(params=["asyncio", "eager"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Loads that begin in the very step that asks for them have to know by then what they are for."""
    return "asyncio", LOOPS[request.param]


class Remote(Upright):
    """A store whose copies survive it, since it says whose they are."""

    url = "test://bucket"


class Nameless(Remote):
    """A store of which nobody can tell which one it is."""

    url = None  # type: ignore[assignment]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Wall-clock seconds, in the only item."""
    now = [1_000_000.0]
    monkeypatch.setattr(origin, "wall_clock", lambda: now[0])
    return now


async def kept(registry: ModelRegistry) -> None:
    """Wait until what was loaded has been copied."""
    while registry._loader.tasks:
        await asyncio.sleep(0)


async def reload(registry: ModelRegistry, name: str = "m", model: Model = OLD) -> str:
    """Have the model leave the memory and be loaded again; return where from."""
    await kept(registry)
    await registry.unload(name)
    answer = await registry.invoke(name, ROWS)
    assert np.array_equal(answer.predictions, model.expected(ROWS))
    await kept(registry)
    return answer.tier


def copies(folder: Path) -> list[Path]:
    # What else begins so by chance is the mark of the last change, of random bytes.
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return sorted(path for path, data in files.items() if data.startswith(b"{") and len(data) > CHANGE_MARK)


@pytest.mark.parametrize("form", ["ubj", "json", "targz"])
async def test_a_model_comes_back_without_the_store(make_registry: MakeRegistry, tmp_path: Path, form: str) -> None:
    """After an eviction from memory the copy is loaded, bit-equal, and the store is not asked."""
    name = {"ubj": "m.ubj", "json": "m.json", "targz": "m.tar.gz"}[form]
    store = Remote({name: getattr(OLD, form)})
    store.open("m")
    registry = await make_registry(store, disk_cache=tmp_path)
    first = await registry.invoke("m", ROWS)
    assert first.tier == "store"
    assert await reload(registry) == "disk"
    assert len(store.fetches) == 1
    info = registry.loaded()[0]
    assert (info.version, info.artifact_bytes) == (first.model.version, len(getattr(OLD, form)))
    assert (info.format, info.container) == ("ubj", "raw"), "the form that loads fastest"
    stats = registry.stats()
    assert (stats.loads, stats.loads_from_disk) == (2, 1)
    assert stats.bytes_on_disk == len(copies(tmp_path)[0].read_bytes())
    assert "loaded from the local copy" in registry.explain("m")
    assert (await registry.invoke("m", ROWS)).tier == "memory"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What workers are told that a copy takes, load by load."""
    told, announce = list[int](), ArtifactChannel.open

    def listen(*order: Any) -> Any:
        told.append(order[-1])
        return announce(*order)

    monkeypatch.setattr(ArtifactChannel, "open", listen)
    return told


async def test_a_copy_is_charged_what_the_model_took_before(
    make_registry: MakeRegistry, tmp_path: Path, told: list[int]
) -> None:
    """L1: it is weighed once; who starts anew weighs again."""
    first = await make_registry(Remote({"m.ubj": OLD.ubj}), disk_cache=tmp_path)
    await first.load("m")
    size = first.loaded()[0].size_bytes
    for _ in range(2):
        assert await reload(first) == "disk"
        assert first.loaded()[0].size_bytes == size
    assert told == [size, size]
    await first.close()
    second = await make_registry(Remote({}), disk_cache=tmp_path)
    await second.load("m")
    assert told == [size, size, 0]


async def test_a_copy_in_other_bytes_is_weighed(make_registry: MakeRegistry, tmp_path: Path, told: list[int]) -> None:
    """L1: what was weighed before was read from JSON, or was something else of the same version."""
    registry = await make_registry(Remote({"m.json": OLD.json}), disk_cache=tmp_path)
    await registry.load("m")
    assert await reload(registry) == "disk"
    size = registry.loaded()[0].size_bytes
    assert await reload(registry) == "disk"
    assert told == [0, size]


async def test_a_model_with_many_names_is_weighed_each_time(
    make_registry: MakeRegistry, tmp_path: Path, told: list[int]
) -> None:
    """L1: its readings differ by what XGBoost keeps of them for the loader, and the first is no better than others."""
    registry = await make_registry(Remote({"m.ubj": zoo.wide(500)}), disk_cache=tmp_path)
    await registry.load("m")
    for _ in range(2):
        await kept(registry)
        await registry.unload("m")
        await registry.load("m")
    assert told == [0, 0]


async def test_copies_survive_a_restart(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A later registry on the same folder and store loads the copy; a DiskTier may be given instead of the folder."""
    store = Remote({"m.ubj": OLD.ubj})
    first = await make_registry(store, disk_cache=tmp_path)
    await first.load("m")
    await first.close()
    second = await make_registry(Remote({}), disk_cache=DiskTier(tmp_path, budget="1 MiB"))
    answer = await second.invoke("m", ROWS)
    assert answer.tier == "disk"
    assert np.array_equal(answer.predictions, OLD.expected(ROWS))


async def test_copies_of_another_store_are_not_used(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """The same name in another store is another model."""
    await (await make_registry(Remote({"m.ubj": OLD.ubj}), disk_cache=tmp_path)).load("m")
    other = Remote({"m.ubj": NEW.ubj})
    other.url = "test://other"
    registry = await make_registry(other, disk_cache=tmp_path)
    assert np.array_equal(await registry.predict("m", ROWS), NEW.expected(ROWS))


async def test_copies_of_a_store_without_url_are_for_one_registry(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """Nothing tells such a store from another of its kind: no other registry uses what was copied from it."""
    first = await make_registry(Nameless({"m.ubj": OLD.ubj}), disk_cache=tmp_path)
    await first.load("m")
    assert await reload(first) == "disk"
    for model in (OLD, NEW):
        other = await make_registry(Nameless({"m.ubj": model.ubj}), disk_cache=tmp_path)
        answer = await other.invoke("m", ROWS)
        assert answer.tier == "store"
        assert np.array_equal(answer.predictions, model.expected(ROWS))


# Versions


async def test_an_old_copy_is_revalidated(make_registry: MakeRegistry, tmp_path: Path, clock: list[float]) -> None:
    """refresh_after holds for copies: a load of an older one asks the store, which delivers only what has changed."""
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path, refresh_after=60)
    await registry.load("m")
    clock[0] += 59
    assert await reload(registry) == "disk"
    assert len(store.fetches) == 1
    clock[0] += 1
    assert await reload(registry) == "disk"
    assert (len(store.fetches), store.delivered) == (2, 1)
    clock[0] += 59
    assert await reload(registry) == "disk"
    assert len(store.fetches) == 2, "the confirmation counts"
    clock[0] += 1
    store.put("m.ubj", NEW.ubj)
    assert await reload(registry, model=NEW) == "store"
    assert await reload(registry, model=NEW) == "disk"
    assert (len(store.fetches), store.delivered) == (3, 2)


async def test_refresh_asks_whatever_copies_there_are(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """refresh of a model that is not resident asks the store, and uses the copy if it is current."""
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path)
    await registry.load("m")
    await kept(registry)
    await registry.unload("m")
    await registry.refresh("m")
    assert (len(store.fetches), store.delivered) == (2, 1)
    store.put("m.ubj", NEW.ubj)
    await registry.refresh("m")
    assert await reload(registry, model=NEW) == "disk"
    store.remove("m.ubj")
    with pytest.raises(ModelNotFoundError):
        await registry.refresh("m")
    await registry.unload("m")
    with pytest.raises(ModelNotFoundError):
        await registry.predict("m", ROWS)
    assert registry.stats().bytes_on_disk == 0


async def test_a_new_version_that_another_process_has_fetched_is_taken_from_its_copy(
    make_registry: MakeRegistry, tmp_path: Path
) -> None:
    """Two registries on one folder: the second learns of the version from the store, and has the bytes already."""
    store = Remote({"m.ubj": OLD.ubj})
    one = await make_registry(store, disk_cache=tmp_path)
    two = await make_registry(store, disk_cache=tmp_path)
    await one.load("m")
    await kept(one)
    assert (await two.invoke("m", ROWS)).tier == "disk"
    store.put("m.ubj", NEW.ubj)
    await one.refresh("m")
    await kept(one)
    await two.refresh("m")
    assert np.array_equal(await two.predict("m", ROWS), NEW.expected(ROWS))


@pytest.mark.parametrize("error", [StoreUnavailableError("down"), OSError("no route to host")])
async def test_a_store_that_is_down_does_not_stop_copies(
    make_registry: MakeRegistry, tmp_path: Path, clock: list[float], error: Exception
) -> None:
    """S2: stale-if-error: better the version of a minute ago than none; explain() says so."""
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path, refresh_after=60)
    await registry.load("m")
    clock[0] += 61
    store.error = error
    assert await reload(registry) == "disk"
    assert "it serves on since it could not be renewed" in registry.explain("m")


async def test_a_store_that_refuses_is_not_got_round(
    make_registry: MakeRegistry, tmp_path: Path, clock: list[float]
) -> None:
    """Access that was taken away is no outage: the copy is not used."""
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path, refresh_after=60)
    await registry.load("m")
    await kept(registry)
    await registry.unload("m")
    clock[0] += 61
    store.error = StoreAccessDeniedError("no more")
    with pytest.raises(StoreAccessDeniedError):
        await registry.predict("m", ROWS)


@pytest.mark.parametrize("why", ["too large", "being written", "unwritable"])
async def test_no_older_copy_comes_back(
    make_registry: MakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """S3: once the store has announced another version the copy of the old one is gone, whatever becomes of the new."""
    big = zoo.model(trees=60)
    store = Remote({"m.ubj": OLD.ubj})
    tier = DiskTier(tmp_path, budget=len(OLD.ubj) + 1000 if why == "too large" else "1 MiB")
    registry = await make_registry(store, disk_cache=tier)
    await registry.load("m")
    await kept(registry)
    if why == "being written":
        monkeypatch.setattr(ArtifactChannel, "_end_saving", _deaf(ArtifactChannel._end_saving))
    elif why == "unwritable":
        monkeypatch.setattr(tier, "incoming", lambda: tmp_path / "nowhere" / "copy")
    store.put("m.ubj", big.ubj)
    await registry.refresh("m")
    await registry.unload("m")
    answer = await registry.invoke("m", ROWS)
    assert np.array_equal(answer.predictions, big.expected(ROWS))
    assert answer.tier == "store"
    await registry.unload("m")


async def test_a_copy_that_is_written_when_its_model_is_deleted_is_not_kept(
    make_registry: MakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store has said last counts: the model does not come back from the disk."""
    written: list[Any] = []
    end_saving = ArtifactChannel._end_saving
    monkeypatch.setattr(ArtifactChannel, "_end_saving", lambda *order: written.append(order))
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path)
    await registry.load("m")
    while not any(order[2] for order in written):
        await asyncio.sleep(0)
    store.remove("m.ubj")
    with pytest.raises(ModelNotFoundError):
        await registry.refresh("m")
    for order in written:
        end_saving(*order)
    await kept(registry)
    await registry.unload("m")
    with pytest.raises(ModelNotFoundError):
        await registry.predict("m", ROWS)
    assert copies(tmp_path) == []


async def test_other_spellings_of_a_name_have_no_older_copy(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """refresh("m.ubj") takes back what was copied under "m", and refresh("m") finds the resident "m.ubj"."""
    store = Remote({"m.ubj": OLD.ubj})
    store.open("m.ubj")
    registry = await make_registry(store, disk_cache=tmp_path)
    await registry.load("m")
    await kept(registry)
    await registry.unload("m")
    await registry.load("m.ubj")
    store.put("m.ubj", NEW.ubj)
    assert (await registry.refresh("m")).name == "m.ubj"
    assert len(registry.loaded()) == 1
    await registry.unload("m.ubj")
    assert np.array_equal(await registry.predict("m", ROWS), NEW.expected(ROWS))


# Copies that are no good


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
async def test_a_damaged_copy_is_replaced(make_registry: MakeRegistry, tmp_path: Path, damage: str) -> None:
    """A4: the digest is checked at each load; the caller gets the right answer, from the store."""
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path)
    await registry.load("m")
    await kept(registry)
    (path,) = copies(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[: len(data) // (1 + (damage == "truncated"))])
    assert await reload(registry) == "store"
    assert hashlib.sha256(copies(tmp_path)[0].read_bytes()).hexdigest() == copies(tmp_path)[0].name
    assert await reload(registry) == "disk"
    assert registry.stats().load_failures == 0


async def test_a_folder_that_takes_no_more_is_streamed_past(
    make_registry: MakeRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A4: where no copy can be written the model serves all the same, and a warning says why there is none."""
    store = Remote({"m.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path)
    assert registry._origin.tier is not None
    folder = registry._origin.tier.incoming().parent
    folder.rename(folder.with_name("away"))
    assert np.array_equal(await registry.predict("m", ROWS), OLD.expected(ROWS))
    await kept(registry)
    assert "copy" in caplog.text
    assert await reload(registry) == "store"


async def test_a_damaged_copy_that_cannot_be_dropped_is_passed_by(
    make_registry: MakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A4: the index cannot be written to any more; the store is asked all the same."""
    store, tier = Remote({"m.ubj": OLD.ubj}), DiskTier(tmp_path)
    registry = await make_registry(store, disk_cache=tier)
    await registry.load("m")
    await kept(registry)
    (path,) = copies(tmp_path)
    path.write_bytes(b"{" + bytes(100))

    async def fail(_: object) -> None:
        """As a tier does whose disk is full."""

    monkeypatch.setattr(tier, "drop", fail)
    assert await reload(registry) == "store"


async def test_a_custom_predictor_may_write_to_its_bytes(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """They are its own, from the store and from a copy."""
    registry = await make_registry(
        Remote({"m.ubj": odd.artifact(on_load="write")}), predictor=odd.ODD, disk_cache=tmp_path
    )
    for tier in ("store", "disk"):
        assert (await registry.invoke("m", [[odd.PREDICT, 2.0]])).tier == tier
        await kept(registry)
        await registry.unload("m")


async def test_a_custom_predictor_gets_the_same_bytes_from_a_copy(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """A copy is what the predictor took, not an archive to be unpacked again; and it is for that predictor alone."""
    inner = gzip.compress(odd.artifact())
    store = Remote({"m.tar.gz": zoo.pack({"model.gz": inner})})
    registry = await make_registry(store, disk_cache=tmp_path, predictor="odd:Zipped")
    await registry.load("m")
    await kept(registry)
    await registry.unload("m")
    assert (await registry.invoke("m", [[odd.PREDICT, 2.0]])).tier == "disk"
    other = await make_registry(Remote({"m.ubj": OLD.ubj}), disk_cache=tmp_path)
    assert (await other.invoke("m", ROWS)).tier == "store"


async def test_a_copy_beyond_the_budget_is_not_kept(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """The disk cache has a budget of its own."""
    registry = await make_registry(Remote({"m.ubj": OLD.ubj}), disk_cache=DiskTier(tmp_path, budget=1000))
    await registry.load("m")
    assert await reload(registry) == "store"
    assert copies(tmp_path) == []


async def test_a_load_that_fails_leaves_no_file(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """Nothing half-written stays, whether the artifact is refused, or the load is cut off by close()."""
    store = Remote({"m.ubj": OLD.ubj[:500], "n.ubj": OLD.ubj})
    registry = await make_registry(store, disk_cache=tmp_path)
    with pytest.raises(Exception, match="m"):
        await registry.predict("m", ROWS)
    store.shut("n")
    call = asyncio.create_task(registry.predict("n", ROWS))
    await store.fetched(2)
    unloading = asyncio.create_task(registry.unload("n"))
    store.open("n")
    await asyncio.wait((call, unloading))
    await registry.predict("n", ROWS)
    await registry.close()
    assert [path for path in copies(tmp_path) if len(path.name) != 64] == []


async def test_a_worker_that_is_killed_while_it_writes(
    make_registry: MakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, A4: the model had landed; its copy is not kept, and the next load goes to the store."""
    registry = await make_registry(Remote({"m.ubj": OLD.ubj}), disk_cache=tmp_path)
    monkeypatch.setattr(ArtifactChannel, "_end_saving", _deaf(ArtifactChannel._end_saving))
    (worker,) = (await registry.load("m")).workers
    psutil.Process(worker).kill()
    while not registry.stats().worker_restarts:
        await asyncio.sleep(0)
    await kept(registry)
    monkeypatch.undo()
    assert copies(tmp_path) == []
    assert (await registry.invoke("m", ROWS)).tier == "store"


def _deaf(end_saving: Callable[[ArtifactChannel, int, Saved | None], None]) -> Any:
    """Let only the end of a worker be heard, as if it had been killed before it reported."""

    def end(channel: ArtifactChannel, model: int, saved: Saved | None) -> None:
        if saved is None:
            end_saving(channel, model, saved)

    return end


# Beside everything else


async def test_a_tier_belongs_to_one_registry(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """Two would close it for each other; the folder may be shared, and the tier used again after the first closes."""
    tier, store = DiskTier(tmp_path), Remote({"m.ubj": OLD.ubj})
    first = await make_registry(store, disk_cache=tier)
    second = ModelRegistry(store, disk_cache=tier)
    with pytest.raises(StoreError, match="give each registry a DiskTier of its own"):
        await second.start()
    await second.close()
    await first.load("m")
    assert await reload(first) == "disk"
    await first.close()
    assert (await (await make_registry(store, disk_cache=tier)).invoke("m", ROWS)).tier == "disk"


async def test_a_folder_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    """The first call says what is wrong with disk_cache, and the registry can be started once that is mended."""
    place = tmp_path / "file"
    place.write_bytes(b"")
    registry = ModelRegistry(Remote({"m.ubj": OLD.ubj}), disk_cache=place, workers=1)
    with pytest.raises(StoreError, match="is not a folder"):
        await registry.predict("m", ROWS)
    place.unlink()
    assert np.array_equal(await registry.predict("m", ROWS), OLD.expected(ROWS))
    await registry.close()


async def test_a_start_that_fails_leaves_the_tier_closed(tmp_path: Path) -> None:
    """The workers do not come up; the tier can be used by another registry."""
    tier = DiskTier(tmp_path)
    registry = ModelRegistry(Remote({}), disk_cache=tier, workers=1, predictor="nowhere:Nothing")
    with pytest.raises(ModelCacheError):
        await registry.start()
    assert not tier.is_open
    await registry.close()


async def test_groups_know_the_size_of_copies(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """L3: acquire_many with local copies asks the store for nothing."""
    store = Remote({"a.json": OLD.json, "b.json": NEW.json})
    store.open("a", "b")
    first = await make_registry(store, disk_cache=tmp_path)
    await first.preload(["a", "b"])
    await kept(first)
    registry = await make_registry(store, disk_cache=tmp_path)
    asked = len(store.fetches)
    async with registry.acquire_many(["a", "b"]) as leases:
        for lease, model in zip(leases, (OLD, NEW), strict=True):
            assert np.array_equal(await lease.predict(ROWS), model.expected(ROWS))
    assert len(store.fetches) == asked


async def test_many_models_cycle_through_memory_and_disk(make_registry: MakeRegistry, tmp_path: Path) -> None:
    """Each model is fetched once, and all answers are right while memory and disk evict."""
    models = {f"m{seed}": zoo.model(seed=seed) for seed in range(7)}
    store = Remote({f"{name}.json": model.json for name, model in models.items()})
    registry = await make_registry(store, disk_cache=tmp_path, workers=2)
    size = (await registry.load("m0")).size_bytes
    registry.resize(size * 3 + (64 << 10))
    for _ in range(3):
        answers = await asyncio.gather(*(registry.predict(name, ROWS) for name in models))
        for answer, model in zip(answers, models.values(), strict=True):
            assert np.array_equal(answer, model.expected(ROWS))
        await kept(registry)
        oracle.check(registry)
    assert store.delivered == len(models)
    assert registry.stats().loads_from_disk > 0

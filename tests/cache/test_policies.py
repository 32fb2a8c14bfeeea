"""Policies: the contract for each of them, then what each one promises beyond it."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import cachetools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.cache.policies import (
    CachetoolsPolicy,
    Evictable,
    EvictionPolicy,
    GDSFPolicy,
    LRUPolicy,
    S3FIFOPolicy,
    make_policy,
)
from modelcache.testing.policy import check_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable


@dataclass(eq=False)
class Model:
    key: str
    size: int = 100
    cost: float = 1.0
    pins: int = 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def models(count: int, prefix: str = "m") -> list[Model]:
    return [Model(f"{prefix}{number}") for number in range(count)]


P = TypeVar("P", bound=EvictionPolicy)


def filled(policy: P, entries: Iterable[Model]) -> P:
    for entry in entries:
        policy.insert(entry)
    return policy


def drained(policy: EvictionPolicy) -> list[Hashable]:
    return [entry.key for entry in iter(policy.evict, None)]


# ---------------------------------------------------------------------------------------------- the contract


def ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: float(next(ticks))


def jumping() -> Callable[[], float]:
    rng = random.Random(0)
    return lambda: rng.uniform(0, 8)


CACHES: dict[str, Callable[[], cachetools.Cache[Any, Any]]] = {
    "plain": lambda: cachetools.Cache(1000),
    "lru": lambda: cachetools.LRUCache(1000),
    "lfu": lambda: cachetools.LFUCache(1000),
    "fifo": lambda: cachetools.FIFOCache(1000),
    "random": lambda: cachetools.RRCache(1000, choice=random.Random(0).choice),
    "ttl": lambda: cachetools.TTLCache(1000, ttl=60),
    "tlru": lambda: cachetools.TLRUCache(1000, ttu=lambda _key, entry, now: now + entry.cost),
    "holds three": lambda: cachetools.LRUCache(3),
    "three, random": lambda: cachetools.RRCache(3, choice=random.Random(0).choice),
    "three, ttl": lambda: cachetools.TTLCache(3, ttl=60),
    "holds none": lambda: cachetools.LFUCache(0),
    "holds bytes": lambda: cachetools.LRUCache(2000, getsizeof=lambda entry: entry.size),
    "unbounded": lambda: cachetools.LRUCache(math.inf),
    "expired at once": lambda: cachetools.TTLCache(1000, ttl=0),
    "over before it began": lambda: cachetools.TLRUCache(1000, ttu=lambda _key, _entry, now: now),
    # Something expires between any two looks at the clock.
    "expires midway": lambda: cachetools.TTLCache(1000, ttl=25, timer=ticking()),
    "three, expires midway": lambda: cachetools.TTLCache(3, ttl=9, timer=ticking()),
    "clock jumps back": lambda: cachetools.TTLCache(1000, ttl=4, timer=jumping()),
    "tlru midway": lambda: cachetools.TLRUCache(9, ttu=lambda _k, _e, now: now + 25, timer=ticking()),
}


@pytest.mark.parametrize("factory", [GDSFPolicy, LRUPolicy, S3FIFOPolicy])
def test_shipped_policies_keep_the_contract(factory: Callable[[], EvictionPolicy]) -> None:
    """Each shipped policy keeps the contract."""
    check_policy(factory)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_adapted_caches_keep_the_contract(cache: Callable[[], cachetools.Cache[Any, Any]]) -> None:
    """Any cachetools cache keeps the contract, however small it is and whenever its items expire."""
    check_policy(lambda: CachetoolsPolicy(cache()))


@pytest.mark.parametrize("spec", ["gdsf", "lru", "s3fifo", CACHES["lru"], CACHES["holds none"]])
def test_insert_takes_the_place_of_its_key(spec: Any) -> None:
    """A new version takes the place of the old one even if nobody removed the old one first."""
    policy, old, new = make_policy(spec), Model("a"), Model("a")
    filled(policy, [old, Model("b"), new])
    policy.remove(old)
    assert sorted(map(str, drained(policy))) == ["a", "b"]


# ------------------------------------------------------------------- the contract suite finds what is broken


class Good:
    """First in, first out: correct, and broken in one way by each class below."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def insert(self, entry: Evictable) -> None:
        if entry not in self.entries:
            self.entries.append(entry)

    def hit(self, entry: Evictable) -> None:
        pass

    def remove(self, entry: Evictable) -> None:
        if entry in self.entries:
            self.entries.remove(entry)

    def evict(self) -> Any:
        victim = next((entry for entry in self.entries if not entry.pins), None)
        self.remove(victim) if victim else None
        return victim


class RaisesWhenEmpty(Good):
    def evict(self) -> Any:
        return self.entries.pop(next(i for i, entry in enumerate(self.entries) if not entry.pins))


class ShareOneTable(Good):
    table: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.entries = self.table


class NeverForgets(Good):
    def evict(self) -> Any:
        return next((entry for entry in self.entries if not entry.pins), None)


class HoldsEight(Good):
    def insert(self, entry: Evictable) -> None:
        super().insert(entry)
        self.entries = self.entries[-8:]


class ReturnsTheKey(Good):
    def evict(self) -> Any:
        victim = super().evict()
        return victim and victim.key


class ReturnsACopy(Good):
    def evict(self) -> Any:
        victim = super().evict()
        return victim and type(victim)(victim.key)


class EvictsPinned(Good):
    def evict(self) -> Any:
        return self.entries.pop(0) if self.entries else None


class ForgetsPinned(Good):
    def evict(self) -> Any:
        while self.entries and self.entries[0].pins:
            self.entries.pop(0)
        return super().evict()


class StopsAtPinned(Good):
    def evict(self) -> Any:
        return super().evict() if self.entries and not self.entries[0].pins else None


class RefusesPinned(Good):
    def insert(self, entry: Evictable) -> None:
        if not entry.pins:
            super().insert(entry)


class AsksForPinsOnlyOnce(Good):
    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()

    def insert(self, entry: Evictable) -> None:
        super().insert(entry)
        if entry.pins:
            self.pinned.add(id(entry))

    def evict(self) -> Any:
        victim = next((entry for entry in self.entries if id(entry) not in self.pinned), None)
        self.remove(victim) if victim else None
        return victim


class IgnoresRemove(Good):
    def remove(self, entry: Evictable) -> None:
        pass

    def evict(self) -> Any:
        victim = super().evict()
        if victim:
            self.entries.remove(victim)
        return victim


class RaisesOnUnknownRemove(Good):
    def remove(self, entry: Evictable) -> None:
        self.entries.remove(entry)


class RaisesOnUnknownHit(Good):
    def hit(self, entry: Evictable) -> None:
        self.entries.append(self.entries.pop(self.entries.index(entry)))


class HitsBringBack(Good):
    def hit(self, entry: Evictable) -> None:
        self.insert(entry)


class RefusesWhoCameBefore(Good):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def insert(self, entry: Evictable) -> None:
        if entry not in self.seen:
            self.seen.append(entry)
            super().insert(entry)


class RemovesByKey(Good):
    def remove(self, entry: Evictable) -> None:
        self.entries = [other for other in self.entries if other.key != entry.key]


class HitsByKey(Good):
    def hit(self, entry: Evictable) -> None:
        self.entries = [entry if other.key == entry.key else other for other in self.entries]


class InsertsTwice(Good):
    def insert(self, entry: Evictable) -> None:
        self.entries.append(entry)


class DividesBySize(Good):
    def hit(self, entry: Evictable) -> None:
        assert entry.cost / entry.size >= 0


class DividesByCost(Good):
    def insert(self, entry: Evictable) -> None:
        super().insert(entry)
        assert entry.size / entry.cost >= 0


class TrustsTheSizeItSaw(Good):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def insert(self, entry: Evictable) -> None:
        if entry not in self.entries:
            self.sizes[entry.size] += 1
        super().insert(entry)

    def remove(self, entry: Evictable) -> None:
        if entry in self.entries:
            self.sizes[entry.size] -= 1
            if self.sizes[entry.size] < 0:
                raise LookupError(entry.size)
        super().remove(entry)


class ChangesEntries(Good):
    def hit(self, entry: Any) -> None:
        entry.cost += 1


class LosesOneInFifty(Good):
    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)

    def hit(self, entry: Evictable) -> None:
        if next(self.calls) % 50 == 0:
            self.remove(entry)


BROKEN = {
    RaisesWhenEmpty: "With nothing inside",
    RaisesOnUnknownRemove: "With nothing inside",
    RaisesOnUnknownHit: "With nothing inside",
    HitsBringBack: "With nothing inside",
    ShareOneTable: "stands alone",
    ReturnsTheKey: "the first evicted 'a'",
    ReturnsACopy: "stands alone",
    NeverForgets: "only once",
    HoldsEight: "was evicted 0 times",
    RefusesWhoCameBefore: "only an insert",
    DividesByCost: "ZeroDivisionError",
    EvictsPinned: "A pinned entry",
    ForgetsPinned: "A pinned entry",
    StopsAtPinned: "A pinned entry",
    RefusesPinned: "A pinned entry",
    AsksForPinsOnlyOnce: "pinned",
    IgnoresRemove: "A removed entry",
    RemovesByKey: "An entry is itself",
    HitsByKey: "An entry is itself",
    InsertsTwice: "inside once",
    TrustsTheSizeItSaw: "LookupError",
    DividesBySize: "ZeroDivisionError",
    ChangesEntries: "does not change an entry",
    LosesOneInFifty: "In any order of calls",
}


def test_contract_accepts_a_good_policy_quickly() -> None:
    """The contract suite accepts the plainest correct policy, in less than a second."""
    started = time.process_time()
    check_policy(Good)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_contract_finds_each_broken_clause(broken: type[Good]) -> None:
    """The contract suite finds each planted fault and says which clause it breaks."""
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_policy(broken)


def test_every_planted_fault_is_tried() -> None:
    """No broken policy of this file is left out of the test above."""
    assert set(Good.__subclasses__()) == set(BROKEN)


# ------------------------------------------------------------- the ranking, against naive references


class NaiveLRU:
    def __init__(self) -> None:
        self.order: list[Model] = []

    def access(self, entry: Model) -> None:
        self.remove(entry)
        self.order.append(entry)

    def remove(self, entry: Model) -> None:
        if entry in self.order:
            self.order.remove(entry)

    def accepts(self, victim: Model) -> bool:
        return victim is next(entry for entry in self.order if not entry.pins)

    def evicted(self, victim: Model) -> None:
        self.remove(victim)


class NaiveGDSF:
    """The formula itself: halves all counts at once, and reads all priorities to find the least."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.accesses = 0
        self.uses: Counter[str] = Counter()
        self.priority: dict[Model, float] = {}

    def access(self, entry: Model) -> None:
        self.priority[entry] = 0.0
        self.accesses += 1
        if self.accesses >= 10 * len(self.priority):
            self.accesses = 0
            self.uses = Counter({key: uses // 2 for key, uses in self.uses.items()})
        self.uses[entry.key] += 1
        self.priority[entry] = self.clock + self.uses[entry.key] * entry.cost / (entry.size or 1)

    def remove(self, entry: Model) -> None:
        self.priority.pop(entry, None)

    def accepts(self, victim: Model) -> bool:
        return self.priority[victim] == min(self.priority[entry] for entry in self.priority if not entry.pins)

    def evicted(self, victim: Model) -> None:
        self.clock = max(self.clock, self.priority.pop(victim))


CALLS = st.sampled_from(
    ["insert"] * 2 + ["hit"] * 4 + ["evict"] * 2 + ["remove", "pin", "unpin", "cost", "size", "new_version"]
)
SCHEDULE = st.lists(st.tuples(CALLS, st.integers(0, 4), st.integers(0, 9)), min_size=100, max_size=400)


class Follow:
    """Make the same calls to a policy and to its reference, and compare the victims."""

    def __init__(self, policy: EvictionPolicy, reference: NaiveLRU | NaiveGDSF) -> None:
        self.policy = policy
        self.reference = reference
        self.everyone = models(5)
        self.inside: set[Model] = set()

    def run(self, schedule: list[tuple[str, int, int]]) -> None:
        for call, who, figure in schedule:
            getattr(self, call)(self.everyone[who], figure)

    def insert(self, entry: Model, _: int) -> None:
        self.policy.insert(entry)
        self.reference.access(entry)
        self.inside.add(entry)

    def hit(self, entry: Model, _: int) -> None:
        self.policy.hit(entry)
        if entry in self.inside:
            self.reference.access(entry)

    def remove(self, entry: Model, _: int) -> None:
        self.policy.remove(entry)
        self.reference.remove(entry)
        self.inside.discard(entry)

    def evict(self, *_: object) -> None:
        victim = self.policy.evict()
        if any(not entry.pins for entry in self.inside):
            assert isinstance(victim, Model)
            assert self.reference.accepts(victim)
            self.reference.evicted(victim)
            self.inside.remove(victim)
        else:
            assert victim is None

    def pin(self, entry: Model, _: int) -> None:
        entry.pins += 1

    def unpin(self, entry: Model, _: int) -> None:
        entry.pins = 0

    def cost(self, entry: Model, figure: int) -> None:
        entry.cost = figure / 4

    def size(self, entry: Model, figure: int) -> None:
        entry.size = figure * 50

    def new_version(self, old: Model, _: int) -> None:
        new = Model(old.key)
        self.everyone[self.everyone.index(old)] = new
        self.remove(old, 0)
        self.insert(new, 0)
        self.hit(old, 0)
        self.remove(old, 0)


@settings(max_examples=120, deadline=None)
@given(SCHEDULE)
def test_gdsf_follows_its_formula(schedule: list[tuple[str, int, int]]) -> None:
    """The lazy heap and the lazy halving choose a victim of the least priority, as the plain formula does."""
    Follow(GDSFPolicy(), NaiveGDSF()).run(schedule)


@settings(max_examples=60, deadline=None)
@given(SCHEDULE)
def test_lru_follows_the_order_of_use(schedule: list[tuple[str, int, int]]) -> None:
    """LRU chooses the un-pinned entry whose last use is the oldest."""
    Follow(LRUPolicy(), NaiveLRU()).run(schedule)


@settings(max_examples=60, deadline=None)
@given(SCHEDULE)
def test_adapted_lru_is_lru(schedule: list[tuple[str, int, int]]) -> None:
    """An adapted LRUCache evicts in the order of LRU as long as nobody is pinned."""
    unpinned = [call for call in schedule if call[0] != "pin"]
    Follow(CachetoolsPolicy(cachetools.LRUCache(1000)), NaiveLRU()).run(unpinned)


# ------------------------------------------------------------------------------------------------------ GDSF


def test_gdsf_keeps_what_saves_most_per_byte() -> None:
    """A small model that is slow to load outlives a big one that loads quickly, though used before it."""
    policy = filled(GDSFPolicy(), [Model("small, slow", 10, 5.0), Model("big, quick", 1000, 0.1)])
    assert drained(policy) == ["big, quick", "small, slow"]


def test_gdsf_keeps_what_is_used_more() -> None:
    """Of two equal models the one used more often stays, even if the other was used last."""
    often, last = models(2)
    policy = filled(GDSFPolicy(), [often, last])
    for entry in (often, often, often, last):
        policy.hit(entry)
    assert drained(policy) == ["m1", "m0"]


def test_gdsf_remembers_uses_after_eviction() -> None:
    """A model that was used often and comes back after an eviction outlives a newcomer."""
    favourite, newcomer = Model("favourite"), Model("newcomer")
    policy = filled(GDSFPolicy(), [favourite])
    for _ in range(4):
        policy.hit(favourite)
    assert policy.evict() is favourite
    filled(policy, [favourite, newcomer])
    assert policy.evict() is newcomer


def test_gdsf_lets_a_new_version_inherit() -> None:
    """A new version of a model starts with the uses of the old one."""
    old, new, other = Model("a"), Model("a"), Model("b")
    policy = filled(GDSFPolicy(), [old, other])
    for _ in range(4):
        policy.hit(old)
    policy.remove(old)
    policy.insert(new)
    policy.hit(other)
    assert policy.evict() is other


def test_gdsf_ages() -> None:
    """An old favourite that nobody asks for any more leaves soon after taste has changed."""
    favourite = Model("favourite")
    policy = filled(GDSFPolicy(), [favourite, *models(9)])
    for _ in range(1000):
        policy.hit(favourite)
    for round_ in range(50):
        for entry in models(20, f"round {round_} "):
            policy.insert(entry)
            policy.hit(entry)
            if policy.evict() is favourite:
                return
    pytest.fail("the old favourite is still there after 1,000 models of the new taste")


def test_gdsf_pinned_keeps_its_priority() -> None:
    """A pinned model that was passed over is next once it is un-pinned, and a hit in between saves it."""
    first, second, third, fourth = models(4)
    first.pins = second.pins = 1
    policy = filled(GDSFPolicy(), [first, second, third, fourth])
    policy.hit(fourth)
    assert policy.evict() is third
    policy.hit(second)
    policy.hit(second)
    first.pins = second.pins = 0
    assert drained(policy) == ["m0", "m3", "m1"]


def test_gdsf_clock_never_goes_back() -> None:
    """A victim that was pinned while the clock moved on does not take the clock back with it."""
    held, dear, other, newcomer = (
        Model("held", pins=1),
        Model("dear", cost=8),
        Model("other", cost=9),
        Model("new"),
    )
    policy = filled(GDSFPolicy(), [held, dear])
    assert policy.evict() is dear
    held.pins = 0
    policy.insert(other)
    assert policy.evict() is held
    policy.insert(newcomer)
    policy.hit(newcomer)
    assert policy._ranked["new"].priority == pytest.approx((8 + 1 + 1) / 100)


def test_gdsf_forgets_in_absence() -> None:
    """What was used often long ago is a stranger after enough halvings, though nobody looked at its count."""
    favourite, regular, newcomer = Model("favourite"), Model("regular"), Model("newcomer")
    policy = filled(GDSFPolicy(), [favourite])
    for _ in range(8):
        policy.hit(favourite)
    policy.remove(favourite)
    policy.insert(regular)
    for _ in range(60):
        policy.hit(regular)
    filled(policy, [favourite, newcomer])
    assert policy.evict() is favourite


def test_gdsf_looks_once_at_each_pinned() -> None:
    """A thousand pinned models cost each eviction one look at each, not a rebuilt heap."""
    looks = 0

    class Watched(Model):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "pins"
            return super().__getattribute__(name)

    policy = filled(GDSFPolicy(), [Watched(f"pinned{number}", cost=0.1, pins=1) for number in range(1000)])
    filled(policy, spare := models(100))
    assert policy.evict() in spare
    looks = 0
    for _ in range(50):
        assert policy.evict() in spare
    assert looks == 50 * 1000
    assert len(policy._heap) <= 50


def test_gdsf_history_is_bounded() -> None:
    """What is remembered of models long gone stays within a bound, however many come by."""
    policy = GDSFPolicy()
    for number in range(20_000):
        visitor = Model(f"visitor{number}")
        policy.insert(visitor)
        for _ in range(number % 40):
            policy.hit(visitor)
        policy.evict()
    assert len(policy._history) <= 1000


def test_gdsf_history_has_a_hard_bound() -> None:
    """Of many models called once no more than four are remembered for each that is resident."""
    policy = filled(GDSFPolicy(), models(1000))
    for visitor in models(8000, "visitor"):
        policy.insert(visitor)
        policy.remove(visitor)
    assert len(policy._history) == 4000


def test_gdsf_history_forgets_by_halving() -> None:
    """Counts that have been halved to nothing are forgotten, long before the hard bound."""
    policy = filled(GDSFPolicy(), residents := models(10))
    for number in range(500):
        policy.insert(visitor := Model(f"visitor{number}"))
        policy.remove(visitor)
        for entry in residents:
            policy.hit(entry)
    assert len(policy._history) < 40


def test_gdsf_heap_is_bounded() -> None:
    """Removals and falling costs leave void tickets behind, but never more than there are valid ones."""
    policy = filled(GDSFPolicy(), residents := models(100))
    for number in range(100):
        for entry in residents:
            entry.cost = 100 / (number + 1)
            policy.hit(entry)
        policy.remove(residents[number])
        policy.insert(residents[number])
    assert len(policy._heap) <= 2 * 100 + 64
    assert len(drained(policy)) == 100


def test_gdsf_an_eviction_after_many_hits_is_short() -> None:
    """It corrects some tickets and no more, and takes the least of them; evictions that follow correct the others."""
    policy = filled(GDSFPolicy(), residents := models(1000))
    for number, entry in enumerate(residents):
        for _ in range(1 + number % 7):
            policy.hit(entry)
    victim = policy.evict()
    assert residents.index(victim) % 7 == 0  # type: ignore[arg-type]
    raised = sum(ranked.ticket == ranked.priority for ranked in policy._ranked.values())
    assert raised < 40
    assert len(drained(policy)) == 999


def test_gdsf_an_eviction_passes_over_any_number_of_pinned_favourites() -> None:
    """That the first it looks at are all pinned does not make it give up."""
    policy = filled(GDSFPolicy(), pinned := [Model(f"pinned{number}", cost=0.1) for number in range(100)])
    filled(policy, [spare := Model("spare")])
    for entry in [*pinned, spare]:
        policy.hit(entry)
        entry.pins = entry is not spare
    assert policy.evict() is spare


def test_gdsf_passed_over_is_bounded() -> None:
    """A pinned model whose priority keeps falling is passed over with one ticket, not with many."""
    policy = filled(GDSFPolicy(), [pinned := Model("pinned", pins=1)])
    for number in range(100):
        pinned.cost = 1 / (number + 1)
        policy.hit(pinned)
        assert policy.evict() is None
    assert len(policy._passed_over) == 1


# ------------------------------------------------------------------------------------------------ simulation


@dataclass
class Outcome:
    seconds: float
    big_hits: float


def simulate(policy: EvictionPolicy, *, measured: bool = True, drift: int = 0) -> Outcome:
    """Zipf requests to models of very different sizes, with room for 5 % of their bytes.

    ``drift``: after so many requests other models become the popular ones. ``measured=False``: the policy is
    told that all loads cost the same.
    """
    rng = random.Random(7)
    sizes = [int(50_000 * math.exp(rng.gauss(0, 1.2))) for _ in range(1000)]
    seconds = [(0.05 + size / 5e6) * math.exp(rng.gauss(0, 0.7)) for size in sizes]
    fleet = [
        Model(str(number), size, cost if measured else 1.0)
        for number, (size, cost) in enumerate(zip(sizes, seconds, strict=True))
    ]
    popularity = [1 / (rank + 1) ** 0.9 for rank in range(len(fleet))]
    big = sorted(sizes)[-100]
    free = sum(sizes) // 20
    resident: set[Evictable] = set()
    spent, big_calls, big_hits = 0.0, 0, 0
    for step, rank in enumerate(rng.choices(range(len(fleet)), popularity, k=20_000)):
        number = (rank + (step // drift * 37 if drift else 0)) % len(fleet)
        entry = fleet[number]
        big_calls += entry.size >= big
        if entry in resident:
            big_hits += entry.size >= big
            policy.hit(entry)
            continue
        spent += seconds[number]
        while free < entry.size and (victim := policy.evict()) is not None:
            resident.remove(victim)
            free += victim.size
        policy.insert(entry)
        resident.add(entry)
        free -= entry.size
    return Outcome(spent, big_hits / big_calls)


@pytest.mark.parametrize("drift", [0, 2000], ids=["steady", "drifting"])
def test_gdsf_spends_less_time_loading(drift: int) -> None:
    """On a Zipf workload GDSF spends at least 15 % less time on loads than LRU, and less than S3-FIFO."""
    gdsf = simulate(GDSFPolicy(), drift=drift).seconds
    assert gdsf < 0.85 * simulate(LRUPolicy(), drift=drift).seconds
    assert gdsf < simulate(S3FIFOPolicy(), drift=drift).seconds < simulate(LRUPolicy(), drift=drift).seconds


def test_gdsf_with_measured_costs_does_not_starve_big_models() -> None:
    """Big models, slow to load, are found resident more often than if all loads counted the same."""
    assert simulate(GDSFPolicy()).big_hits > 1.5 * simulate(GDSFPolicy(), measured=False).big_hits


# --------------------------------------------------------------------------------------------------- S3-FIFO


def test_s3fifo_survives_a_scan() -> None:
    """A sweep over many models that are used once does not push out the ones in use; with LRU it does."""
    survivors = {}
    for policy in (S3FIFOPolicy(), LRUPolicy()):
        filled(policy, hot := models(5))
        for entry in hot * 2:
            policy.hit(entry)
        evicted = []
        for number in range(100):
            policy.insert(Model(f"scan{number}"))
            if number >= 15:
                evicted.append(policy.evict())
        survivors[type(policy)] = len(set(hot) - set(evicted))
    assert survivors == {S3FIFOPolicy: 5, LRUPolicy: 0}


def test_s3fifo_ghosts_come_back_to_the_main_queue() -> None:
    """Who comes back soon after it left sits in the main queue and outlives newcomers."""
    policy = filled(S3FIFOPolicy(), everyone := models(10))
    back = policy.evict()
    assert back is everyone[0]
    policy.insert(back)
    assert drained(policy)[-1] == back.key


def test_s3fifo_asks_for_two_uses() -> None:
    """One more use is not enough to get into the main queue, two are."""
    once, twice, unused = models(3)
    policy = filled(S3FIFOPolicy(), [once, twice, unused])
    for entry in (once, twice, twice):
        policy.hit(entry)
    assert drained(policy) == ["m0", "m2", "m1"]


def promoted(size: int = 100) -> tuple[S3FIFOPolicy, Model]:
    """Make a policy with one model in the main queue and none in the small one."""
    veteran, scrap = Model("veteran", size), Model("scrap", size)
    policy = filled(S3FIFOPolicy(), [veteran, scrap])
    for _ in range(50):
        policy.hit(veteran)
    assert policy.evict() is scrap
    return policy, veteran


def test_s3fifo_clears_uses_on_promotion() -> None:
    """What was counted in the small queue buys no second round in the main one."""
    policy, veteran = promoted()
    policy.insert(Model("scrap"))  # a ghost: straight to the main queue
    assert policy.evict() is veteran


def test_s3fifo_counts_to_three() -> None:
    """However often a model was used, three rounds later it leaves."""
    policy, veteran = promoted()
    for _ in range(100):
        policy.hit(veteran)
    victims = []
    for visitor in models(6, "visitor"):
        filled(policy, [visitor])
        policy.hit(visitor)
        policy.hit(visitor)  # straight to the main queue, where the veteran is first in line
        victims.append(policy.evict())
    assert victims.index(veteran) == 3


def test_s3fifo_lets_a_new_version_inherit() -> None:
    """A new version does not have to start in the small queue."""
    old, *others = models(5)
    policy = filled(S3FIFOPolicy(), [old, *others])
    policy.remove(old)
    filled(policy, [Model(old.key), *models(5, "newcomer")])
    assert drained(policy)[-1] == old.key


def test_s3fifo_weighs_bytes() -> None:
    """The small queue is over its tenth by bytes, not by number of models."""
    policy, veteran = promoted(size=1000)
    policy.insert(Model("tiny", size=10))
    assert policy.evict() is veteran


def test_s3fifo_bytes_add_up() -> None:
    """Both queues are back at 0 bytes when they are empty, though sizes changed meanwhile."""
    policy = filled(S3FIFOPolicy(), everyone := models(20))
    for number, entry in enumerate(everyone):
        entry.size = number * 10
        for _ in range(number % 4):
            policy.hit(entry)
    assert len(drained(policy)) == 20
    assert (policy._small.bytes, policy._main.bytes) == (0, 0)


def test_s3fifo_ghosts_are_bounded() -> None:
    """There are never more ghosts than there were entries inside."""
    policy = filled(S3FIFOPolicy(), models(20))
    for visitor in models(500, "visitor"):
        policy.insert(visitor)
        policy.evict()
    assert len(policy._ghosts) <= 21


# ------------------------------------------------------------------------------------------------ cachetools


def test_adapter_refuses_a_cache_in_use() -> None:
    """A cache that has items already cannot become a policy."""
    cache: cachetools.LRUCache[str, int] = cachetools.LRUCache(10)
    cache["a"] = 1
    with pytest.raises(ValueError, match="LRUCache of a policy must be empty, it has 1 items"):
        CachetoolsPolicy(cache)


def test_adapter_leaves_nothing_behind() -> None:
    """Removed and evicted models are gone from the cache too."""
    cache: cachetools.LRUCache[str, Model] = cachetools.LRUCache(10)
    removed, evicted = models(2)
    policy = filled(CachetoolsPolicy(cache), [removed, evicted])
    policy.remove(removed)
    assert list(cache) == ["m1"]
    assert policy.evict() is evicted
    assert not list(cache)


def test_adapter_evicts_first_what_a_full_cache_dropped() -> None:
    """What does not fit into the cache any more is first to go, in the order it was dropped."""
    policy = filled(CachetoolsPolicy(cachetools.LRUCache(2)), everyone := models(5))
    policy.hit(everyone[1])
    assert drained(policy) == ["m0", "m2", "m3", "m4", "m1"]


def test_adapter_keeps_what_is_too_large_for_the_cache() -> None:
    """A model larger than maxsize by the cache's own getsizeof drops nobody, and can be evicted."""
    policy = CachetoolsPolicy(cachetools.LRUCache(100, getsizeof=lambda entry: entry.size))
    filled(policy, [Model("fits", 60), Model("huge", 500), Model("fits too", 40)])
    assert drained(policy) == ["huge", "fits", "fits too"]


def test_adapter_evicts_expired_first() -> None:
    """Expired models are evicted before those that the cache would pop, and a hit gives them a new life."""
    clock = Clock()
    policy = CachetoolsPolicy(cachetools.TTLCache(100, ttl=10, timer=clock))
    expired, revived, fresh = models(3)
    filled(policy, [expired, revived])
    clock.now = 9
    filled(policy, [fresh])
    policy.hit(expired)
    clock.now = 11
    policy.hit(revived)
    assert drained(policy) == ["m0", "m2", "m1"]


def test_adapter_evicts_what_expired_between_two_looks() -> None:
    """Models that expire while evict() is under way are not lost."""
    clock = Clock()

    class LateExpiry(cachetools.TTLCache[Any, Any, float]):
        def popitem(self) -> tuple[Any, Any]:
            clock.now += 100
            return super().popitem()

    policy = filled(CachetoolsPolicy(LateExpiry(100, ttl=10, timer=clock)), models(3))
    assert drained(policy) == ["m0", "m1", "m2"]


def test_adapter_shows_entries_to_ttu() -> None:
    """The values of the cache are the entries, so that ttu can go by their cost."""
    clock = Clock()
    policy = CachetoolsPolicy(cachetools.TLRUCache(100, lambda _, entry, now: now + entry.cost, timer=clock))
    filled(policy, [Model("long", cost=100), Model("short", cost=1)])
    clock.now = 2
    assert drained(policy) == ["short", "long"]


def test_adapter_evicts_the_longest_expired_first() -> None:
    """Of two expired models the one that expired first goes first."""
    clock = Clock()
    policy = CachetoolsPolicy(cachetools.TLRUCache(100, lambda _, entry, now: now + entry.cost, timer=clock))
    filled(policy, [Model("long", cost=100), Model("short", cost=1)])
    clock.now = 200
    assert drained(policy) == ["short", "long"]


def test_adapter_notices_what_a_cache_drops_behind_its_back() -> None:
    """Models that a cache drops by a rule of its own are not lost, and are the next to go."""

    class Whimsical(cachetools.LRUCache[Any, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            if key == "m3":
                del self["m1"], self["m2"]

    policy = filled(CachetoolsPolicy(Whimsical(100)), models(5))
    assert drained(policy) == ["m1", "m2", "m0", "m3", "m4"]


def test_adapter_lends_the_order_of_lfu() -> None:
    """An adapted LFUCache evicts the least frequently used."""
    policy = filled(CachetoolsPolicy(cachetools.LFUCache(100)), everyone := models(3))
    for entry in (everyone[0], everyone[0], everyone[1]):
        policy.hit(entry)
    assert drained(policy) == ["m2", "m1", "m0"]


def test_adapter_lends_the_order_of_a_users_own_cache() -> None:
    """A subclass that only says which item to pop makes a policy."""

    class LargestFirst(cachetools.Cache[Any, Any]):
        def popitem(self) -> tuple[Any, Any]:
            key = max(self, key=lambda key: self[key].size)
            return key, self.pop(key)

    policy = CachetoolsPolicy(LargestFirst(100))
    filled(policy, [Model("middle", 20), Model("large", 30), Model("small", 10)])
    assert drained(policy) == ["large", "middle", "small"]


# ----------------------------------------------------------------------------------------------- make_policy


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("gdsf", GDSFPolicy),
        ("lru", LRUPolicy),
        ("s3fifo", S3FIFOPolicy),
        (GDSFPolicy, GDSFPolicy),
        (lambda: LRUPolicy(), LRUPolicy),  # noqa: PLW0108 - a callable that is no class
        (cachetools.LRUCache(10), CachetoolsPolicy),
        (lambda: cachetools.TTLCache(10, 10), CachetoolsPolicy),
    ],
)
def test_make_policy_takes_names_caches_and_callables(spec: Any, kind: type) -> None:
    """A policy is made from its name, a cachetools cache, or a callable that returns a policy or a cache."""
    assert type(make_policy(spec)) is kind


def test_make_policy_takes_a_policy_as_it_is() -> None:
    """An object with the four methods is the policy, no matter what else it can do."""

    class Callable_(Good):  # noqa: N801
        def __call__(self) -> None:
            raise AssertionError("a policy is not a factory")

    policy = Callable_()
    assert make_policy(policy) is policy


def test_make_policy_names_the_choices() -> None:
    """An unknown name is a ValueError that lists what there is."""
    with pytest.raises(ValueError, match="no eviction policy is named 'LFU': choose 'gdsf', 'lru', 's3fifo', an"):
        make_policy("LFU")


@pytest.mark.parametrize("spec", [None, 3, {}, object(), lambda: None, lambda: LRUPolicy, lambda: "lru"])
def test_make_policy_refuses_what_is_none(spec: Any) -> None:
    """Whatever is no policy and makes none is a TypeError that lists what there is."""
    with pytest.raises(TypeError, match="is no eviction policy and makes none: choose 'gdsf'"):
        make_policy(spec)

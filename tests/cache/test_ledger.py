"""The byte ledger, rule by rule: what is granted, in which order, and who has to leave for it."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

import oracle
from modelcache.cache.entry import Entry, State
from modelcache.cache.ledger import Ledger
from modelcache.cache.policies import Evictable, GDSFPolicy, LRUPolicy, S3FIFOPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelcache.cache.claims import Claim, GroupClaim
    from modelcache.cache.policies import EvictionPolicy

    MakeLedger = Callable[..., Ledger]

OVERTAKINGS = 16


@pytest.fixture
def make_ledger() -> Iterator[MakeLedger]:
    """Make ledgers whose clock ticks with each use; the oracle re-counts them after the test (L8)."""
    made: list[Ledger] = []

    def make(budget: int = 100, policy: EvictionPolicy | None = None) -> Ledger:
        ticks = count(1)
        ledger = Ledger(budget, policy or LRUPolicy(), clock=lambda: float(next(ticks)))
        made.append(ledger)
        return ledger

    yield make
    for ledger in made:
        oracle.check_ledger(ledger)


@pytest.fixture
def ledger(make_ledger: MakeLedger) -> Ledger:
    """A ledger over 100 bytes."""
    return make_ledger()


class Queued:
    """A claim as its load sees it."""

    def __init__(self, ledger: Ledger, key: str, size: int) -> None:
        self.waiter: Future[bool] = Future()
        self.claim: Claim
        self.claim, self.retired = ledger.claim(key, size, self.waiter)

    @property
    def granted(self) -> bool:
        return self.waiter.done() and not self.waiter.cancelled() and self.waiter.result()


class Together:
    """A claim for several models, as the group sees it."""

    def __init__(self, ledger: Ledger, **needs: int) -> None:
        self.waiter: Future[bool] = Future()
        self.claim: GroupClaim
        self.claim, self.retired = ledger.claim_together(needs, self.waiter)

    @property
    def granted(self) -> bool:
        return self.waiter.done() and self.waiter.result()

    @property
    def parts(self) -> dict[str, int]:
        return {part.key: part.bytes for part in self.claim.parts if part.granted}


def load(ledger: Ledger, key: str, size: int, *, leases: int = 0, pinned: bool = False) -> Entry[str]:
    """Make a model of ``size`` bytes resident, for which there is room."""
    queued = Queued(ledger, key, size)
    assert queued.granted
    return settle(ledger, queued, size, leases=leases, pinned=pinned)


def settle(ledger: Ledger, queued: Queued, size: int, *, leases: int = 0, pinned: bool = False) -> Entry[str]:
    entry = Entry(queued.claim.key, "what the worker holds", size=size, cost=1.0)
    entry.leases, entry.pinned = leases, pinned
    ledger.settle(queued.claim, entry)
    return entry


def figures(ledger: Ledger) -> tuple[int, int, int, int]:
    return ledger.resident, ledger.reserved, ledger.unloading, ledger.idle


def keys(entries: list[Entry[Any]]) -> list[str]:
    return [entry.key for entry in entries]


# L1: resident + reserved + unloading <= budget, in measured bytes


def test_a_claim_is_charged_from_its_grant_to_its_settlement(ledger: Ledger) -> None:
    """L1: a load is charged what it claimed, and what was measured once it is known."""
    queued = Queued(ledger, "a", 60)
    assert queued.granted
    assert figures(ledger) == (0, 60, 0, 0)
    settle(ledger, queued, 45)
    assert figures(ledger) == (45, 0, 0, 45)
    assert (ledger.charged, ledger.free) == (45, 55)


def test_nothing_is_granted_beyond_the_budget(ledger: Ledger) -> None:
    """L1: two loads that do not fit together do not run together, to the byte."""
    first, exact, over = Queued(ledger, "a", 60), Queued(ledger, "b", 40), Queued(ledger, "c", 1)
    assert (first.granted, exact.granted, over.granted) == (True, True, False)


def test_what_was_claimed_too_much_is_granted_to_the_next(ledger: Ledger) -> None:
    """L1: the settlement frees what was not needed, and grants it in the same step."""
    first, second = Queued(ledger, "a", 60), Queued(ledger, "b", 60)
    settle(ledger, first, 40, leases=1)
    assert second.granted
    assert ledger.free == 0


def test_a_claim_given_back_is_granted_to_the_next(ledger: Ledger) -> None:
    """L1: a failed load gives its bytes back, once, however often it says so."""
    first, second = Queued(ledger, "a", 60), Queued(ledger, "b", 60)
    ledger.give_back(first.claim)
    ledger.give_back(first.claim)
    assert second.granted
    assert figures(ledger) == (0, 60, 0, 0)


def test_a_queued_claim_given_back_lets_the_next_through(ledger: Ledger) -> None:
    """L2: a load that fails while it waits does not keep those behind it waiting."""
    load(ledger, "held", 60, leases=1)
    head, next_one = Queued(ledger, "a", 80), Queued(ledger, "b", 41)
    ledger.give_back(head.claim)
    assert list(ledger.queue) == [next_one.claim]
    ledger.resize(101)
    assert next_one.granted
    assert not head.granted


def test_a_resident_model_grows_by_free_bytes_alone(ledger: Ledger) -> None:
    """L1: nothing is evicted for it, and nobody who waits for bytes is passed."""
    first, second = load(ledger, "a", 30), load(ledger, "b", 30)
    assert not ledger.enlarge(first, 41)
    assert ledger.enlarge(first, 40)
    assert (first.size, figures(ledger)) == (70, (100, 0, 0, 100))
    ledger.shrink(first, 30)
    ledger.lease(first)
    ledger.lease(second)
    assert not Queued(ledger, "c", 50).granted
    assert not ledger.enlarge(first, 1)


@pytest.mark.parametrize("policy", [LRUPolicy, GDSFPolicy, S3FIFOPolicy])
def test_a_policy_ranks_by_the_size_that_a_model_has_grown_to(
    make_ledger: MakeLedger, policy: Callable[[], EvictionPolicy]
) -> None:
    """L7: it is told by remove and insert, so that it keeps no sum of its own that is wrong."""
    ledger = make_ledger(policy=policy())
    entry = load(ledger, "a", 30)
    ledger.enlarge(entry, 50)
    load(ledger, "b", 20)
    assert keys(Queued(ledger, "c", 90).retired) in (["a", "b"], ["b", "a"])
    assert ledger.policy is not None


def test_what_a_model_turns_out_not_to_take_is_granted_to_the_next(ledger: Ledger) -> None:
    """L1, L4: while the model itself is leased."""
    entry = load(ledger, "a", 30, leases=1)
    assert ledger.enlarge(entry, 60)
    other = Queued(ledger, "b", 60)
    assert not other.granted
    ledger.shrink(entry, 50)
    assert other.granted


def test_a_pinned_model_may_grow_and_shrink(ledger: Ledger) -> None:
    """L4: what pins hold is counted with it."""
    entry = load(ledger, "a", 30, pinned=True)
    assert ledger.enlarge(entry, 60)
    assert ledger.room == 10
    ledger.shrink(entry, 50)
    assert (ledger.room, figures(ledger)) == (60, (40, 0, 0, 0))


@pytest.mark.parametrize("leases", [0, 1])
def test_a_model_may_shrink_on_its_way_out(ledger: Ledger, leases: int) -> None:
    """L5: what it takes less is free at once, the rest when the worker says so."""
    entry = load(ledger, "a", 90, leases=leases)
    ledger.detach("a", "unload")
    ledger.shrink(entry, 50)
    assert ledger.charged == 40
    if leases:
        ledger.release(entry)
    ledger.acknowledge(entry)
    assert ledger.charged == 0


# L2: first come, first served


def test_grants_follow_the_order_of_claims(ledger: Ledger) -> None:
    """L2: bytes go to whoever has waited longest, each as soon as its bytes are there."""
    held = [load(ledger, key, 25, leases=1) for key in "abcd"]
    queue = [Queued(ledger, key, 25) for key in "efgh"]
    granted = []
    for entry in held:
        ledger.release(entry)
        ledger.acknowledge(entry)
        granted.append([queued.claim.key for queued in queue if queued.granted])
    assert granted == [["e"], ["e", "f"], ["e", "f", "g"], ["e", "f", "g", "h"]]


def test_a_claim_whose_load_has_gone_is_skipped(ledger: Ledger) -> None:
    """F9: the waiter of a dropped load is not granted anything, even before its task has cleaned up."""
    first, gone, last = (Queued(ledger, key, 60) for key in "abc")
    gone.waiter.cancel()
    ledger.give_back(first.claim)
    assert last.granted
    assert figures(ledger) == (0, 60, 0, 0)


def test_smaller_claims_pass_one_that_waits_for_leases(ledger: Ledger) -> None:
    """L2: bytes do not lie idle behind a claim that a lease blocks."""
    load(ledger, "held", 50, leases=1)
    head, small, too_big = Queued(ledger, "a", 60), Queued(ledger, "b", 20), Queued(ledger, "c", 31)
    assert (head.granted, small.granted, too_big.granted) == (False, True, False)


def test_passers_fit_together(ledger: Ledger) -> None:
    """L1, L2: when several could pass in one step, each is measured against what those before it left."""
    load(ledger, "held", 50, leases=1)
    filler, head = Queued(ledger, "filler", 50), Queued(ledger, "a", 60)
    passers = [Queued(ledger, "b", size) for size in (30, 30, 20)]
    ledger.give_back(filler.claim)
    assert [passer.granted for passer in passers] == [True, False, True]
    assert not head.granted


def test_overtaking_is_bounded(ledger: Ledger) -> None:
    """L2: a large claim is passed a number of times and then next, so that small ones cannot starve it."""
    held = load(ledger, "held", 50, leases=1)
    head = Queued(ledger, "large", 100)
    for _ in range(OVERTAKINGS):
        passer = Queued(ledger, "small", 10)
        assert passer.granted
        ledger.give_back(passer.claim)
    late = Queued(ledger, "small", 10)
    assert not late.granted
    retired = ledger.release(held)
    assert ledger.acknowledge(retired[0]) == []
    assert head.granted
    assert not late.granted


def test_claims_of_loads_that_have_gone_overtake_nobody(ledger: Ledger) -> None:
    """L2: only real grants count as overtakings, and a claim that was cancelled is granted nothing."""
    load(ledger, "held", 50, leases=1)
    filler, head = Queued(ledger, "filler", 50), Queued(ledger, "large", 100)
    for _ in range(2 * OVERTAKINGS):
        Queued(ledger, "gone", 1).waiter.cancel()
    ledger.give_back(filler.claim)
    assert ledger.reserved == 0
    assert Queued(ledger, "small", 10).granted
    assert not head.granted


def test_nobody_passes_a_claim_whose_bytes_are_on_their_way(ledger: Ledger) -> None:
    """L2: what an eviction frees is for the claim that it was made for."""
    load(ledger, "idle", 70)
    head = Queued(ledger, "a", 60)
    assert keys(head.retired) == ["idle"]
    small = Queued(ledger, "b", 10)
    assert not small.granted
    ledger.acknowledge(head.retired[0])
    assert head.granted
    assert small.granted


# L3: nothing is evicted in vain


@pytest.mark.parametrize("obstacle", ["lease", "load"])
def test_nobody_is_evicted_for_a_claim_that_has_to_wait_anyway(ledger: Ledger, obstacle: str) -> None:
    """L3: while leases or other loads hold what is missing, the idle models stay."""
    idle = load(ledger, "idle", 30)
    if obstacle == "load":
        obstructing = Queued(ledger, "held", 50)
    else:
        held = load(ledger, "held", 50, leases=1)
    queued = Queued(ledger, "a", 80)
    assert (queued.retired, idle.state) == ([], State.READY)
    retired = ledger.give_back(obstructing.claim) if obstacle == "load" else ledger.release(held)
    assert keys(retired) == (["idle"] if obstacle == "load" else ["idle", "held"])


def test_no_more_are_evicted_than_are_needed(ledger: Ledger) -> None:
    """L3: free bytes and those of unloads under way count before anybody else has to go."""
    for key in "abcd":
        load(ledger, key, 20)
    first = Queued(ledger, "e", 50)
    assert keys(first.retired) == ["a", "b"]
    assert [(entry.cause, entry.displaced_by) for entry in first.retired] == [("budget", "e")] * 2
    ledger.give_back(first.claim)
    second = Queued(ledger, "f", 60)
    assert second.retired == []
    assert ledger.acknowledge(first.retired[0]) == []
    assert ledger.acknowledge(first.retired[1]) == []
    assert second.granted


def test_an_eviction_waits_for_the_first_to_be_over(ledger: Ledger) -> None:
    """L3: one claim at a time makes others leave; the one behind it is looked at when it is its turn."""
    for key in "ab":
        load(ledger, key, 50)
    first, second = Queued(ledger, "c", 50), Queued(ledger, "d", 50)
    assert (keys(first.retired), second.retired) == (["a"], [])
    assert keys(ledger.acknowledge(first.retired[0])) == ["b"]


# L4: leases and pins


def test_leased_and_pinned_models_are_not_evicted(ledger: Ledger) -> None:
    """L4: the victim is the only one that nobody holds, though it was used last."""
    leased, pinned, both = load(ledger, "leased", 25), load(ledger, "pinned", 25), load(ledger, "both", 25)
    free = load(ledger, "free", 25)
    ledger.lease(leased)
    ledger.pin(pinned)
    ledger.pin(both)
    ledger.lease(both)
    ledger.hit(free)
    assert ledger.idle == 25
    assert Queued(ledger, "a", 25).retired == [free]
    ledger.unpin(both)
    assert ledger.idle == 0


def test_a_pin_and_leases_end_one_by_one(ledger: Ledger) -> None:
    """L4: an entry is idle when its last lease and its pin have ended; pinning twice is pinning once."""
    entry = load(ledger, "a", 10, leases=1)
    ledger.lease(entry)
    ledger.pin(entry)
    ledger.pin(entry)
    assert entry.pins == 3
    ledger.release(entry)
    ledger.unpin(entry)
    ledger.unpin(entry)
    assert ledger.idle == 0
    ledger.release(entry)
    assert (ledger.idle, ledger.leases, entry.pins) == (10, 0, 0)


def test_an_unloaded_model_stays_charged_until_its_last_lease_ends(ledger: Ledger) -> None:
    """L4: it is out of the table at once, and retired by the last release."""
    entry = load(ledger, "a", 60, leases=2)
    assert ledger.detach("a", "unload") == []
    assert ("a" in ledger.table, entry.state, entry.cause) == (False, State.DETACHED, "unload")
    assert ledger.release(entry) == []
    assert figures(ledger) == (60, 0, 0, 0)
    assert ledger.release(entry) == [entry]
    assert figures(ledger) == (0, 0, 60, 0)


def test_a_replaced_model_stays_beside_the_new_one_while_it_is_leased(ledger: Ledger) -> None:
    """L4: both versions are charged, and removal is by identity: the end of the old one leaves the new one alone."""
    old = load(ledger, "a", 40, leases=1)
    new = load(ledger, "a", 50)
    assert (ledger.table["a"], old.state, old.cause) == (new, State.DETACHED, "replaced")
    assert figures(ledger) == (90, 0, 0, 50)
    assert ledger.release(old) == [old]
    ledger.acknowledge(old)
    assert ledger.table["a"] is new
    assert figures(ledger) == (50, 0, 0, 50)


def test_a_replaced_idle_model_is_retired_at_once(ledger: Ledger) -> None:
    """L4: nobody waits for a version that nobody uses."""
    old = load(ledger, "a", 40)
    queued = Queued(ledger, "a", 50)
    assert ledger.settle(queued.claim, Entry("a", "new", size=50, cost=1.0)) == [old]
    assert figures(ledger) == (50, 0, 40, 50)


def test_an_unload_ends_a_pin(ledger: Ledger) -> None:
    """L4: a pinned model that is unloaded leaves; its bytes were not idle before and are not after."""
    entry = load(ledger, "a", 60, pinned=True)
    assert ledger.detach("a", "unload") == [entry]
    assert not entry.pinned
    assert figures(ledger) == (0, 0, 60, 0)


def test_a_pin_comes_too_late_for_a_model_that_is_leaving(ledger: Ledger) -> None:
    """L4: pinned after it was unloaded, it would be charged for ever: nobody could find it to unpin it.

    1. A caller of ``pin`` waits for a load. 2. The load lands and hands over a lease. 3. Before the caller wakes up,
    somebody unloads the model. 4. The caller wakes up, pins the entry, and releases its lease.
    """
    entry = load(ledger, "a", 60, leases=1)
    ledger.detach("a", "unload")
    ledger.pin(entry)
    assert not entry.pinned
    assert ledger.release(entry) == [entry]


def test_what_lands_unlisted_is_for_its_leases_only(ledger: Ledger) -> None:
    """F10: a model unloaded while it loaded does not enter the table, and leaves with its last lease."""
    listed = load(ledger, "a", 30)
    queued = Queued(ledger, "a", 40)
    entry = Entry("a", "of the old flight", size=40, cost=1.0)
    entry.leases = 1
    assert ledger.settle(queued.claim, entry, listed=False) == []
    assert ledger.table["a"] is listed
    assert figures(ledger) == (70, 0, 0, 30)
    assert ledger.release(entry) == [entry]


def test_what_lands_unlisted_and_unleased_leaves_at_once(ledger: Ledger) -> None:
    """F10: nobody wants it."""
    queued = Queued(ledger, "a", 40)
    entry = Entry("a", "of the old flight", size=40, cost=1.0)
    assert ledger.settle(queued.claim, entry, listed=False) == [entry]
    assert figures(ledger) == (0, 0, 40, 0)


# L5: bytes are free when the worker says so, or is dead


def test_evicted_bytes_are_free_when_the_worker_says_so(ledger: Ledger) -> None:
    """L5: until then they are charged, and the claim they were evicted for waits."""
    entry = load(ledger, "a", 100)
    queued = Queued(ledger, "b", 10)
    assert (queued.granted, figures(ledger)) == (False, (0, 0, 100, 0))
    ledger.acknowledge(entry)
    assert (queued.granted, figures(ledger), entry.state) == (True, (0, 10, 0, 0), State.GONE)


def test_acknowledging_twice_frees_once(ledger: Ledger) -> None:
    """L5: a report that comes late, after the worker's death for example, changes nothing."""
    entry = load(ledger, "a", 60)
    ledger.detach("a", "unload")
    ledger.acknowledge(entry)
    assert ledger.acknowledge(entry) == []
    assert figures(ledger) == (0, 0, 0, 0)


def test_an_abandoned_load_is_charged_until_the_worker_has_freed_it(ledger: Ledger) -> None:
    """L5: a load that was given up may have taken all the bytes it was granted."""
    queued, waiting = Queued(ledger, "a", 60), Queued(ledger, "b", 60)
    [entry] = ledger.abandon(queued.claim, "where it was loaded")
    assert (entry.value, entry.size, entry.state) == ("where it was loaded", 60, State.UNLOADING)
    assert figures(ledger) == (0, 0, 60, 0)
    ledger.give_back(queued.claim)
    assert not waiting.granted
    ledger.acknowledge(entry)
    assert waiting.granted


@pytest.mark.parametrize("state", ["idle", "leased", "pinned", "detached", "unloading", "gone"])
def test_a_worker_that_dies_frees_what_it_held(ledger: Ledger, state: str) -> None:
    """L5: whatever state an entry was in, its bytes are free at once, and whoever waits for them gets them."""
    entry = load(ledger, "a", 60, leases=state in ("leased", "detached"), pinned=state == "pinned")
    if state in ("detached", "unloading", "gone"):
        ledger.detach("a", "unload")
    if state == "gone":
        ledger.acknowledge(entry)
    ledger.lose([entry], "worker")
    assert (entry.state, figures(ledger)) == (State.GONE, (0, 0, 0, 0))
    assert entry.cause == ("unload" if state in ("detached", "unloading", "gone") else "worker")
    assert Queued(ledger, "b", 100).granted
    if entry.leases:
        assert ledger.release(entry) == []
        assert ledger.leases == 0


def test_a_claim_is_granted_by_the_death_of_a_worker(ledger: Ledger) -> None:
    """L5: those who wait need not wait for anything else to happen."""
    entries = [load(ledger, key, 50, leases=1) for key in "ab"]
    queued = Queued(ledger, "c", 80)
    ledger.lose(entries, "worker")
    assert queued.granted
    for entry in entries:
        ledger.release(entry)


# L6: a load that turns out larger


def grow(ledger: Ledger, queued: Queued, size: int) -> tuple[Future[bool], list[Entry[Any]]]:
    waiter: Future[bool] = Future()
    return waiter, ledger.grow(queued.claim, size, waiter)


def test_a_claim_grows_into_free_bytes(ledger: Ledger) -> None:
    """L6: the growth is granted at once and settled with the rest."""
    queued = Queued(ledger, "a", 60)
    waiter, retired = grow(ledger, queued, 90)
    assert (waiter.result(timeout=0), retired, queued.claim.bytes) == (True, [], 90)
    assert figures(ledger) == (0, 90, 0, 0)
    settle(ledger, queued, 85)
    assert figures(ledger) == (85, 0, 0, 85)


def test_a_claim_that_grows_makes_idle_models_leave(ledger: Ledger) -> None:
    """L6: it waits for the unloads it causes, before all other claims, and then has its bytes."""
    idle = load(ledger, "idle", 30)
    queued = Queued(ledger, "a", 60)
    waiting = Queued(ledger, "b", 90)
    waiter, retired = grow(ledger, queued, 80)
    assert (retired, waiter.done(), queued.claim.bytes) == ([idle], False, 60)
    assert idle.displaced_by == "a"
    ledger.acknowledge(idle)
    assert (waiter.result(timeout=0), queued.claim.bytes, waiting.granted) == (True, 80, False)


def test_a_claim_that_grows_never_waits_for_a_lease(ledger: Ledger) -> None:
    """L6: it is refused, and nobody is evicted for it: two that hold bytes would wait for each other for ever."""
    load(ledger, "held", 30, leases=1)
    idle = load(ledger, "idle", 10)
    queued = Queued(ledger, "a", 60)
    waiter, retired = grow(ledger, queued, 71)
    assert (waiter.result(timeout=0), retired, idle.state) == (False, [], State.READY)
    assert (queued.claim.granted, queued.claim.bytes) == (True, 60)
    ledger.give_back(queued.claim)


def test_two_claims_that_grow_do_not_wait_for_each_other(ledger: Ledger) -> None:
    """L6: the second takes what is there, the first is told."""
    load(ledger, "idle", 20)
    first, second = Queued(ledger, "a", 40), Queued(ledger, "b", 40)
    one, retired = grow(ledger, first, 60)
    assert keys(retired) == ["idle"]
    other, _ = grow(ledger, second, 60)
    assert (one.done(), other.done()) == (False, False)
    ledger.acknowledge(retired[0])
    assert (other.result(timeout=0), one.result(timeout=0)) == (True, False)


def test_a_growth_ends_with_its_claim(ledger: Ledger) -> None:
    """L6: a load that fails while it waits to grow leaves nothing in the queue."""
    load(ledger, "idle", 40)
    queued = Queued(ledger, "a", 60)
    waiter, retired = grow(ledger, queued, 100)
    ledger.give_back(queued.claim)
    assert waiter.result(timeout=0) is False
    ledger.acknowledge(retired[0])
    assert figures(ledger) == (0, 0, 0, 0)
    assert not ledger.queue


def test_a_growth_that_was_cancelled_is_not_granted(ledger: Ledger) -> None:
    """L6: 1. a claim waits to grow; 2. its task is cancelled; 3. the bytes come before the task has cleaned up."""
    load(ledger, "idle", 40)
    queued = Queued(ledger, "a", 60)
    waiter, retired = grow(ledger, queued, 100)
    waiter.cancel()
    ledger.acknowledge(retired[0])
    assert (queued.claim.bytes, ledger.reserved) == (60, 60)
    [entry] = ledger.abandon(queued.claim, "")
    assert entry.size == 60


def test_a_claim_abandoned_after_it_has_grown_is_charged_in_full(ledger: Ledger) -> None:
    """L5, L6: 1. a growth is granted; 2. in the same tick the load is given up; 3. the worker may have it all."""
    queued = Queued(ledger, "a", 60)
    grow(ledger, queued, 90)
    [entry] = ledger.abandon(queued.claim, "")
    assert (entry.size, figures(ledger)) == (90, (0, 0, 90, 0))


# L7: policies rank, and are not trusted with more


class Policy:
    """Writes down what it is told, and does what the test says when it is asked for a victim."""

    def __init__(self, evict: Callable[[], Any] = lambda: None, *, raises: str = "") -> None:
        self.told: list[str] = []
        self.asked = 0
        self._evict = evict
        self._raises = raises

    def _note(self, what: str, entry: Evictable) -> None:
        self.told.append(f"{what} {entry.key}")
        if what == self._raises:
            raise RuntimeError(f"no {what} today")

    def insert(self, entry: Evictable) -> None:
        self._note("insert", entry)

    def hit(self, entry: Evictable) -> None:
        self._note("hit", entry)

    def remove(self, entry: Evictable) -> None:
        self._note("remove", entry)

    def evict(self) -> Any:
        self.asked += 1
        return self._evict()


def test_the_policy_is_told_what_happens_in_the_table(make_ledger: MakeLedger) -> None:
    """L7: insert, hit and remove for what is in the table; nothing about models that are not, or no more."""
    policy = Policy()
    ledger = make_ledger(policy=policy)
    entry = load(ledger, "a", 10, leases=1)
    ledger.hit(entry)
    load(ledger, "a", 20)
    ledger.hit(entry)
    ledger.detach("a", "unload")
    queued = Queued(ledger, "b", 10)
    ledger.settle(queued.claim, Entry("b", "", size=10, cost=1.0), listed=False)
    assert policy.told == ["insert a", "hit a", "remove a", "insert a", "remove a"]


def test_the_policy_chooses_the_victim(make_ledger: MakeLedger) -> None:
    """L7: an idle model of the table may be chosen, whatever the ledger's own order says."""
    ledger = make_ledger()
    entries = [load(ledger, key, 25) for key in "abcd"]
    ledger.policy = Policy(lambda: entries[2])
    assert Queued(ledger, "e", 20).retired == [entries[2]]
    assert ledger.policy is not None


@pytest.mark.parametrize("raises", ["insert", "hit", "remove"])
def test_a_policy_that_raises_is_dismissed(
    make_ledger: MakeLedger, caplog: pytest.LogCaptureFixture, raises: str
) -> None:
    """L7: whatever it raises harms no step; a warning says where and why, and it is not asked again."""
    policy = Policy(raises=raises)
    ledger = make_ledger(policy=policy)
    entry = load(ledger, "a", 10)
    ledger.hit(entry)
    ledger.detach("a", "unload")
    load(ledger, "b", 10)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("modelcache", logging.WARNING)
    assert f"failed in {raises}; least-recently-used order replaces it" in record.getMessage()
    assert record.exc_info and isinstance(record.exc_info[1], RuntimeError)
    assert policy.told[-1] == f"{raises} a"
    assert ledger.policy is None


def _raise() -> None:
    raise RuntimeError("no evict today")


@pytest.mark.parametrize("answer", ["raises", "None", "garbage", "leased", "replaced", "gone", "stranger"])
def test_a_policy_that_chooses_wrongly_is_dismissed(
    make_ledger: MakeLedger, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    """L7: least-recently-used order takes over in that very step, and a warning names the choice."""
    ledger = make_ledger()
    gone, replaced = load(ledger, "gone", 1), load(ledger, "b", 1)
    ledger.detach("gone", "unload")
    ledger.acknowledge(gone)
    newest, oldest, leased = load(ledger, "b", 30), load(ledger, "a", 30), load(ledger, "c", 30, leases=1)
    ledger.hit(newest)
    ledger.acknowledge(replaced)
    choices: dict[str, Any] = {
        "None": None,
        "garbage": object(),
        "leased": leased,
        "replaced": replaced,
        "gone": gone,
        "stranger": Entry("a", "", size=30, cost=1.0),
    }
    ledger.policy = policy = Policy(_raise if answer == "raises" else lambda: choices[answer])
    assert Queued(ledger, "d", 70).retired == [oldest, newest]
    [record] = caplog.records
    assert "failed in evict" in record.getMessage()
    assert (f"it chose {choices.get(answer)!r}" in record.getMessage()) == (answer != "raises")
    assert (record.exc_info is not None) == (answer == "raises")
    assert policy.asked == 1


def test_without_a_policy_the_least_recently_used_leave_first(make_ledger: MakeLedger) -> None:
    """L7: the ledger's own order is that of the last uses, and passes over those in use."""
    ledger = make_ledger(policy=Policy(raises="hit"))
    entries = {key: load(ledger, key, 25) for key in "abcd"}
    ledger.hit(entries["a"])
    ledger.lease(entries["b"])
    assert keys(Queued(ledger, "e", 50).retired) == ["c", "d"]


# L8 and what users read


def test_a_use_is_counted_and_dated(ledger: Ledger) -> None:
    """A hit shows in the entry and moves it to the end of the table; one that has left is only counted."""
    first, second = load(ledger, "a", 10), load(ledger, "b", 10, leases=1)
    before = first.last_used
    ledger.hit(first)
    assert (first.hits, list(ledger.table)) == (1, ["b", "a"])
    assert first.last_used > max(before, second.last_used)
    ledger.detach("b", "unload")
    ledger.hit(second)
    assert (second.hits, list(ledger.table)) == (1, ["a"])


def test_when_all_is_given_back_all_figures_are_zero(ledger: Ledger) -> None:
    """L8: leases, pins, claims and growths leave nothing behind."""
    entries = [load(ledger, key, 20, leases=2, pinned=key == "a") for key in "ab"]
    queued = Queued(ledger, "c", 30)
    grow(ledger, queued, 50)
    ledger.give_back(queued.claim)
    ledger.unpin(entries[0])
    for entry in entries * 2:
        ledger.release(entry)
    for entry in entries:
        ledger.detach(entry.key, "close")
        ledger.acknowledge(entry)
    assert figures(ledger) == (0, 0, 0, 0)
    assert (ledger.leases, ledger.leaving, len(ledger.table)) == (0, set(), 0)


def test_detaching_a_key_that_is_not_there_is_harmless(ledger: Ledger) -> None:
    """``unload`` of a name that is not resident retires nothing."""
    assert ledger.detach("a", "unload") == []


def test_entries_and_claims_describe_themselves(ledger: Ledger) -> None:
    """Their repr shows what a debugger wants to know."""
    entry = load(ledger, "a", 60, leases=2, pinned=True)
    assert repr(entry) == "<Entry a ready 60 B, 2 leases, pinned>"
    assert repr(Queued(ledger, "b", 40).claim) == "<Claim b 40 B granted>"
    assert repr(Together(ledger, a=60, c=40).claim) == "<GroupClaim a, c 100 B queued>"


# L3: what is pinned is no room for anybody


@pytest.fixture
def pinned(ledger: Ledger) -> Entry[str]:
    """A pin that leaves 40 of 100 bytes."""
    return load(ledger, "pinned", 60, pinned=True)


def test_a_claim_that_pins_leave_no_room_for_is_refused(ledger: Ledger, pinned: Entry[str]) -> None:
    """L3: at once, instead of keeping the others waiting for an ``unpin`` that may never come; leases are awaited."""
    idle = load(ledger, "idle", 30)
    assert ledger.room == 40
    refused = Queued(ledger, "a", 41)
    assert refused.waiter.result(timeout=0) is False
    assert idle.state is State.READY
    ledger.lease(idle)
    waiting = Queued(ledger, "b", 40)
    assert not waiting.waiter.done()
    assert ledger.release(idle) == [idle]
    ledger.acknowledge(idle)
    assert waiting.granted
    ledger.give_back(waiting.claim)
    ledger.unpin(pinned)


def test_a_pin_refuses_what_waits_for_the_lease_under_it(ledger: Ledger) -> None:
    """L2, L3: claims that wait for a lease are refused when what is leased is pinned, and block nobody any more."""
    entry = load(ledger, "a", 50, leases=1)
    large, small = Queued(ledger, "large", 60), Queued(ledger, "small", 55)
    assert not large.waiter.done()
    ledger.pin(entry)
    assert large.waiter.result(timeout=0) is False
    assert small.waiter.result(timeout=0) is False
    assert Queued(ledger, "fits", 50).granted


def test_who_parks_is_told_of_room(ledger: Ledger, pinned: Entry[str]) -> None:
    """L3: by an ``unpin``, by an ``unload`` once its bytes are free, or by a larger budget."""
    waiters: list[Future[bool]] = [Future() for _ in range(3)]
    for size, waiter in zip((41, 61, 110), waiters, strict=True):
        ledger.wait_for_room(size, waiter)
    ledger.resize(101)
    assert [waiter.done() for waiter in waiters] == [True, False, True], "110 bytes are beyond the budget: look again"
    ledger.unpin(pinned)
    assert all(waiter.result(timeout=0) for waiter in waiters)
    assert not ledger.parked


def test_an_unload_of_what_is_pinned_makes_room(ledger: Ledger, pinned: Entry[str]) -> None:
    """L3, L5: a pin ends with its entry; who parks hears of it when the bytes are free."""
    waiter: Future[bool] = Future()
    ledger.wait_for_room(100, waiter)
    (leaving,) = ledger.detach("pinned", "unload")
    assert (ledger.pinned, leaving.pinned) == (0, False)
    ledger.acknowledge(leaving)
    assert waiter.result(timeout=0)


def test_who_parks_no_more_is_forgotten(ledger: Ledger, pinned: Entry[str]) -> None:
    """L3: a load that was given up while it parked."""
    waiter: Future[bool] = Future()
    ledger.wait_for_room(50, waiter)
    waiter.cancel()
    ledger.unpin(pinned)
    assert not ledger.parked


def test_holders_are_named(ledger: Ledger) -> None:
    """L4: those with leases, also if they have been unloaded, and those with pins; once each, sorted."""
    load(ledger, "idle", 10)
    detached = load(ledger, "z", 10, leases=1)
    ledger.detach("z", "unload")
    replacement = load(ledger, "z", 10, leases=1)
    load(ledger, "b", 10, pinned=True)
    assert ledger.holders() == ("b", "z")
    for entry in (detached, replacement):
        for retired in ledger.release(entry):
            ledger.acknowledge(retired)


# Groups: all or nothing


def test_a_group_gets_leases_and_bytes_in_one_step(ledger: Ledger) -> None:
    """L3: what is resident is leased, and what is not is reserved, each part to be settled by itself."""
    resident = load(ledger, "a", 30)
    group = Together(ledger, a=30, b=20, c=10)
    assert group.granted
    assert group.claim.leased == [resident]
    assert resident.leases == 1
    assert group.parts == {"b": 20, "c": 10}
    assert figures(ledger) == (30, 30, 0, 0)
    entry = Entry("b", "", size=15, cost=1.0)
    ledger.settle(group.claim.parts[0], entry)
    ledger.give_back(group.claim.parts[1])
    ledger.release(resident)
    assert figures(ledger) == (45, 0, 0, 45)


def test_a_group_holds_nothing_while_it_waits(ledger: Ledger) -> None:
    """L3, L4: neither a lease on what is resident nor a byte, until it can have everything."""
    mine, held = load(ledger, "a", 30), load(ledger, "held", 60, leases=1)
    group = Together(ledger, a=30, b=20)
    assert not group.waiter.done()
    assert group.retired == []
    assert (mine.leases, ledger.reserved) == (0, 0)
    (retired,) = ledger.release(held)
    assert mine.leases == 0
    ledger.acknowledge(retired)
    assert group.granted
    assert (mine.leases, group.parts) == (1, {"b": 20})
    ledger.give_back(group.claim.parts[0])
    ledger.release(mine)


def test_a_group_does_not_evict_its_own(ledger: Ledger) -> None:
    """L3: the least recently used stays if the group needs it, and the next goes instead."""
    mine, other = load(ledger, "a", 40), load(ledger, "b", 50)
    group = Together(ledger, a=40, c=30)
    assert group.retired == [other]
    assert mine.leases == 0
    ledger.acknowledge(other)
    assert group.granted
    ledger.give_back(group.claim.parts[0])
    ledger.release(mine)


def test_a_group_that_others_leave_no_room_for_evicts_nobody(ledger: Ledger) -> None:
    """L3: its own resident models are no room for the others of it."""
    idle = load(ledger, "idle", 10)
    mine, held = load(ledger, "a", 40), load(ledger, "held", 40, leases=1)
    group = Together(ledger, a=40, b=30)
    assert (group.waiter.done(), group.retired) == (False, [])
    assert idle.state is mine.state is State.READY
    ledger.give_back(group.claim)
    ledger.release(held)


def test_a_group_whose_model_is_evicted_meanwhile_gets_bytes_for_it(ledger: Ledger) -> None:
    """L3: what was resident when the group came, and is not when its turn comes, is loaded again."""
    load(ledger, "a", 30)
    held = load(ledger, "held", 60, leases=1)
    group = Together(ledger, a=30, b=20)
    (retired,) = ledger.detach("a", "unload")
    ledger.acknowledge(retired)
    assert not group.granted
    (retired,) = ledger.release(held)
    ledger.acknowledge(retired)
    assert group.parts == {"a": 30, "b": 20}
    for part in group.claim.parts:
        ledger.give_back(part)


def test_groups_and_claims_wait_in_one_line(ledger: Ledger) -> None:
    """L2: first come, first served; a few smaller ones that fit as it is may pass, groups or not."""
    held = load(ledger, "held", 60, leases=1)
    group = Together(ledger, a=30, b=30)
    later = Queued(ledger, "later", 50)
    small = Together(ledger, c=20, d=20)
    assert (group.waiter.done(), later.waiter.done(), small.granted) == (False, False, True)
    (retired,) = ledger.release(held)
    ledger.acknowledge(retired)
    assert (group.granted, later.waiter.done()) == (True, False)
    ledger.give_back(later.claim)
    for part in (*group.claim.parts, *small.claim.parts):
        ledger.give_back(part)


def test_groups_overtake_a_bounded_number_of_times(ledger: Ledger) -> None:
    """L2: as single claims do."""
    load(ledger, "held", 50, leases=1)
    head = Queued(ledger, "large", 60)
    for _ in range(OVERTAKINGS):
        group = Together(ledger, a=20, b=20)
        assert group.granted
        for part in group.claim.parts:
            ledger.give_back(part)
    last = Together(ledger, a=20, b=20)
    assert not last.waiter.done()
    ledger.give_back(last.claim)
    ledger.give_back(head.claim)


def test_a_group_with_pins_of_its_own_is_not_refused_for_them(ledger: Ledger, pinned: Entry[str]) -> None:
    """L3: a pin is in the way of others only."""
    group = Together(ledger, pinned=60, b=40)
    assert group.granted
    assert Together(ledger, c=20, d=30).waiter.result(timeout=0) is False
    ledger.give_back(group.claim.parts[0])
    ledger.release(pinned)


def test_an_abandoned_load_grows_no_more(ledger: Ledger) -> None:
    """L6: bytes that were still to come are not granted to a claim that has ended."""
    idle = load(ledger, "idle", 40)
    queued = Queued(ledger, "a", 60)
    waiter, _ = grow(ledger, queued, 90)
    (entry,) = ledger.abandon(queued.claim, "place")
    assert waiter.result(timeout=0) is False
    ledger.acknowledge(idle)
    ledger.acknowledge(entry)
    assert figures(ledger) == (0, 0, 0, 0)


def test_a_claim_can_be_taken_out_of_the_queue(ledger: Ledger) -> None:
    """L2: a load that gets its bytes by a group waits no more; the next is served."""
    load(ledger, "held", 50, leases=1)
    queued, small = Queued(ledger, "a", 60), Queued(ledger, "b", 55)
    ledger.refuse(queued.claim)
    assert queued.waiter.result(timeout=0) is False
    assert not small.waiter.done()
    ledger.refuse(queued.claim)
    assert Queued(ledger, "c", 50).granted


# resize


def test_a_larger_budget_grants_what_waits(ledger: Ledger) -> None:
    """``resize`` upwards: in the same step."""
    load(ledger, "a", 60, leases=1)
    queued = Queued(ledger, "b", 60)
    assert ledger.resize(120) == []
    assert queued.granted


def test_a_smaller_budget_evicts_what_is_over_it(ledger: Ledger) -> None:
    """``resize`` downwards: the least used leave at once, no more of them than needed."""
    for key in "abcd":
        load(ledger, key, 25)
    retired = ledger.resize(60)
    assert [(entry.key, entry.cause, entry.displaced_by) for entry in retired] == [
        ("a", "budget", None),
        ("b", "budget", None),
    ]
    assert ledger.free == -40
    for entry in retired:
        assert ledger.acknowledge(entry) == []
    assert ledger.free == 10


def test_what_is_in_use_leaves_a_smaller_budget_when_it_is_not(ledger: Ledger) -> None:
    """``resize`` downwards, L4: leases and running loads are left alone, and nothing new is granted meanwhile."""
    leased = load(ledger, "leased", 50, leases=1)
    loading, waiting = Queued(ledger, "loading", 50), Queued(ledger, "waiting", 30)
    assert ledger.resize(40) == []
    assert ledger.free == -60
    assert ledger.release(leased) == [leased]
    ledger.acknowledge(leased)
    assert not waiting.granted
    entry = Entry("loading", "", size=45, cost=1.0)
    assert ledger.settle(loading.claim, entry) == [entry]
    ledger.acknowledge(entry)
    assert waiting.granted


def test_a_release_makes_room_for_a_smaller_budget(ledger: Ledger) -> None:
    """``resize`` downwards: what was in use is evicted when it no longer is, though nobody waits for its bytes."""
    entry = load(ledger, "a", 60, leases=2)
    ledger.resize(40)
    assert ledger.release(entry) == []
    assert ledger.release(entry) == [entry]
    ledger.acknowledge(entry)


def test_a_claim_beyond_a_smaller_budget_is_told(ledger: Ledger) -> None:
    """``resize`` downwards: a claim that can never be granted any more does not keep the others waiting."""
    held = load(ledger, "held", 50, leases=1)
    too_large, small = Queued(ledger, "a", 90), Queued(ledger, "b", 60)
    ledger.resize(80)
    assert too_large.waiter.result(timeout=0) is False
    assert not small.waiter.done()
    ledger.give_back(too_large.claim)
    ledger.acknowledge(*ledger.release(held))
    assert small.granted


def test_a_growth_that_a_smaller_budget_makes_impossible_is_refused(ledger: Ledger) -> None:
    """``resize`` downwards, L6: it was waiting for an unload, and would now wait for leases."""
    idle = load(ledger, "idle", 40)
    queued = Queued(ledger, "a", 60)
    waiter, retired = grow(ledger, queued, 90)
    assert retired == [idle]
    ledger.resize(80)
    assert waiter.result(timeout=0) is False
    ledger.acknowledge(idle)
    assert ledger.reserved == 60

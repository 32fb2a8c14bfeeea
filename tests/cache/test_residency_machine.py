"""Ledger and flights together, driven as the loader and the registry drive them, in any order hypothesis can think of.

The machine plays everything around the two: callers, the tasks of loads, the store, and workers that hold real bytes
from the moment a load begins until they report the bytes free, or die. Between any two steps of a task lies a step of
the event loop, so a future that is resolved and the task that wakes up from it are two rules. After each rule the
oracle re-counts the ledger, and the ledger is compared with what the workers really hold.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, count
from typing import TYPE_CHECKING, Any, NamedTuple

import cachetools
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import oracle
from modelcache.cache.claims import Claim, GroupClaim
from modelcache.cache.entry import Entry, State
from modelcache.cache.flight import DesertedError, Flight, Flights, Phase, RegroupError
from modelcache.cache.ledger import Ledger
from modelcache.cache.policies import CachetoolsPolicy, Evictable, GDSFPolicy, LRUPolicy, S3FIFOPolicy
from modelcache.errors import (
    BudgetTimeoutError,
    CorruptArtifactError,
    LoadTimeoutError,
    ModelCacheError,
    ModelNotFoundError,
    ModelTooLargeError,
    RegistryClosedError,
    WorkerCrashedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelcache.cache.policies import EvictionPolicy

    Entries = list[Entry[Any]]

BUDGET = 100
WORKERS = 2
OVERTAKINGS = 16
PATIENCE = 2000
"""Chores after which a machine that is left alone must have come to rest."""

keys = st.sampled_from("abcdef")
sizes = st.one_of(st.integers(5, 60), st.integers(0, 110))
picks = st.integers(0, 11)
residents = st.lists(st.tuples(keys, st.integers(5, 60), st.booleans()), max_size=6)


class FicklePolicy(LRUPolicy):
    """An honest policy, until it is told to go wrong."""

    mode = "honest"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Evictable] = []

    def insert(self, entry: Evictable) -> None:
        self.seen.append(entry)
        if self.mode != "forgets":
            super().insert(entry)

    def hit(self, entry: Evictable) -> None:
        if self.mode == "raises":
            raise RuntimeError("hit")
        super().hit(entry)

    def evict(self) -> Evictable | None:
        if self.mode == "raises":
            raise RuntimeError("evict")
        if self.mode == "garbage":
            return "garbage"  # type: ignore[return-value]
        if self.mode == "pinned":
            return next((entry for entry in self.seen if entry.pins), None)
        if self.mode == "stale":
            return self.seen[0]
        return super().evict()


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "gdsf": GDSFPolicy,
    "lru": LRUPolicy,
    "s3fifo": S3FIFOPolicy,
    "cachetools": lambda: CachetoolsPolicy(cachetools.LFUCache(4)),
    "fickle": FicklePolicy,
}


class Place(NamedTuple):
    """What an entry stands for."""

    worker: FakeWorker
    number: int


@dataclass(eq=False)
class FakeWorker:
    """A process: what it physically holds, and what it has been told."""

    bytes: dict[int, int] = field(default_factory=dict)
    """Real bytes by model number."""
    held: dict[int, Entry[Any]] = field(default_factory=dict)
    """As the parent's ``Worker.held``."""
    orders: list[int] = field(default_factory=list)
    """Unloads ordered and not acknowledged."""
    alive: bool = True

    def unload(self, number: int) -> None:
        assert number in self.bytes, "told to unload what it does not hold"
        assert number not in self.orders, "told twice to unload"
        self.orders.append(number)


class At(Enum):
    """Where the task of a load waits."""

    SLOT = "a load slot"
    PARKED = "pins to leave room"
    STORE = "the store"
    CLAIM = "the bytes claimed"
    WORKER = "the worker"
    GROWTH = "more bytes"


@dataclass(eq=False)
class Load:
    """The task that flies a flight."""

    flight: Flight
    at: At = At.SLOT
    claim: Claim | None = None
    promise: Future[bool] = field(default_factory=Future)
    """The grant it waits for."""
    worker: FakeWorker | None = None
    number: int = 0
    least: int = 0
    """Bytes it is known to need."""
    measured: int | None = None
    interrupted: ModelCacheError | None = None
    """It was cancelled, and will raise this when it wakes up."""

    @property
    def lost(self) -> bool:
        return self.worker is not None and not self.worker.alive

    @property
    def awake(self) -> bool:
        """Nothing but its own next step is missing."""
        waits = self.at in (At.PARKED, At.CLAIM, At.GROWTH)
        return waits and self.promise.done() and self.interrupted is None


@dataclass(eq=False)
class Group:
    """A call that needs several models together."""

    claim: GroupClaim
    promise: Future[bool]
    leases: Entries = field(default_factory=list)
    """Those it has while the others load."""


@dataclass(eq=False)
class Caller:
    """A call that waits for a flight; its future may be resolved before it wakes up."""

    flight: Flight
    pins: bool
    promise: Future[Entry[Any]] = field(default_factory=Future)
    timed_out: bool = False
    group: Group | None = None


class ResidencyMachine(RuleBasedStateMachine):
    """One rule is one step of the event loop."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)), ending=st.sampled_from(("rest", "close", "kill")), residents=residents
    )
    def start(self, policy: str, ending: str, residents: list[tuple[str, int, bool]]) -> None:
        ticks = count(1)
        self.policy = POLICIES[policy]()
        self.ledger = Ledger(BUDGET, self.policy, clock=lambda: float(next(ticks)))
        self.flights = Flights()
        self.workers = [FakeWorker() for _ in range(WORKERS)]
        self.ending = ending
        self.numbers = count(1)
        self.loads: dict[Flight, Load] = {}
        self.callers: list[Caller] = []
        self.groups: list[Group] = []
        """Those whose claim is queued, or that have not woken up to its grant."""
        self.leases: Entries = []
        """Handed over and not yet released."""
        self.pinned_keys: set[str] = set()
        self.pinned: Entries = []
        self.arrivals: list[Claim] = []
        """Claims that wait, in the order in which they came."""
        self.passed: Counter[Claim] = Counter()
        self.overrun: set[int] = set()
        """Numbers of models that were measured larger than their claim."""
        self.ceiling = BUDGET
        """The budget, or what was charged when it was made smaller."""
        self.failures: dict[Flight, ModelCacheError] = {}
        self.exceptions: list[BaseException] = []
        for key, size, leased in residents:
            self.have_resident(key, size, leased=leased)

    # Every step of the ledger goes through here

    def decide(self, operation: Callable[[], Entries]) -> None:
        """Take a step of the ledger, check what it decided, and pass its orders on to the workers."""
        had_policy = self.ledger.policy is not None
        retired = operation()
        # A load that was abandoned was never in the table, nor was a copy, and so never used.
        victims = [entry for entry in retired if entry.cause == "budget" and entry.last_used]
        self.check_victims(victims)
        if victims and not had_policy:
            self.check_lru_order(victims)
        self.check_order_of_grants()
        for entry in retired:
            assert entry.state is State.UNLOADING
            assert entry not in self.leases, "L4: a leased entry is to be unloaded"
            entry.value.worker.held[entry.value.number] = entry
            entry.value.worker.unload(entry.value.number)

    def check_victims(self, victims: Entries) -> None:
        """Rules L3 and L4: nobody in use is evicted, nobody in vain, and nobody beyond what is needed."""
        ledger = self.ledger
        assert not [victim for victim in victims if victim in self.leases or victim in self.pinned]
        assert not victims or all(copy.pins for copy in ledger.copies), "copies go first"
        for_claim = [victim for victim in victims if victim.displaced_by is not None]
        shed = [victim for victim in victims if victim.displaced_by is None]
        if for_claim:
            head = ledger.queue[0]
            assert {victim.displaced_by for victim in for_claim} == {head.key}
            coming = ledger.free + ledger.unloading
            assert coming - for_claim[-1].size < head.wanted(ledger.table) <= coming
            assert not isinstance(head, GroupClaim) or not head.needs.keys() & {victim.key for victim in for_claim}
            if head.beside in for_claim:
                possible = ledger.free + ledger.unloading + ledger.idle
                assert possible - head.beside.size < head.wanted(ledger.table), "S3: the old version goes last"
        if shed:
            kept = ledger.resident + ledger.reserved + sum(victim.size for victim in for_claim)
            assert kept + shed[-1].size > ledger.budget

    def check_lru_order(self, victims: Entries) -> None:
        """Rule L7: without a policy the least recently used go first."""
        kept = self.ledger.queue[0].kept(self.ledger.table) if self.ledger.queue else []
        idle = [entry for entry in self.ledger.table.values() if not entry.pins and entry not in kept]
        assert all(victim.last_used < entry.last_used for victim in victims for entry in idle)

    def check_order_of_grants(self) -> None:
        """Rule L2: first come, first served; who waits for leases is passed, by claims that fit, a few times."""
        ledger, arrivals = self.ledger, self.arrivals
        waiting = [claim for claim in arrivals if claim.state == "queued" and not claim.waiter.done()]
        assert waiting == [claim for claim in ledger.queue if not claim.grows and not claim.waiter.done()]
        if waiting:
            first = waiting[0]
            passers = [claim for claim in arrivals[arrivals.index(first) :] if was_granted(claim)]
            self.passed[first] += len(passers)
            assert self.passed[first] <= OVERTAKINGS
            if passers:
                before = ledger.free + sum(granted_bytes(claim) for claim in passers)
                since = Counter(e for claim in passers if isinstance(claim, GroupClaim) for e in claim.leased)
                own = first.kept(ledger.table)
                were_idle = [entry for entry, leases in since.items() if entry.pins == leases and entry not in own]
                idle = ledger.idle + sum(entry.size for entry in were_idle)
                assert first.wanted(ledger.table) > before + ledger.unloading + idle - idle_bytes(first, ledger)
        self.arrivals = waiting

    # Callers

    @rule(key=keys, pins=st.sampled_from((False, False, False, True)))
    def call(self, key: str, pins: bool) -> None:
        """A call: a hit takes a lease at once, a miss joins the flight or starts one (F1)."""
        entry = self.ledger.table.get(key)
        if entry is not None:
            self.ledger.lease(entry)
            self.ledger.hit(entry)
            self.leases.append(entry)
            if pins:
                self.pin(entry)
            return
        listed = self.flights.by_key.get(key)
        waiter: Future[Entry[Any]] = Future()
        flight, is_new = self.flights.join(key, waiter)
        assert is_new == (listed is None)
        self.callers.append(Caller(flight, pins, waiter))
        if is_new:
            self.loads[flight] = Load(flight)

    @precondition(lambda self: self.ledger.table)
    @rule(pick=picks)
    def renew(self, pick: int) -> None:
        """``refresh``: the store is asked for another version of a resident model (S3)."""
        entry = list(self.ledger.table.values())[pick % len(self.ledger.table)]
        flight = self.flights.by_key.get(entry.key)
        if flight is not None and flight.has_asked:
            return  # as Leasing.refresh: it waits until that has landed
        waiter: Future[Entry[Any]] = Future()
        flight, is_new = self.flights.join(entry.key, waiter)
        flight.renews = entry
        self.callers.append(Caller(flight, pins=False, promise=waiter))
        if is_new:
            self.loads[flight] = Load(flight)

    @precondition(lambda self: any(self.is_confirmable(load) for load in self.loads.values()))
    @rule(pick=picks)
    def confirm(self, pick: int) -> None:
        """As ``Residency.confirm``: the store has no other version, and who waits gets the one that is there."""
        loads = [load for load in self.loads.values() if self.is_confirmable(load)]
        load = loads[pick % len(loads)]
        entry = load.flight.renews
        assert entry is not None
        for waiter in self.flights.land(load.flight):
            self.ledger.lease(entry)
            waiter.set_result(entry)
        self.end(load)

    def is_confirmable(self, load: Load) -> bool:
        renews = load.flight.renews
        return renews is not None and renews.state is State.READY and self.is_idle_at(load, At.STORE)

    @precondition(lambda self: any(self.is_confirmable(load) for load in self.loads.values()))
    @rule(pick=picks)
    def deleted(self, pick: int) -> None:
        """As ``Residency.not_renewed``: the store does not have the model any more, and it leaves."""
        loads = [load for load in self.loads.values() if self.is_confirmable(load)]
        load = loads[pick % len(loads)]
        key = load.flight.key
        if self.ledger.table.get(key) is load.flight.renews:
            self.pinned = [entry for entry in self.pinned if entry.key != key]
            self.decide(lambda: self.ledger.detach(key, "deleted"))
        self.fail(load, ModelNotFoundError("deleted"))

    def pin(self, entry: Entry[Any]) -> None:
        self.pinned_keys.add(entry.key)
        if entry.state is State.READY and entry not in self.pinned:
            self.pinned.append(entry)
        self.decide(lambda: self.ledger.pin(entry))

    @precondition(lambda self: any(not caller.promise.done() for caller in self.callers))
    @rule(pick=picks, by_timeout=st.booleans())
    def lose_patience(self, pick: int, by_timeout: bool) -> None:
        """A waiter is cancelled or times out; only its own future takes note (F3)."""
        waiting = [caller for caller in self.callers if not caller.promise.done()]
        caller = waiting[pick % len(waiting)]
        if caller.group is not None:
            self.break_up(caller.group)
            return
        others = [other.promise.done() for other in self.callers if other is not caller]
        if by_timeout:
            caller.timed_out = True
            caller.promise.set_exception(LoadTimeoutError("out of time"))
        else:
            caller.promise.cancel()
        assert others == [other.promise.done() for other in self.callers if other is not caller]

    @precondition(lambda self: any(caller.promise.done() for caller in self.callers))
    @rule(pick=picks, cancelled=st.sampled_from((False, False, True)))
    def wake_caller(self, pick: int, cancelled: bool) -> None:
        """A caller whose future is resolved wakes up, perhaps to find itself cancelled in the same tick (F5)."""
        ready = [caller for caller in self.callers if caller.promise.done()]
        self.wake(ready[pick % len(ready)], cancelled=cancelled)

    def wake(self, caller: Caller, *, cancelled: bool = False) -> None:
        if caller.group is not None:
            self.wake_member(caller, caller.group, cancelled=cancelled)
            return
        self.callers.remove(caller)
        if not caller.promise.cancelled():
            self.take_answer(caller, cancelled=cancelled)
        self.leave(caller)

    def leave(self, caller: Caller) -> None:
        flight, load = caller.flight, self.loads.get(caller.flight)
        deserted = flight in self.flights.airborne and not any(
            not other.promise.done() for other in self.callers if other.flight is flight
        )
        drop = self.flights.leave(flight, caller.promise)
        assert drop == (deserted and load is not None and load.at in (At.SLOT, At.PARKED, At.CLAIM)), "F9"
        if drop:
            assert self.flights.by_key.get(flight.key) is not flight, "F7: a dying flight can be joined"
            assert load is not None
            self.interrupt(load, RegistryClosedError("nobody waits for it"))

    def take_answer(self, caller: Caller, *, cancelled: bool) -> None:
        error = caller.promise.exception()
        if error is None:
            entry = caller.promise.result()
            self.leases.append(entry)
            if cancelled:
                self.release(entry)
            elif caller.pins:
                self.pin(entry)
            return
        assert not any(error is other for other in self.exceptions), "F6: an exception of its own"
        self.exceptions.append(error)
        if not caller.timed_out:
            assert error.__cause__ is self.failures[caller.flight], "F6: from the one attempt"

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def end_call(self, pick: int) -> None:
        """A call ends and releases its lease."""
        self.release(self.leases[pick % len(self.leases)])

    def release(self, entry: Entry[Any]) -> None:
        self.leases.remove(entry)
        self.release_entry(entry)

    # Copies

    @precondition(lambda self: self.ledger.table)
    @rule(pick=picks, leased=st.booleans())
    def copy(self, pick: int, leased: bool) -> None:
        """A hot model comes into a further worker, with bytes that nobody needs; perhaps it is used at once."""
        ledger = self.ledger
        original = list(ledger.table.values())[pick % len(ledger.table)]
        holders = [holder.value.worker for holder in (original, *original.copies)]
        workers = [worker for worker in self.workers if worker not in holders]
        if not workers or ledger.queue or original.size > ledger.free:
            return
        claim, retired = ledger.claim(original.key, original.size, Future())
        assert claim.granted
        assert not retired, "a copy displaces nobody"
        copy = Entry(original.key, Place(workers[0], next(self.numbers)), size=original.size, cost=1.0)
        workers[0].bytes[copy.value.number] = copy.size
        workers[0].held[copy.value.number] = copy
        self.decide(lambda: ledger.settle_copy(claim, copy, original))
        if leased:
            self.use_copy(0)

    @precondition(lambda self: self.ledger.copies)
    @rule(pick=picks)
    def use_copy(self, pick: int) -> None:
        """A call goes to a copy."""
        copy = list(self.ledger.copies)[pick % len(self.ledger.copies)]
        self.ledger.lease(copy)
        self.leases.append(copy)

    # Groups

    @rule(needs=st.dictionaries(keys, st.integers(5, 40), min_size=2, max_size=3))
    def call_together(self, needs: dict[str, int]) -> None:
        """A call that holds several models: all of them at once, or nothing."""
        table, ledger = self.ledger.table, self.ledger
        needs = {key: table[key].size if key in table else size for key, size in needs.items()}
        own_pins = sum(table[key].size for key in needs if key in table and table[key].pinned)
        if sum(needs.values()) > ledger.room + own_pins:
            return  # as Groups._claim: it is refused, or parks
        promise: Future[bool] = Future()

        def operation() -> Entries:
            claim, retired = ledger.claim_together(needs, promise)
            self.groups.append(Group(claim, promise))
            self.arrivals.append(claim)
            return retired

        self.decide(operation)

    @precondition(lambda self: any(group.promise.done() for group in self.groups))
    @rule(pick=picks, cancelled=st.sampled_from((False, False, True)))
    def wake_group(self, pick: int, cancelled: bool) -> None:
        """A group whose claim is decided wakes up, perhaps to find itself cancelled in the same tick."""
        decided = [group for group in self.groups if group.promise.done()]
        self.decide_group(decided[pick % len(decided)], cancelled=cancelled)

    def decide_group(self, group: Group, *, cancelled: bool = False) -> None:
        if cancelled or not group.promise.result():
            self.disband(group)
        else:
            self.board(group)

    @precondition(lambda self: self.groups)
    @rule(pick=picks)
    def group_loses_patience(self, pick: int) -> None:
        """A group is cancelled, or runs out of time, before it has everything."""
        self.disband(self.groups[pick % len(self.groups)])

    def disband(self, group: Group) -> None:
        """As ``Groups._disband``."""
        self.groups.remove(group)
        group.promise.cancel()
        for claim in (group.claim, *group.claim.parts):
            self.decide(lambda claim=claim: self.ledger.give_back(claim))  # type: ignore[misc]
        for entry in group.claim.leased:
            self.decide(lambda entry=entry: self.ledger.release(entry))  # type: ignore[misc]

    def board(self, group: Group) -> None:
        """As ``Groups._board``: each of the others is loaded by its flight, with the bytes granted."""
        self.groups.remove(group)
        group.leases += group.claim.leased
        for entry in group.claim.leased:
            self.ledger.hit(entry)
        for part in group.claim.parts:
            since = self.ledger.table.get(part.key)
            if since is not None:
                self.ledger.lease(since)
                group.leases.append(since)
                self.decide(lambda part=part: self.ledger.give_back(part))  # type: ignore[misc]
                continue
            waiter: Future[Entry[Any]] = Future()
            flight, is_new = self.flights.join(part.key, waiter)
            self.callers.append(Caller(flight, pins=False, promise=waiter, group=group))
            flight.group_waiters.add(waiter)
            self.endow(flight, part)
            if is_new:
                self.loads[flight] = Load(flight)
        self.complete(group)

    def endow(self, flight: Flight, part: Claim) -> None:
        """As ``Loader.endow``."""
        if flight.reserve is not None:
            self.decide(lambda: self.ledger.give_back(part))
            return
        flight.reserve = part
        claim = flight.claim
        if claim is not None:
            self.decide(lambda: self.ledger.refuse(claim))

    def wake_member(self, caller: Caller, group: Group, *, cancelled: bool) -> None:
        """One of the loads that a group waits for has been decided."""
        error = caller.promise.exception()
        if cancelled or error is not None:
            assert error is None or isinstance(error, RegroupError) or error.__cause__ is self.failures[caller.flight]
            self.break_up(group)
            return
        self.callers.remove(caller)
        group.leases.append(caller.promise.result())
        self.leave(caller)
        self.complete(group)

    def complete(self, group: Group) -> None:
        if not any(caller.group is group for caller in self.callers):
            self.leases += group.leases
            group.leases = []

    def break_up(self, group: Group) -> None:
        """One of its loads has failed, or the call was cancelled: everything is given back, in one step."""
        for caller in [caller for caller in self.callers if caller.group is group]:
            self.callers.remove(caller)
            if not caller.promise.cancel() and caller.promise.exception() is None:
                self.release_entry(caller.promise.result())
            self.leave(caller)
        for entry in group.leases:
            self.release_entry(entry)
        group.leases = []

    def release_entry(self, entry: Entry[Any]) -> None:
        self.decide(lambda: self.ledger.release(entry))

    # Users

    @precondition(lambda self: self.ledger.table or self.flights.by_key)
    @rule(pick=picks, call_again=st.booleans())
    def unload(self, pick: int, call_again: bool) -> None:
        """``unload``: whatever is under that name leaves, when its last lease ends (F10, L4)."""
        names = [*self.ledger.table, *self.flights.by_key]
        key = names[pick % len(names)]
        self.forget(key)
        if call_again:
            self.call(key, pins=False)

    def forget(self, key: str) -> None:
        self.pinned_keys.discard(key)
        self.pinned = [entry for entry in self.pinned if entry.key != key]
        self.flights.detach(key)
        self.decide(lambda: self.ledger.detach(key, "unload"))
        assert key not in self.ledger.table
        assert key not in self.flights.by_key

    @precondition(lambda self: self.pinned_keys)
    @rule(pick=picks)
    def unpin(self, pick: int) -> None:
        """``unpin`` of a name, whether its model is still resident or not."""
        names = sorted(self.pinned_keys)
        self.end_pin(names[pick % len(names)])

    def end_pin(self, key: str) -> None:
        self.pinned_keys.discard(key)
        self.pinned = [entry for entry in self.pinned if entry.key != key]
        entry = self.ledger.table.get(key)
        if entry is not None:
            self.decide(lambda: self.ledger.unpin(entry))

    @rule(budget=st.integers(20, 150))
    def resize(self, budget: int) -> None:
        """``resize``: above a smaller budget the charged bytes may only shrink."""
        self.ceiling = max(budget, self.ledger.charged)
        self.decide(lambda: self.ledger.resize(budget))

    @precondition(lambda self: isinstance(self.ledger.policy, FicklePolicy))
    @rule(mode=st.sampled_from(("raises", "garbage", "pinned", "stale", "forgets")))
    def spoil_policy(self, mode: str) -> None:
        """The policy goes wrong from now on (L7)."""
        assert isinstance(self.policy, FicklePolicy)
        self.policy.mode = mode

    # Loads

    def pick_load(self, at: At, pick: int) -> Load:
        loads = [load for load in self.loads.values() if self.is_idle_at(load, at)]
        return loads[pick % len(loads)]

    def is_idle_at(self, load: Load, at: At) -> bool:
        return load.at is at and load.interrupted is None and not load.lost

    def any_at(self, at: At) -> bool:
        return any(self.is_idle_at(load, at) for load in self.loads.values())

    @precondition(lambda self: self.any_at(At.SLOT))
    @rule(pick=picks)
    def get_slot(self, pick: int) -> None:
        """A load slot is free: the store is asked."""
        self.fetch(self.pick_load(At.SLOT, pick))

    def fetch(self, load: Load) -> None:
        load.at, load.flight.phase = At.STORE, Phase.LOADING
        load.claim = load.worker = load.measured = None

    @precondition(lambda self: self.any_at(At.STORE))
    @rule(pick=picks, estimate=sizes)
    def fetched(self, pick: int, estimate: int) -> None:
        """The store has the artifact: its bytes are claimed."""
        self.claim(self.pick_load(At.STORE, pick), estimate)

    @precondition(lambda self: self.any_at(At.STORE))
    @rule(pick=picks)
    def not_fetched(self, pick: int) -> None:
        """The store fails: so does the flight, and nothing was evicted for it (L3)."""
        self.fail(self.pick_load(At.STORE, pick), ModelNotFoundError("not there"))

    def claim(self, load: Load, estimate: int) -> None:
        """Claim bytes; as the loader does, after a look at whether the model can fit at all."""
        if load.least > self.ledger.budget:
            self.fail(load, ModelTooLargeError("too large"))
            return
        if load.flight.reserve is not None:
            self.use_reserve(load, load.flight.reserve)
            return
        if load.least > self.ledger.room:
            self.park(load)
            return
        size = min(max(estimate, load.least), self.room_for(load))
        load.promise = Future()

        def operation() -> Entries:
            load.claim, retired = self.ledger.claim(load.flight.key, size, load.promise, load.flight.renews)
            load.flight.claim = load.claim
            self.arrivals.append(load.claim)
            return retired

        self.decide(operation)
        if load.promise.done():
            self.resume_claim(load)
        else:
            load.at = At.CLAIM
            self.starve(load)

    def room_for(self, load: Load) -> int:
        """As ``Attempt._room_for``."""
        room, older = self.ledger.room, load.flight.renews
        beside = room - (older.size if older is not None and not older.pinned else 0)
        return beside if load.least <= beside else room

    def use_reserve(self, load: Load, reserve: Claim) -> None:
        """A group has been granted bytes for this load."""
        load.claim = load.flight.claim = reserve
        load.flight.reserve = None
        if load.least > reserve.bytes:
            self.grow(load, load.least)
        else:
            self.begin(load)

    def park(self, load: Load) -> None:
        """As ``Loader._park``: pins leave too little room, and the load waits with nothing in hand."""
        load.at, load.promise = At.PARKED, Future()
        self.starve(load)
        if load.flight in self.loads:
            self.ledger.wait_for_room(load.least, load.promise)

    def starve(self, load: Load) -> None:
        try:
            self.flights.wait(load.flight, Phase.STARVED)
        except DesertedError:
            self.give_up(load)
            self.end(load)

    def end(self, load: Load) -> None:
        """As the end of the task in ``Loader.start``."""
        del self.loads[load.flight]
        self.ledger.parked.pop(load.promise, None)
        reserve = load.flight.reserve
        if reserve is not None:
            self.decide(lambda: self.ledger.give_back(reserve))

    def begin(self, load: Load) -> None:
        """The bytes are granted: from here on the worker may take all of them."""
        assert load.claim is not None and load.claim.granted
        load.at, load.flight.phase = At.WORKER, Phase.LOADING
        load.worker = min(self.workers, key=lambda worker: sum(worker.bytes.values()))
        load.number = next(self.numbers)
        load.worker.bytes[load.number] = load.claim.bytes

    @precondition(lambda self: any(load.awake for load in self.loads.values()))
    @rule(pick=picks)
    def wake_load(self, pick: int) -> None:
        """A load whose grant has been decided wakes up."""
        awake = [load for load in self.loads.values() if load.awake]
        self.resume(awake[pick % len(awake)])

    def resume(self, load: Load) -> None:
        granted = load.promise.result()
        if load.at is At.PARKED:
            self.fetch(load)
        elif load.at is At.CLAIM:
            self.resume_claim(load)
        elif load.lost:
            self.notice(load)
        elif not granted:  # start again, with a larger claim from the start
            self.give_up(load)
            self.fetch(load)
        elif load.worker is None:  # what a group was granted for it has grown
            self.begin(load)
        elif load.measured is not None:
            self.land(load)
        else:
            assert load.claim is not None and load.worker is not None
            load.at = At.WORKER
            load.worker.bytes[load.number] = load.claim.bytes

    def resume_claim(self, load: Load) -> None:
        assert load.claim is not None
        if load.promise.result():
            self.begin(load)
        else:  # there is less room than the claim, or a group has bytes for it
            self.claim(load, load.claim.bytes)

    @precondition(lambda self: self.any_at(At.WORKER))
    @rule(pick=picks, more=st.integers(1, 60))
    def ask_for_more(self, pick: int, more: int) -> None:
        """The artifact is larger than announced: the worker stops until the claim has grown."""
        load = self.pick_load(At.WORKER, pick)
        assert load.claim is not None
        self.grow(load, load.claim.bytes + more)

    @precondition(lambda self: self.any_at(At.WORKER))
    @rule(pick=picks, difference=st.one_of(st.just(0), st.integers(-60, 30)))
    def loaded(self, pick: int, difference: int) -> None:
        """The worker has loaded the model and measured it: below, at, or above the claim."""
        load = self.pick_load(At.WORKER, pick)
        assert load.claim is not None
        self.measure(load, max(0, load.claim.bytes + difference))

    def measure(self, load: Load, size: int) -> None:
        assert load.claim is not None and load.worker is not None
        load.measured = load.worker.bytes[load.number] = size
        if size > load.claim.bytes:
            self.overrun.add(load.number)
            self.grow(load, size)
        else:
            self.land(load)

    def grow(self, load: Load, size: int) -> None:
        claim = load.claim
        assert claim is not None
        load.least = size
        if size > self.ledger.budget:
            self.fail(load, ModelTooLargeError("too large after all"))
            return
        load.at, load.promise = At.GROWTH, Future()
        self.decide(lambda: self.ledger.grow(claim, size, load.promise))
        if load.promise.done():
            self.resume(load)

    def land(self, load: Load) -> None:
        """As ``Loader._land``: one step from the measured size to a lease for everyone who waits (F4)."""
        flight, claim, worker, size = load.flight, load.claim, load.worker, load.measured
        assert claim is not None and worker is not None and size is not None
        expected = [c.promise for c in self.callers if c.flight is flight and not c.promise.done()]
        waiters = self.flights.land(flight)
        assert set(waiters) == set(expected)
        entry = Entry(flight.key, Place(worker, load.number), size=size, cost=1.0)
        entry.leases = len(waiters)
        entry.pinned = flight.listed and flight.key in self.pinned_keys
        if entry.pinned:
            self.pinned = [other for other in self.pinned if other.key != flight.key] + [entry]
        worker.held[load.number] = entry
        for waiter in waiters:
            waiter.set_result(entry)
        self.decide(lambda: self.ledger.settle(claim, entry, listed=flight.listed))
        assert (self.ledger.table.get(flight.key) is entry) == (flight.listed and entry.state is State.READY)
        flight.claim = None
        self.end(load)

    @precondition(lambda self: self.any_at(At.WORKER))
    @rule(pick=picks)
    def refused(self, pick: int) -> None:
        """The worker refuses the artifact, and has freed what it took of it."""
        load = self.pick_load(At.WORKER, pick)
        assert load.worker is not None
        del load.worker.bytes[load.number]
        load.worker = None
        self.fail(load, CorruptArtifactError("corrupt"))

    def fail(self, load: Load, error: ModelCacheError) -> None:
        """As ``Loader._attempt`` and ``_fail``: give back, forget the flight, fail everyone who waits."""
        self.give_up(load)
        self.failures[load.flight] = error
        self.flights.fail(load.flight, error)
        assert self.flights.by_key.get(load.flight.key) is not load.flight
        self.end(load)

    def give_up(self, load: Load) -> None:
        """As ``Loader._give_up``."""
        claim, worker, number = load.claim, load.worker, load.number
        if claim is None:
            return
        if worker is not None and worker.alive:
            self.decide(lambda: self.ledger.abandon(claim, Place(worker, number)))
        else:
            self.decide(lambda: self.ledger.give_back(claim))
        load.claim = load.flight.claim = None

    @precondition(lambda self: self.loads)
    @rule(pick=picks)
    def run_out_of_time(self, pick: int) -> None:
        """``load_timeout`` is over for a load, wherever it is."""
        loads = list(self.loads.values())
        self.interrupt(loads[pick % len(loads)], BudgetTimeoutError("held by leases"))

    def interrupt(self, load: Load, error: ModelCacheError) -> None:
        """Cancel the task: what it waits for is cancelled at once, it wakes up later."""
        if load.interrupted is None:
            load.interrupted = error
            load.promise.cancel()

    @precondition(lambda self: any(load.interrupted for load in self.loads.values()))
    @rule(pick=picks)
    def wake_interrupted(self, pick: int) -> None:
        """A cancelled load wakes up and cleans up."""
        interrupted = [load for load in self.loads.values() if load.interrupted]
        self.clean_up(interrupted[pick % len(interrupted)])

    def clean_up(self, load: Load) -> None:
        assert load.interrupted is not None
        self.fail(load, load.interrupted)

    # Workers

    @precondition(lambda self: any(worker.orders for worker in self.workers))
    @rule(pick=picks)
    def unloaded(self, pick: int) -> None:
        """A worker reports bytes free; reports of different unloads come in any order (L5)."""
        orders = [(worker, number) for worker in self.workers for number in worker.orders]
        self.acknowledge(*orders[pick % len(orders)])

    def acknowledge(self, worker: FakeWorker, number: int) -> None:
        worker.orders.remove(number)
        del worker.bytes[number]
        entry = worker.held.pop(number)
        self.decide(lambda: self.ledger.acknowledge(entry))
        assert entry.state is State.GONE

    @rule(pick=picks)
    def die(self, pick: int) -> None:
        """A worker dies with all it holds, and another takes its place."""
        index = pick % len(self.workers)
        worker, self.workers[index] = self.workers[index], FakeWorker()
        self.bury(worker)

    def bury(self, worker: FakeWorker) -> None:
        worker.alive = False
        entries = list(worker.held.values())
        worker.held.clear()
        worker.bytes.clear()
        worker.orders.clear()
        pinned = [entry.key for entry in self.pinned if entry in entries]
        survivors = {copy.key for copy in self.ledger.copies if copy.value.worker is not worker}
        self.pinned = [entry for entry in self.pinned if entry not in entries]
        self.decide(lambda: self.ledger.lose(entries, "worker"))
        assert survivors <= self.ledger.table.keys(), "a copy takes the place of its original"
        self.pinned += [self.ledger.table[key] for key in pinned if key in survivors]
        assert all(entry.state is State.GONE for entry in entries)

    @precondition(lambda self: any(self.has_to_notice(load) for load in self.loads.values()))
    @rule(pick=picks)
    def notice_death(self, pick: int) -> None:
        """A load wakes up to find that its worker has died."""
        lost = [load for load in self.loads.values() if self.has_to_notice(load)]
        self.notice(lost[pick % len(lost)])

    def has_to_notice(self, load: Load) -> bool:
        return load.lost and load.at is At.WORKER and load.interrupted is None

    def notice(self, load: Load) -> None:
        if load.number % 2:  # a load is tried again once
            self.give_up(load)
            self.fetch(load)
        else:
            self.fail(load, WorkerCrashedError("twice"))

    # Short cuts to where it becomes interesting

    @rule(choices=st.lists(picks, min_size=1, max_size=8), size=st.integers(5, 60))
    def go_on(self, choices: list[int], size: int) -> None:
        """Tasks that can run do so, in some order."""
        for pick in choices:
            chores = list(self.chores(size))
            if chores:
                chores[pick % len(chores)]()

    @rule(key=keys, size=st.integers(5, 60), leased=st.booleans())
    def load_undisturbed(self, key: str, size: int, leased: bool) -> None:
        """A model is called and loaded without a hitch, if there is room."""
        self.have_resident(key, size, leased=leased)

    @rule(key=keys, size=st.integers(5, 60))
    def load_as_far_as_it_goes(self, key: str, size: int) -> None:
        """A model is called, and its load begins or queues for bytes."""
        self.call(key, pins=False)
        self.advance(key, size, (At.SLOT, At.STORE))

    def have_resident(self, key: str, size: int, *, leased: bool) -> None:
        self.call(key, pins=False)
        self.advance(key, size, (At.SLOT, At.STORE, At.WORKER))
        for caller in [caller for caller in self.callers if caller.flight.key == key and caller.promise.done()]:
            self.wake(caller)
        if not leased:
            for entry in [entry for entry in self.leases if entry.key == key]:
                self.release(entry)

    def advance(self, key: str, size: int, through: tuple[At, ...]) -> None:
        for step in through:
            load = next((load for load in self.loads.values() if load.flight.key == key), None)
            if load is not None and self.is_idle_at(load, step):
                self.proceed(load, size)

    def proceed(self, load: Load, size: int) -> None:
        """Take the next step of a load that nothing disturbs."""
        if load.at is At.SLOT:
            self.fetch(load)
        elif load.at is At.STORE:
            self.claim(load, size)
        elif load.at is At.WORKER:
            assert load.claim is not None
            self.measure(load, load.claim.bytes)

    # What holds after each step

    @invariant()
    def the_books_are_right(self) -> None:
        """Rules L1, L8, F7."""
        lost = sum(entry.state is State.GONE for entry in self.handed_over())
        oracle.check_ledger(self.ledger, shrunk=self.ceiling > self.ledger.budget, lost_leases=lost)
        oracle.check_flights(self.flights)
        assert self.ledger.charged <= self.ceiling, "L1: the charged bytes grew above the budget"
        self.ceiling = max(self.ledger.budget, min(self.ceiling, self.ledger.charged))

    @invariant()
    def the_books_match_the_workers(self) -> None:
        """Rules L1, L5: every real byte is charged, but for those of a model measured larger than its claim."""
        charged = {
            load.number: load.claim.bytes
            for load in self.loads.values()
            if load.claim is not None and load.worker is not None
        }
        charged.update({number: entry.size for worker in self.workers for number, entry in worker.held.items()})
        real = {number: size for worker in self.workers for number, size in worker.bytes.items()}
        excess = {number: size - charged[number] for number, size in real.items() if size > charged[number]}
        assert excess.keys() <= self.overrun
        assert sum(real.values()) - sum(excess.values()) <= self.ceiling

    @invariant()
    def entries_are_held_once(self) -> None:
        """Rule L8: what the ledger charges is what the workers hold."""
        held = Counter(entry for worker in self.workers for entry in worker.held.values())
        assert held == Counter(chain(self.ledger.table.values(), self.ledger.copies, self.ledger.leaving))

    @invariant()
    def leases_are_handed_over_once(self) -> None:
        """Rules F4, F5: an entry has one lease for each call that owns one, no more and no less."""
        owned = Counter(self.handed_over())
        for entry in chain(self.ledger.table.values(), self.ledger.copies, self.ledger.leaving, owned):
            assert entry.leases == owned[entry]
        assert self.ledger.leases == owned.total()

    def handed_over(self) -> Iterator[Entry[Any]]:
        """Give the owner of each lease once: calls, and callers who have not woken up to theirs."""
        yield from self.leases
        for caller in self.callers:
            promise = caller.promise
            if promise.done() and not promise.cancelled() and promise.exception() is None:
                yield promise.result()
        for group in self.groups:
            yield from group.claim.leased
        for group in {caller.group for caller in self.callers if caller.group is not None}:
            yield from group.leases

    @invariant()
    def grants_are_reserved(self) -> None:
        """Rule L1: what is reserved is what loads and groups have been granted, and no more."""
        granted = [load.claim for load in self.loads.values() if load.claim is not None and load.claim.granted]
        granted += [load.flight.reserve for load in self.loads.values() if load.flight.reserve is not None]
        granted += [part for group in self.groups for part in group.claim.parts]
        assert self.ledger.reserved == sum(claim.bytes for claim in granted)

    @invariant()
    def pins_hold(self) -> None:
        """Rule L4: who is pinned stays."""
        table = self.ledger.table
        assert all(table.get(entry.key) is entry and entry.pinned for entry in self.pinned)
        assert all(entry in self.pinned for entry in table.values() if entry.pinned)

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """Rule L2: who waits, waits for a lease, a load or an unload that is under way; and flights are flown."""
        assert self.flights.airborne <= self.loads.keys()
        assert all(caller.flight in self.flights.airborne for caller in self.callers if not caller.promise.done()), (
            "a waiter was left behind"
        )
        ledger = self.ledger
        growths = [claim.grows is not None for claim in ledger.queue]
        assert growths == sorted(growths, reverse=True), "L6: who holds bytes comes first"
        head = ledger.queue[0] if ledger.queue else None
        if head is None or head.waiter.done():
            return
        wanted, idle = head.wanted(ledger.table), ledger.idle - idle_bytes(head, ledger)
        assert ledger.unloading or wanted > ledger.free + idle
        if head.grows:
            assert wanted <= ledger.free + ledger.unloading, "L6: it holds bytes and waits for a lease"
        elif wanted > ledger.free + ledger.unloading + idle:
            own = head.kept(ledger.table) if head.beside is None else []  # what it replaces may go
            kept = sum(entry.size for entry in own if not entry.pinned)
            assert wanted + kept <= ledger.room, "L3: it waits for bytes that are pinned"
            passable = [c for c in ledger.queue if c.wanted(ledger.table) <= ledger.free and not c.waiter.done()]
            assert not passable or self.passed[head] == OVERTAKINGS

    @invariant()
    def nobody_parks_in_vain(self) -> None:
        """Rule L3: who parks waits for pins to go, or for the bytes of one that has been unloaded."""
        ledger = self.ledger
        if not ledger.leaving:
            assert all(waiter.done() or ledger.room < size <= ledger.budget for waiter, size in ledger.parked.items())

    @invariant()
    def honest_policies_stay(self) -> None:
        """Rule L7: a policy is dismissed for a reason."""
        if not isinstance(self.policy, FicklePolicy) or self.policy.mode == "honest":
            assert self.ledger.policy is self.policy

    # The end

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        if self.ending == "rest":
            self.come_to_rest()
        self.close()

    def come_to_rest(self) -> None:
        """Liveness: left alone, with every lease and pin given back, everything is answered and nobody waits."""
        for _ in range(PATIENCE):
            chore = next(chain(self.chores(10), self.farewells()), None)
            if chore is None:
                break
            chore()
            self.check_invariants_now()
        assert not self.loads
        assert not self.callers
        assert not self.groups
        ledger = self.ledger
        assert not ledger.queue
        assert not ledger.parked
        assert (ledger.reserved, ledger.unloading, ledger.leases) == (0, 0, 0)
        real = sum(sum(worker.bytes.values()) for worker in self.workers)
        assert ledger.resident == ledger.idle == real <= ledger.budget

    def chores(self, size: int) -> Iterator[Callable[[], None]]:
        """Yield the next steps of those who can go on, loads of ``size`` bytes among them."""
        yield from (lambda load=load: self.clean_up(load) for load in self.loads.values() if load.interrupted)
        yield from (lambda load=load: self.resume(load) for load in self.loads.values() if load.awake)
        yield from (lambda load=load: self.notice(load) for load in self.loads.values() if self.has_to_notice(load))
        yield from (
            lambda load=load: self.proceed(load, size)
            for load in self.loads.values()
            if load.at not in (At.PARKED, At.CLAIM, At.GROWTH) and self.is_idle_at(load, load.at)
        )
        yield from (lambda caller=caller: self.wake(caller) for caller in self.callers if caller.promise.done())
        yield from (lambda group=group: self.decide_group(group) for group in self.groups if group.promise.done())
        for worker in self.workers:
            yield from (lambda w=worker, number=number: self.acknowledge(w, number) for number in worker.orders)

    def farewells(self) -> Iterator[Callable[[], None]]:
        """Yield the ends of all leases and pins."""
        yield from (lambda entry=entry: self.release(entry) for entry in self.leases)
        yield from (lambda key=key: self.end_pin(key) for key in self.pinned_keys)

    def close(self) -> None:
        """As ``ModelRegistry.close``: whatever is going on, nothing is left (F11)."""
        for load in list(self.loads.values()):
            self.interrupt(load, RegistryClosedError("closed"))
        for load in list(self.loads.values()):
            self.clean_up(load)
        for group in list(self.groups):
            self.disband(group)
        while self.callers:
            assert self.callers[0].promise.done()
            self.wake(self.callers[0])
        if self.ending != "kill":
            self.release_all()
        for key in list(self.ledger.table):
            self.decide(lambda key=key: self.ledger.detach(key, "close"))  # type: ignore[misc]
        self.empty_workers()
        self.release_all()
        ledger = self.ledger
        oracle.check_ledger(ledger)
        assert (ledger.resident, ledger.reserved, ledger.unloading, ledger.idle, ledger.leases) == (0, 0, 0, 0, 0)
        assert not (ledger.table or ledger.leaving or ledger.queue or self.flights.airborne or self.flights.by_key)
        assert not any(worker.bytes for worker in self.workers)

    def release_all(self) -> None:
        for entry in list(self.leases):
            self.release(entry)

    def empty_workers(self) -> None:
        for worker in self.workers:
            if self.ending == "kill":
                self.bury(worker)
            for number in list(worker.orders):
                self.acknowledge(worker, number)

    def check_invariants_now(self) -> None:
        self.the_books_are_right()
        self.the_books_match_the_workers()
        self.entries_are_held_once()
        self.leases_are_handed_over_once()
        self.pins_hold()
        self.grants_are_reserved()
        self.nobody_waits_in_vain()
        self.nobody_parks_in_vain()
        self.honest_policies_stay()


def was_granted(claim: Claim) -> bool:
    return claim.granted or (isinstance(claim, GroupClaim) and bool(claim.leased or claim.parts))


def granted_bytes(claim: Claim) -> int:
    return sum(part.bytes for part in claim.parts) if isinstance(claim, GroupClaim) else claim.bytes


def idle_bytes(head: Claim, ledger: Ledger) -> int:
    """Return the idle bytes that must stay for ``head``."""
    return sum(entry.size for entry in head.kept(ledger.table) if not entry.pins)


TestResidency = pytest.mark.timeout(240)(ResidencyMachine.TestCase)  # ten seconds, on a machine that has time
TestResidency.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

"""Flights, rule by rule: who joins, who leaves, who is answered, and which flight a key means."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

import oracle
from modelcache.cache.entry import Entry, State
from modelcache.cache.flight import DesertedError, Flight, Flights, Phase, RegroupError
from modelcache.cache.ledger import Ledger
from modelcache.cache.policies import LRUPolicy
from modelcache.errors import CorruptArtifactError, LoadTimeoutError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def flights() -> Iterator[Flights]:
    """All loads under way; the oracle looks at them after the test."""
    flights = Flights()
    yield flights
    oracle.check_flights(flights)


class Caller:
    """A call that waits for a key."""

    def __init__(self, flights: Flights, key: str = "a") -> None:
        self.waiter: Future[Any] = Future()
        self.flight: Flight
        self.flight, self.started_it = flights.join(key, self.waiter)


def hand_over(flights: Flights, flight: Flight, ledger: Ledger) -> Entry[str]:
    """Land ``flight`` as the loader does: one step, one lease for everyone who waits."""
    granted: Future[bool] = Future()
    claim, _ = ledger.claim(flight.key, 10, granted)
    waiters = flights.land(flight)
    entry = Entry(flight.key, "", size=10, cost=1.0)
    entry.leases = len(waiters)
    ledger.settle(claim, entry, listed=flight.listed)
    for waiter in waiters:
        waiter.set_result(entry)
    return entry


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """A ledger of 100 bytes, re-counted after the test."""
    ticks = count(1)
    ledger = Ledger(100, LRUPolicy(), clock=lambda: float(next(ticks)))
    yield ledger
    oracle.check_ledger(ledger)


# F1


def test_the_first_caller_starts_the_flight_and_the_others_join_it(flights: Flights) -> None:
    """F1: one flight per key, however many callers; other keys have their own."""
    callers = [Caller(flights) for _ in range(5)]
    other = Caller(flights, "b")
    assert [caller.started_it for caller in callers] == [True, False, False, False, False]
    assert len({caller.flight for caller in callers}) == 1
    assert (other.started_it, other.flight is callers[0].flight) == (True, False)


# F3


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("by_timeout", [True, False])
def test_a_waiter_that_leaves_disturbs_nobody(flights: Flights, first: bool, by_timeout: bool) -> None:
    """F3: neither the flight nor the others notice, even if it is the one that started the flight."""
    callers = [Caller(flights), Caller(flights)]
    leaver, stayer = callers if first else callers[::-1]
    if by_timeout:
        leaver.waiter.set_exception(LoadTimeoutError("out of time"))
    else:
        leaver.waiter.cancel()
    assert not flights.leave(leaver.flight, leaver.waiter)
    assert not stayer.waiter.done()
    assert flights.by_key["a"].live_waiters() == [stayer.waiter]


def test_a_waiter_that_has_given_up_counts_no_more(flights: Flights) -> None:
    """F3, F9: 1. a waiter times out; 2. before it wakes up, the other one leaves: nobody is left."""
    late, other = Caller(flights), Caller(flights)
    late.waiter.set_exception(LoadTimeoutError("out of time"))
    assert flights.leave(other.flight, other.waiter)


# F4, F5


def test_landing_hands_one_lease_to_each_live_waiter(flights: Flights, ledger: Ledger) -> None:
    """F4: in one step; those who were cancelled or timed out get none, and later callers find the entry."""
    callers = [Caller(flights) for _ in range(4)]
    callers[0].waiter.cancel()
    callers[1].waiter.set_exception(LoadTimeoutError("out of time"))
    entry = hand_over(flights, callers[0].flight, ledger)
    assert [caller.waiter.result(timeout=0) for caller in callers[2:]] == [entry, entry]
    assert (entry.leases, ledger.leases, ledger.table["a"]) == (2, 2, entry)
    assert not flights.by_key
    assert not flights.airborne
    assert not callers[0].flight.waiters


def test_landing_without_a_waiter_leaves_the_model_idle(flights: Flights, ledger: Ledger) -> None:
    """F4, F9: all gone while it loaded: the model is there for the next one, and may be evicted."""
    caller = Caller(flights)
    caller.flight.phase = Phase.LOADING
    caller.waiter.cancel()
    assert not flights.leave(caller.flight, caller.waiter)
    entry = hand_over(flights, caller.flight, ledger)
    assert (entry.leases, ledger.idle, ledger.table["a"]) == (0, 10, entry)


def test_a_lease_handed_to_a_cancelled_caller_is_released(flights: Flights, ledger: Ledger) -> None:
    """F5: 1. the flight lands; 2. in the same tick a waiter is cancelled; 3. it wakes up, and owns a lease by then."""
    caller, other = Caller(flights), Caller(flights)
    entry = hand_over(flights, caller.flight, ledger)
    assert not caller.waiter.cancel()
    ledger.release(caller.waiter.result(timeout=0))
    assert not flights.leave(caller.flight, caller.waiter)
    assert (entry.leases, ledger.idle, other.waiter.result(timeout=0)) == (1, 0, entry)


# F6


def test_a_failure_gives_each_waiter_an_exception_of_its_own(flights: Flights) -> None:
    """F6: all from the one attempt, which is their cause, and with its facts."""
    callers = [Caller(flights) for _ in range(3)]
    callers[0].waiter.cancel()
    original = CorruptArtifactError("not a model", model="a", retry_after=2.0)
    flights.fail(callers[0].flight, original)
    first, second = (caller.waiter.exception(timeout=0) for caller in callers[1:])
    assert isinstance(first, CorruptArtifactError)
    assert isinstance(second, CorruptArtifactError)
    assert first is not second
    assert {id(first), id(second)}.isdisjoint({id(original)})
    assert first.__cause__ is second.__cause__ is original
    assert (str(first), first.model, first.retry_after) == ("not a model", "a", 2.0)
    with pytest.raises(CancelledError):
        callers[0].waiter.result(timeout=0)


class BucketError(StoreUnavailableError):
    """As somebody's store may define it: with arguments that are not its message."""

    def __init__(self, bucket: str, *, region: str) -> None:
        super().__init__(f"{bucket} in {region} is not there")
        self.bucket = bucket


def test_any_error_of_a_store_reaches_the_waiters(flights: Flights) -> None:
    """F6: an error class with an ``__init__`` of its own is handed on as it is."""
    callers = [Caller(flights), Caller(flights)]
    original = BucketError("models", region="north")
    flights.fail(callers[0].flight, original)
    for caller in callers:
        error = caller.waiter.exception(timeout=0)
        assert isinstance(error, BucketError)
        assert (str(error), error.bucket, error.__cause__) == ("models in north is not there", "models", original)


# F7


def test_nobody_joins_a_flight_that_has_failed(flights: Flights) -> None:
    """F7: 1. a flight fails; 2. in the same tick a new caller comes: it starts afresh."""
    caller = Caller(flights)
    flights.fail(caller.flight, CorruptArtifactError("not a model"))
    late = Caller(flights)
    assert late.started_it
    assert not late.waiter.done()
    assert caller.flight not in flights.airborne


def test_nobody_joins_a_flight_that_was_dropped(flights: Flights) -> None:
    """F7, F9: 1. the last waiter leaves a queued flight; 2. a caller comes before the cancelled task has run."""
    caller = Caller(flights)
    assert flights.leave(caller.flight, caller.waiter)
    late = Caller(flights)
    assert late.started_it
    assert late.flight is not caller.flight


def test_an_old_flight_that_ends_does_not_take_a_newer_one_with_it(flights: Flights) -> None:
    """F7: removal is by identity, however the old flight ends."""
    for end in (
        lambda old: flights.land(old.flight),
        lambda old: flights.fail(old.flight, CorruptArtifactError("not a model")),
        lambda old: flights.end(old.flight),
        lambda old: flights.leave(old.flight, old.waiter),
    ):
        old = Caller(flights)
        flights.detach("a")
        new = Caller(flights)
        end(old)
        assert flights.by_key["a"] is new.flight
        assert flights.airborne == {new.flight}
        assert not new.waiter.done()
        flights.end(new.flight)


def test_a_flight_ends_once(flights: Flights) -> None:
    """F7: a cancelled task that reports its end late answers nobody a second time and drops nobody."""
    caller = Caller(flights)
    flights.fail(caller.flight, CorruptArtifactError("not a model"))
    new = Caller(flights)
    flights.fail(caller.flight, CorruptArtifactError("and again"))
    assert not flights.leave(caller.flight, caller.waiter)
    assert "not a model" in str(caller.waiter.exception(timeout=0))
    assert not new.waiter.done()


# F9


def test_a_queued_flight_is_dropped_by_its_last_waiter(flights: Flights) -> None:
    """F9: nobody is left to load for, and nothing has begun: the answer is to cancel the task."""
    callers = [Caller(flights) for _ in range(3)]
    assert [flights.leave(caller.flight, caller.waiter) for caller in callers] == [False, False, True]
    assert not flights.airborne


def test_a_load_that_has_begun_goes_on_without_waiters(flights: Flights) -> None:
    """F9: callers with little patience would otherwise never get the model; a later one joins."""
    caller = Caller(flights)
    caller.flight.phase = Phase.LOADING
    assert not flights.leave(caller.flight, caller.waiter)
    late = Caller(flights)
    assert (late.started_it, late.flight) == (False, caller.flight)


def test_a_flight_that_queues_again_can_be_dropped_again(flights: Flights) -> None:
    """F9: after the store has answered, it waits for bytes: without waiters that is in vain."""
    caller = Caller(flights)
    caller.flight.phase = Phase.LOADING
    caller.flight.phase = Phase.QUEUED
    assert flights.leave(caller.flight, caller.waiter)


def test_a_detached_flight_that_is_queued_is_dropped_too(flights: Flights) -> None:
    """F9, F10: its last waiter was the last who could want it."""
    caller = Caller(flights)
    flights.detach("a")
    assert flights.leave(caller.flight, caller.waiter)
    assert not flights.airborne


# F10


def test_a_model_unloaded_while_it_loads_is_for_its_waiters_only(flights: Flights, ledger: Ledger) -> None:
    """F10: they get what they asked for, a later caller starts a new flight, and the old never enters the table."""
    early = Caller(flights)
    assert flights.detach("a") is early.flight
    late = Caller(flights)
    assert late.started_it
    new = hand_over(flights, late.flight, ledger)
    old = hand_over(flights, early.flight, ledger)
    assert ledger.table["a"] is new
    assert (early.waiter.result(timeout=0), old.state) == (old, State.DETACHED)
    assert ledger.release(old) == [old]


def test_detaching_what_does_not_fly_is_harmless(flights: Flights) -> None:
    """F10: there is nothing to detach, once or twice."""
    Caller(flights)
    flights.detach("a")
    assert flights.detach("a") is None
    assert flights.detach("b") is None


def test_a_flight_describes_itself(flights: Flights) -> None:
    """Its repr shows what a debugger wants to know, and its phase what a timeout message says."""
    caller = Caller(flights)
    assert repr(caller.flight) == "<Flight a queued, 1 waiting>"
    assert caller.flight.phase.value == "waiting for a load slot"


# Groups, and flights that find out a size


def test_a_flight_that_starves_sends_groups_away(flights: Flights) -> None:
    """L3: a group holds other models; callers that hold nothing wait on."""
    caller, member = Caller(flights), Caller(flights)
    flight = caller.flight
    flight.group_waiters.add(member.waiter)
    flight.needed = 70
    flights.wait(flight, Phase.STARVED)
    error = member.waiter.exception(timeout=0)
    assert isinstance(error, RegroupError)
    assert (error.key, error.needed) == ("a", 70)
    assert not caller.waiter.done()
    assert flight.phase is Phase.STARVED
    assert flights.leave(flight, caller.waiter), "it is dropped with its last caller"


def test_a_flight_that_starves_with_nobody_left_has_ended(flights: Flights) -> None:
    """F7, F9: in that very step, so that nobody joins it."""
    member = Caller(flights)
    member.flight.group_waiters.add(member.waiter)
    with pytest.raises(DesertedError):
        flights.wait(member.flight, Phase.QUEUED)
    assert not flights.airborne
    assert not flights.by_key
    assert isinstance(member.waiter.exception(timeout=0), RegroupError)


def test_a_group_member_that_has_its_answer_is_left_alone(flights: Flights) -> None:
    """L3: one that was cancelled, for example."""
    caller, member = Caller(flights), Caller(flights)
    member.flight.group_waiters.add(member.waiter)
    member.waiter.cancel()
    flights.wait(caller.flight, Phase.STARVED)
    assert member.waiter.cancelled()


def test_a_scout_is_joined_by_nobody(flights: Flights) -> None:
    """F1: it loads nothing, so callers of its key start a flight; it reports to the one who sent it."""
    waiter: Future[Any] = Future()
    scout = flights.scout("a", waiter)
    assert Caller(flights).flight is not scout
    flights.report(scout, "finding")
    assert waiter.result(timeout=0) == "finding"
    assert scout not in flights.airborne
    assert "a" in flights.by_key


def test_a_scout_comes_home_when_nobody_waits(flights: Flights) -> None:
    """F9: unlike a load that has begun, what it does is of no use to later callers."""
    waiter: Future[Any] = Future()
    scout = flights.scout("a", waiter)
    scout.phase = Phase.LOADING
    assert flights.leave(scout, waiter)
    assert not flights.airborne

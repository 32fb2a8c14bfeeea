"""Flights: one load per key, however many callers ask for it.

A caller that misses joins the flight of that key, or starts it. Each caller waits for a future of its own, so that one
that is cancelled or runs out of time, the first included, disturbs nobody else. The idea is that of Go's
``singleflight``; what it lacks and asyncio needs are the private futures and the drop of a flight nobody waits for.

Interleavings that the code below is shaped by:

1. A flight fails, and in the same tick a new caller looks the key up. It must start afresh: a flight leaves the map in
   the step that fails it, and only if the map still holds that very flight.
2. The last waiter leaves a flight that is still queued, and a new caller arrives before the cancelled task has run.
   The flight has left the map in the step that asked for its cancellation, so that nobody joins a dying one.
3. A waiter is cancelled after the flight landed and before it woke up. It owns a lease by then, and releases it.
4. A model is unloaded while it loads. The flight leaves the map: those who wait get the model they asked for, later
   callers start a new flight, and when the old one lands it does not enter the table.
5. A resident model is renewed, and evicted before the new version has landed. The renewing flight is in the map all the
   while: callers find the table first, and join the flight when there is nothing in the table any more. If only the
   registry itself had asked for the renewal, the flight ends with the old version: nobody wants the new one.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelcache.cache.claims import Claim, Waiter
    from modelcache.cache.entry import Entry
    from modelcache.errors import ModelCacheError


class Phase(Enum):
    """What a flight is doing; the message of a timeout names it."""

    QUEUED = "waiting for a load slot"
    STARVED = "waiting for bytes"
    LOADING = "loading"


class RegroupError(Exception):
    """A load that a group waits for has to queue for bytes: the group must hold nothing meanwhile.

    ``key`` takes ``needed`` bytes, as far as is known by now.
    """

    def __init__(self, key: str, needed: int) -> None:
        super().__init__(key, needed)
        self.key = key
        self.needed = needed


class DesertedError(Exception):
    """Nobody waits any more for a load that has not begun, or would have to queue again: it has ended."""


class Flight:
    """A load under way and those who wait for it."""

    __slots__ = (
        "call",
        "claim",
        "copies",
        "fresh",
        "group_waiters",
        "key",
        "listed",
        "needed",
        "phase",
        "renews",
        "reserve",
        "scouts",
        "task",
        "waiters",
        "wanted",
    )

    def __init__(self, key: str, *, scouts: bool = False) -> None:
        self.key = key
        self.scouts = scouts
        """True if it is to find out what the model takes, and not to load it."""
        self.phase = Phase.QUEUED
        self.listed = not scouts
        """False once the model was unloaded: what lands is for the present waiters only."""
        self.fresh = False
        """True if the store has to be asked, whatever copies there are."""
        self.renews: Entry[Any] | None = None
        """The version that it replaces if the store has another."""
        self.copies: Entry[Any] | None = None
        """The entry that it brings into a further worker; nobody waits for that."""
        self.call: Any = None
        """A call that is answered as it lands: its row travels with the artifact."""
        self.wanted = False
        """True once anybody has joined who wants the model, and not only a newer version of it while it is resident."""
        self.needed = 0
        """Bytes it has claimed, or waits for."""
        self.claim: Claim | None = None
        """Its claim to them, queued or granted."""
        self.reserve: Claim | None = None
        """Bytes granted to a group that waits for it: for the claim it has yet to make."""
        self.waiters: set[Waiter] = set()
        self.group_waiters: set[Waiter] = set()
        """Those of them that hold other models meanwhile."""
        self.task: Any = None
        """The task that flies it; kept here, since an event loop holds tasks weakly."""

    @property
    def has_asked(self) -> bool:
        """True once the store has been asked: what changes there from now on is not noticed any more."""
        return self.phase is not Phase.QUEUED

    def live_waiters(self) -> list[Waiter]:
        """Return those who still wait."""
        return [waiter for waiter in self.waiters if not waiter.done()]

    def __repr__(self) -> str:
        return f"<Flight {self.key} {self.phase.name.lower()}, {len(self.waiters)} waiting>"


class Flights:
    """All loads under way. Each method is one synchronous step."""

    def __init__(self) -> None:
        self.by_key: dict[str, Flight] = {}
        """Flights that a caller can join."""
        self.airborne: set[Flight] = set()
        """These, and those that have left the map and not yet ended."""

    def join(self, key: str, waiter: Waiter) -> tuple[Flight, bool]:
        """Wait for ``key`` with ``waiter``; True says that the flight is new and has to be started."""
        flight = self.by_key.get(key)
        is_new = flight is None
        if flight is None:
            flight = self.by_key[key] = Flight(key)
            self.airborne.add(flight)
        flight.waiters.add(waiter)
        return flight, is_new

    def scout(self, key: str, waiter: Waiter) -> Flight:
        """Make a flight that nobody else joins: it finds out what ``key`` takes, and tells ``waiter``."""
        flight = Flight(key, scouts=True)
        flight.waiters.add(waiter)
        self.airborne.add(flight)
        return flight

    def copy(self, original: Entry[Any]) -> Flight:
        """Make a flight that nobody joins or waits for, and which brings ``original`` into a further worker."""
        flight = Flight(original.key)
        flight.copies, flight.listed = original, False
        self.airborne.add(flight)
        return flight

    def leave(self, flight: Flight, waiter: Waiter) -> bool:
        """Stop waiting; True says that nobody is left for a load that has not begun, and its task is to be cancelled.

        A load that has begun goes on: its model stays, so that callers with little patience get it in the end.
        """
        flight.waiters.discard(waiter)
        has_begun = flight.phase is Phase.LOADING and not flight.scouts
        if flight.live_waiters() or has_begun or flight not in self.airborne:
            return False
        self.end(flight)
        return True

    def land(self, flight: Flight) -> list[Waiter]:
        """End a flight that succeeded and return those who still wait, each to be given its lease."""
        waiters = flight.live_waiters()
        self.end(flight)
        return waiters

    def report(self, flight: Flight, finding: Any) -> None:
        """End a flight that scouted, and tell who waits what it found."""
        for waiter in self.land(flight):
            waiter.set_result(finding)

    def fail(self, flight: Flight, error: ModelCacheError) -> None:
        """End a flight that failed; each waiter gets an exception of its own, caused by this one attempt's."""
        for waiter in self.land(flight):
            waiter.set_exception(error.fresh())

    def wait(self, flight: Flight, phase: Phase) -> None:
        """A flight has to queue, for a slot or for bytes; it ends, with DesertedError, if nobody waits for it.

        Groups are sent away: they hold other models, and must not do so while this one queues.
        """
        flight.phase = phase
        for waiter in flight.group_waiters:
            if not waiter.done():
                waiter.set_exception(RegroupError(flight.key, flight.needed))
        flight.group_waiters.clear()
        if not flight.live_waiters():
            self.end(flight)
            raise DesertedError

    def detach(self, key: str) -> Flight | None:
        """Let nobody join the flight of ``key`` any more, and keep what it loads out of the table."""
        flight = self.by_key.pop(key, None)
        if flight is not None:
            flight.listed = False
        return flight

    def drop(self, flight: Flight) -> None:
        """End a flight that nobody wants any more, whatever it is doing; its task is to be cancelled.

        What a store delivers all the same, since it takes no notice of that, stays out of the table.
        """
        flight.listed = False
        self.end(flight)

    def end(self, flight: Flight) -> None:
        """Forget a flight, by identity: the map may hold a newer one of the same key."""
        if self.by_key.get(flight.key) is flight:
            del self.by_key[flight.key]
        self.airborne.discard(flight)
        flight.waiters = set()
        flight.group_waiters = set()

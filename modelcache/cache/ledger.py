"""The byte ledger: the only place that grants bytes, and the only one that evicts.

Every byte of the budget is in one of four states: free, reserved (granted to a load that runs), resident (a loaded
model, measured), or unloading (evicted, and the worker has not said yet that it is gone). After every step

    resident + reserved + unloading <= budget

Each method is one synchronous step. Methods that can evict return the entries that the caller has to unload now; the
caller says :meth:`Ledger.acknowledge` when a worker has confirmed that the bytes are free. Grants are announced by
setting the result of the future that came with the claim.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

from modelcache.cache.claims import Claim, GroupClaim
from modelcache.cache.entry import Entry, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from modelcache.cache.claims import Table, Waiter
    from modelcache.cache.policies import EvictionPolicy
    from modelcache.records import EvictionCause

logger = logging.getLogger("modelcache")

_MOST_OVERTAKINGS = 16
"""How often a claim that waits for leases may be passed by smaller ones that need no eviction."""

_READY = State.READY
"""Looked up once: to find a member in its Enum takes as long as all else that a lease does."""

Retired = list[Entry[Any]]
"""Entries to be unloaded by the caller."""


class Ledger:
    """A byte budget, the table of models under it, and the queue of loads that wait for bytes.

    ``policy`` ranks what may be evicted. ``clock`` gives seconds; it dates uses, for the fallback to LRU when a
    policy fails.
    """

    def __init__(self, budget: int, policy: EvictionPolicy, *, clock: Callable[[], float]) -> None:
        self.budget = budget
        self.resident = self.reserved = self.unloading = 0
        self.idle = 0
        """Bytes of copies, and of entries in the table, that have no lease and no pin: what could be evicted."""
        self.pinned = 0
        """Bytes of entries in the table that are pinned."""
        self.leases = 0
        self.table: Table = OrderedDict()
        """Least recently used first."""
        self.leaving: set[Entry[Any]] = set()
        """Entries out of the table whose bytes are not free yet."""
        self.copies: dict[Entry[Any], None] = {}
        """Copies of entries in the table: the first to be evicted, oldest first."""
        self.queue: deque[Claim] = deque()
        self.parked: dict[Waiter, int] = {}
        """Who waits for that much room beside what is pinned."""
        self.policy: EvictionPolicy | None = policy
        self._clock = clock

    @property
    def charged(self) -> int:
        """Bytes that are spoken for."""
        return self.resident + self.reserved + self.unloading

    @property
    def free(self) -> int:
        """Bytes to grant; negative for a while after the budget was made smaller."""
        return self.budget - self.resident - self.reserved - self.unloading

    @property
    def room(self) -> int:
        """Bytes that are not pinned: what a claim can get at most, when all leases have ended."""
        return self.budget - self.pinned

    def holders(self) -> tuple[str, ...]:
        """Return the names of those that leases and pins keep, sorted."""
        return tuple(sorted({entry.key for entry in [*self.table.values(), *self.leaving] if entry.pins}))

    # Claims: bytes for a load

    def claim(self, key: str, size: int, waiter: Waiter, beside: Entry[Any] | None = None) -> tuple[Claim, Retired]:
        """Queue for ``size`` bytes, first come, first served; ``waiter`` gets True when they are granted.

        It gets False if ``size`` is beyond the room that pins leave, now or by the time it is its turn. ``beside``: the
        version of ``key`` that they are to replace.
        """
        claim = Claim(key, size, waiter, beside=beside)
        self.queue.append(claim)
        return claim, self._pump()

    def claim_together(self, needs: Mapping[str, int], waiter: Waiter) -> tuple[GroupClaim, Retired]:
        """Queue for leases on those of ``needs`` that are resident, and the bytes given there for each of the others.

        ``waiter`` gets True when all are granted, or False, as for :meth:`claim`.
        """
        claim = GroupClaim(needs, waiter)
        self.queue.append(claim)
        return claim, self._pump()

    def wait_for_room(self, size: int, waiter: Waiter) -> None:
        """Give ``waiter`` True when there is room for ``size`` bytes, or the budget is smaller: now or later."""
        self.parked[waiter] = size
        self._wake_parked()

    def refuse(self, claim: Claim) -> Retired:
        """Let a claim that is still queued go unsatisfied: its waiter gets False."""
        if claim.queued:
            self._refuse(claim)
        return self._pump()

    def grow(self, claim: Claim, size: int, waiter: Waiter) -> Retired:
        """Enlarge a granted ``claim`` to ``size`` bytes; ``waiter`` gets True, or False if that must not be awaited.

        It holds bytes while it waits, so it may wait only for unloads under way, never for a lease to end: two
        growing claims could otherwise wait for each other for ever.
        """
        growth = Claim(claim.key, size - claim.bytes, waiter, grows=claim, beside=claim.beside)
        self.queue.appendleft(growth)
        return self._pump()

    def give_back(self, claim: Claim) -> Retired:
        """End a claim that will not be settled, queued or granted; harmless when it has ended."""
        self._refuse_growth(claim)
        if claim.granted:
            self.reserved -= claim.bytes
        elif claim.queued:
            self.queue.remove(claim)
        claim.state = "ended"
        return self._pump()

    def abandon(self, claim: Claim, value: Any) -> Retired:
        """Turn a granted claim into an entry to be unloaded: its load was given up, and may have taken the bytes."""
        self._refuse_growth(claim)
        entry = Entry(claim.key, value, size=claim.bytes, cost=0.0)
        self.reserved -= claim.bytes
        self.unloading += claim.bytes
        claim.state = "ended"
        entry.state = State.UNLOADING
        self.leaving.add(entry)
        return [entry]

    def settle(self, claim: Claim, entry: Entry[Any], *, listed: bool = True) -> Retired:
        """Turn a granted claim into a resident entry of ``entry.size <= claim.bytes`` measured bytes.

        The leases of those who wait for it are on the entry already: it may be evicted from here on. With ``listed``
        it replaces the one of the same key in the table; without, it is resident only for those leases.
        """
        self.reserved -= claim.bytes
        self.resident += entry.size
        self.leases += entry.leases
        claim.state = "ended"
        entry.last_used = self._clock()
        if not listed:
            return self._remove(entry, "unload") + self._pump()
        old = self.table.get(entry.key)
        replaced = [] if old is None else self._remove(old, "replaced")
        self.table[entry.key] = entry
        self.idle += 0 if entry.pins else entry.size
        self.pinned += entry.size if entry.pinned else 0
        self._tell("insert", entry)
        return replaced + self._pump()

    def settle_copy(self, claim: Claim, copy: Entry[Any], original: Entry[Any]) -> Retired:
        """Turn a granted claim into a copy of ``original``, which is in the table.

        It leaves with its original, or before: policies rank what can be asked for, and need not hear of it.
        """
        self.reserved -= claim.bytes
        self.resident += copy.size
        self.idle += copy.size
        claim.state = "ended"
        copy.original = original
        original.copies += (copy,)
        self.copies[copy] = None
        return self._pump()

    # Leases and pins

    def lease(self, entry: Entry[Any]) -> None:
        """Keep ``entry`` from being evicted until :meth:`release`."""
        if not entry.leases and not entry.pinned and entry.state is _READY:
            self.idle -= entry.size
        entry.leases += 1
        self.leases += 1

    def hit(self, entry: Entry[Any]) -> None:
        """Count a use of a resident entry and tell the policy."""
        entry.hits += 1
        entry.last_used = self._clock()
        if entry.state is _READY:
            self.table.move_to_end(entry.key)
            if self.policy is not None:
                try:
                    self.policy.hit(entry)
                except Exception as error:  # noqa: BLE001 - it is anybody's code
                    self._dismiss_policy("hit", error)

    def release(self, entry: Entry[Any]) -> Retired:
        """End a lease; the last one retires a detached entry."""
        self._end_lease(entry)
        if entry.leases or entry.pinned:
            return []
        if entry.state is _READY:
            return self._pump() if self.queue or self.free < 0 else []
        if entry.state is State.DETACHED:
            self._start_unloading(entry)
            return [entry, *self._pump()]
        return []

    def pin(self, entry: Entry[Any]) -> Retired:
        """Never evict ``entry`` until :meth:`unpin`; harmless when done twice, or when it has left the table."""
        if entry.state is not State.READY or entry.pinned:
            return []  # outside of the table a pin would last for ever: nobody finds the entry to unpin it
        self._pin(entry)
        return self._pump()

    def unpin(self, entry: Entry[Any]) -> Retired:
        """Let ``entry`` be evicted again; harmless when it is not pinned."""
        if not entry.pinned:
            return []
        entry.pinned = False
        self.pinned -= entry.size
        if not entry.leases:
            self.idle += entry.size
        return self._pump()

    # What a resident model takes

    def enlarge(self, entry: Entry[Any], growth: int) -> bool:
        """Charge ``growth`` bytes more for a model, or a copy of one, if they are free and nobody waits for any."""
        if self.queue or growth > self.free:
            return False
        self._reweigh(entry, growth)
        return True

    def shrink(self, entry: Entry[Any], excess: int) -> Retired:
        """Charge ``excess`` bytes less for an entry, wherever it is on its way out."""
        if entry.state is State.UNLOADING:
            self.unloading -= excess
            entry.size -= excess
        else:
            self._reweigh(entry, -excess)
        return self._pump()

    # Leaving

    def detach(self, key: str, cause: EvictionCause) -> Retired:
        """Take a key out of the table: unloaded now, or when its last lease ends."""
        entry = self.table.get(key)
        return [] if entry is None else self._remove(entry, cause) + self._pump()

    def acknowledge(self, entry: Entry[Any]) -> Retired:
        """The worker has freed a retired entry."""
        if entry.state is not State.UNLOADING:
            return []
        self.unloading -= entry.size
        self._forget(entry)
        return self._pump()

    def lose(self, entries: Iterable[Entry[Any]], cause: EvictionCause) -> Retired:
        """The process that held ``entries`` has ended, and their bytes with it.

        A copy in another process takes the place of its original, which is the copy from then on.
        """
        # Copies first: those that are left by then can take the place of their original.
        for entry in sorted(entries, key=lambda entry: entry.original is None):
            if entry.state is State.GONE:
                continue
            if entry.state is State.READY:
                pinned = entry.pinned
                self._unlist(entry, cause)
                if entry.copies:
                    self._replace_by_copy(entry, pinned=pinned)
            if entry.state is State.UNLOADING:
                self.unloading -= entry.size
            else:
                self.resident -= entry.size
            self._forget(entry)
        return self._pump()

    def resize(self, budget: int) -> Retired:
        """Change the budget; what is over the new one is evicted now, or when the leases on it end."""
        self.budget = budget
        return self._pump()

    # Steps inside a step

    def _pump(self) -> Retired:
        """Grant what fits, in order; evict for the first claim that does not, but never in vain."""
        if self.parked:
            self._wake_parked()
        retired = self._shed()
        while self.queue:
            head = self.queue[0]
            wanted, kept = head.wanted(self.table), self._kept(head)
            if head.waiter.done():  # its load has gone
                self._refuse(head)
            elif wanted <= self.free:
                self.queue.popleft()
                self._grant(head)
            elif wanted > self.free + self.unloading + self.idle - _idle(kept):
                if not head.grows and self._may_come_to_fit(head, kept):
                    self._let_smaller_pass(head)
                    break
                self._refuse(head)
            else:
                retired += self._evict(wanted - self.free - self.unloading, head, kept)
                break  # until the workers acknowledge
        return retired

    def _wake_parked(self) -> None:
        for waiter, size in tuple(self.parked.items()):
            if waiter.done() or size <= self.room or size > self.budget:
                del self.parked[waiter]
                if not waiter.done():
                    waiter.set_result(True)

    def _kept(self, head: Claim) -> list[Entry[Any]]:
        """Return what must not be evicted for ``head``; the version that it replaces only if others are enough."""
        kept = head.kept(self.table)
        enough = head.wanted(self.table) <= self.free + self.unloading + self.idle - _idle(kept)
        return kept if enough or head.beside is None else []

    def _may_come_to_fit(self, head: Claim, kept: list[Entry[Any]]) -> bool:
        """Say whether the end of leases can make room; it cannot take the place of pins, nor of the head's own."""
        own = sum(entry.size for entry in kept if not entry.pinned)
        return head.wanted(self.table) + own <= self.room

    def _shed(self) -> Retired:
        """Evict what a smaller budget has no room for, as far as leases and pins let it."""
        return self._evict(min(self.resident + self.reserved - self.budget, self.idle), None, [])

    def _evict(self, wanted: int, head: Claim | None, kept: list[Entry[Any]]) -> Retired:
        """Retire idle entries of ``wanted`` bytes together, but none of those that are ``kept`` for ``head``."""
        retired: Retired = []
        for entry in kept:
            self.lease(entry)
        while wanted > 0:
            victim = self._victim()
            victim.displaced_by = head.key if head is not None else None
            wanted -= victim.size
            retired += self._remove(victim, "budget")
        for entry in kept:
            self._end_lease(entry)
        return retired

    def _let_smaller_pass(self, head: Claim) -> None:
        """Grant later claims that fit as it is: bytes must not lie idle behind a claim that waits for a lease."""
        for claim in [later for later in self.queue if later.wanted(self.table) <= self.free]:
            if head.overtaken >= _MOST_OVERTAKINGS:
                return
            if claim.wanted(self.table) <= self.free and not claim.waiter.done():
                head.overtaken += 1
                self.queue.remove(claim)
                self._grant(claim)

    def _grant(self, claim: Claim) -> None:
        self.reserved += claim.wanted(self.table)
        claim.state = "ended"
        if isinstance(claim, GroupClaim):
            self._share_out(claim)
        elif claim.grows:
            claim.grows.bytes += claim.bytes
        else:
            claim.state = "granted"
        claim.waiter.set_result(True)

    def _share_out(self, group: GroupClaim) -> None:
        group.leased = group.kept(self.table)
        for entry in group.leased:
            self.lease(entry)
        for key, size in group.needs.items():
            if key not in self.table:
                part = Claim(key, size, group.waiter)
                part.state = "granted"
                group.parts.append(part)

    def _refuse(self, claim: Claim) -> None:
        self.queue.remove(claim)
        claim.state = "ended"
        if not claim.waiter.done():
            claim.waiter.set_result(False)

    def _refuse_growth(self, claim: Claim) -> None:
        for growth in [waiting for waiting in self.queue if waiting.grows is claim]:
            self._refuse(growth)

    def _pin(self, entry: Entry[Any]) -> None:
        if not entry.leases:
            self.idle -= entry.size
        entry.pinned = True
        self.pinned += entry.size

    def _end_lease(self, entry: Entry[Any]) -> None:
        entry.leases -= 1
        self.leases -= 1
        if not entry.leases and not entry.pinned and entry.state is _READY:
            self.idle += entry.size

    def _remove(self, entry: Entry[Any], cause: EvictionCause) -> Retired:
        retired = [gone for copy in entry.copies for gone in self._remove(copy, cause)]
        self._unlist(entry, cause)
        self.leaving.add(entry)
        entry.state = State.DETACHED
        if entry.leases:
            return retired
        self._start_unloading(entry)
        return [*retired, entry]

    def _unlist(self, entry: Entry[Any], cause: EvictionCause) -> None:
        entry.cause = cause
        if entry.original is not None:
            del self.copies[entry]
            entry.original.copies = tuple(copy for copy in entry.original.copies if copy is not entry)
            self.idle -= 0 if entry.pins else entry.size
        elif self.table.get(entry.key) is entry:
            del self.table[entry.key]
            self.idle -= 0 if entry.pins else entry.size
            self.pinned -= entry.size if entry.pinned else 0
            entry.pinned = False
            self._tell("remove", entry)

    def _replace_by_copy(self, entry: Entry[Any], *, pinned: bool) -> None:
        heir, *others = entry.copies
        del self.copies[heir]
        heir.original, heir.copies = None, tuple(others)
        heir.hits, heir.past_hits, heir.last_used = entry.hits, entry.past_hits, entry.last_used
        for copy in (entry, *others):
            copy.original = heir
        entry.copies = ()
        self.table[heir.key] = heir
        self._tell("insert", heir)
        if pinned:
            self._pin(heir)

    def _start_unloading(self, entry: Entry[Any]) -> None:
        entry.state = State.UNLOADING
        self.resident -= entry.size
        self.unloading += entry.size

    def _forget(self, entry: Entry[Any]) -> None:
        entry.state = State.GONE
        self.leaving.discard(entry)

    def _reweigh(self, entry: Entry[Any], growth: int) -> None:
        """Change the size of a resident entry; the policy ranks by it, and so takes the entry in again."""
        ranked = entry.state is State.READY and entry.original is None
        if ranked:
            self._tell("remove", entry)
        entry.size += growth
        self.resident += growth
        if entry.state is State.READY:
            self.idle += 0 if entry.pins else growth
            self.pinned += growth if entry.pinned else 0
        if ranked:
            self._tell("insert", entry)

    # The policy: it ranks, and is not trusted with more

    def _tell(self, what: str, entry: Entry[Any]) -> None:
        if self.policy is None:
            return
        try:
            getattr(self.policy, what)(entry)
        except Exception as error:  # noqa: BLE001 - it is anybody's code
            self._dismiss_policy(what, error)

    def _victim(self) -> Entry[Any]:
        """Take a copy, or else ask the policy, and check its answer; called only when there is an idle entry."""
        spare = next((copy for copy in self.copies if not copy.pins), None)
        if spare is not None:
            return spare
        if self.policy is not None:
            try:
                victim = self.policy.evict()
            except Exception as error:  # noqa: BLE001 - it is anybody's code
                self._dismiss_policy("evict", error)
            else:
                if isinstance(victim, Entry) and self.table.get(victim.key) is victim and not victim.pins:
                    return victim
                self._dismiss_policy(f"evict (it chose {victim!r})", None)
        return next(entry for entry in self.table.values() if not entry.pins)

    def _dismiss_policy(self, where: str, error: Exception | None) -> None:
        logger.warning(
            "eviction policy %r failed in %s; least-recently-used order replaces it",
            self.policy,
            where,
            exc_info=error,
        )
        self.policy = None


def _idle(entries: list[Entry[Any]]) -> int:
    return sum(entry.size for entry in entries if not entry.pins)

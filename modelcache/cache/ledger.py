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
from typing import TYPE_CHECKING, Any, Protocol

from modelcache.cache.entry import Entry, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from modelcache.cache.policies import EvictionPolicy
    from modelcache.records import EvictionCause

logger = logging.getLogger("modelcache")

_MOST_OVERTAKINGS = 16
"""How often a claim that waits for leases may be passed by smaller ones that need no eviction."""


class Waiter(Protocol):
    """The part of a future that the cache uses; it never awaits one."""

    def done(self) -> bool:
        """Return True once it has a result, an error, or was cancelled."""
        ...

    def set_result(self, result: Any, /) -> None:
        """Resolve it."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """Fail it."""
        ...


class Claim:
    """Bytes that a load asks for: queued first, then granted, and in the end settled or given back."""

    __slots__ = ("bytes", "grows", "key", "overtaken", "state", "waiter")

    def __init__(self, key: str, size: int, waiter: Waiter, grows: Claim | None = None) -> None:
        self.key = key
        self.bytes = size
        self.waiter = waiter
        self.grows = grows
        """The granted claim that this one is to enlarge."""
        self.state = "queued"
        self.overtaken = 0

    @property
    def granted(self) -> bool:
        """True between the grant and the settlement."""
        return self.state == "granted"

    def __repr__(self) -> str:
        return f"<Claim {self.key} {self.bytes} B {self.state}>"


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
        """Bytes of entries in the table that have no lease and no pin: what could be evicted."""
        self.leases = 0
        self.table: OrderedDict[str, Entry[Any]] = OrderedDict()
        """Least recently used first."""
        self.leaving: set[Entry[Any]] = set()
        """Entries out of the table whose bytes are not free yet."""
        self.queue: deque[Claim] = deque()
        self.policy: EvictionPolicy | None = policy
        self._clock = clock

    @property
    def charged(self) -> int:
        """Bytes that are spoken for."""
        return self.resident + self.reserved + self.unloading

    @property
    def free(self) -> int:
        """Bytes to grant; negative for a while after the budget was made smaller."""
        return self.budget - self.charged

    # Claims: bytes for a load

    def claim(self, key: str, size: int, waiter: Waiter) -> tuple[Claim, Retired]:
        """Queue for ``size`` bytes, first come, first served; ``waiter`` gets True when they are granted.

        The caller has checked that ``size`` is not beyond the whole budget; ``waiter`` gets False if a smaller budget
        puts it there.
        """
        claim = Claim(key, size, waiter)
        self.queue.append(claim)
        return claim, self._pump()

    def grow(self, claim: Claim, size: int, waiter: Waiter) -> Retired:
        """Enlarge a granted ``claim`` to ``size`` bytes; ``waiter`` gets True, or False if that must not be awaited.

        It holds bytes while it waits, so it may wait only for unloads under way, never for a lease to end: two
        growing claims could otherwise wait for each other for ever.
        """
        growth = Claim(claim.key, size - claim.bytes, waiter, grows=claim)
        self.queue.appendleft(growth)
        return self._pump()

    def give_back(self, claim: Claim) -> Retired:
        """End a claim that will not be settled, queued or granted; harmless when it has ended."""
        for growth in [waiting for waiting in self.queue if waiting.grows is claim]:
            self._refuse(growth)
        if claim.granted:
            self.reserved -= claim.bytes
        elif claim in self.queue:
            self.queue.remove(claim)
        claim.state = "ended"
        return self._pump()

    def abandon(self, claim: Claim, value: Any) -> Retired:
        """Turn a granted claim into an entry to be unloaded: its load was given up, and may have taken the bytes."""
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
        replaced = self.detach(entry.key, "replaced")
        self.table[entry.key] = entry
        self.idle += 0 if entry.pins else entry.size
        self._tell("insert", entry)
        return replaced + self._pump()

    # Leases and pins

    def lease(self, entry: Entry[Any]) -> None:
        """Keep ``entry`` from being evicted until :meth:`release`."""
        if not entry.leases and not entry.pinned and entry.state is State.READY:
            self.idle -= entry.size
        entry.leases += 1
        self.leases += 1

    def hit(self, entry: Entry[Any]) -> None:
        """Count a use of a resident entry and tell the policy."""
        entry.hits += 1
        entry.last_used = self._clock()
        if entry.state is State.READY:
            self.table.move_to_end(entry.key)
            if self.policy is not None:
                try:
                    self.policy.hit(entry)
                except Exception as error:  # noqa: BLE001 - it is anybody's code
                    self._dismiss_policy("hit", error)

    def release(self, entry: Entry[Any]) -> Retired:
        """End a lease; the last one retires a detached entry."""
        entry.leases -= 1
        self.leases -= 1
        if entry.pins:
            return []
        if entry.state is State.READY:
            self.idle += entry.size
            return self._pump() if self.queue or self.free < 0 else []
        if entry.state is State.DETACHED:
            self._start_unloading(entry)
            return [entry, *self._pump()]
        return []

    def pin(self, entry: Entry[Any]) -> None:
        """Never evict ``entry`` until :meth:`unpin`; harmless when done twice, or when it has left the table."""
        if entry.state is not State.READY:
            return  # a pin would keep it for ever: nobody finds it any more to unpin it
        if not entry.pins:
            self.idle -= entry.size
        entry.pinned = True

    def unpin(self, entry: Entry[Any]) -> Retired:
        """Let ``entry`` be evicted again; harmless when it is not pinned."""
        if not entry.pinned:
            return []
        entry.pinned = False
        if not entry.leases and entry.state is State.READY:
            self.idle += entry.size
        return self._pump()

    # Leaving

    def detach(self, key: str, cause: EvictionCause) -> Retired:
        """Take a key out of the table: unloaded now, or when its last lease ends."""
        entry = self.table.get(key)
        return [] if entry is None else self._remove(entry, cause)

    def acknowledge(self, entry: Entry[Any]) -> Retired:
        """The worker has freed a retired entry."""
        if entry.state is not State.UNLOADING:
            return []
        self.unloading -= entry.size
        self._forget(entry)
        return self._pump()

    def lose(self, entries: Iterable[Entry[Any]], cause: EvictionCause) -> Retired:
        """The process that held ``entries`` has ended, and their bytes with it."""
        for entry in entries:
            if entry.state is State.GONE:
                continue
            if entry.state is State.READY:
                self._unlist(entry, cause)
            if entry.state is State.UNLOADING:
                self.unloading -= entry.size
            else:
                self.resident -= entry.size
            self._forget(entry)
        return self._pump()

    def resize(self, budget: int) -> Retired:
        """Change the budget; what is over the new one is evicted now, or when the leases on it end."""
        self.budget = budget
        for claim in [waiting for waiting in self.queue if waiting.bytes > budget]:
            self._refuse(claim)
        return self._pump()

    # Steps inside a step

    def _pump(self) -> Retired:
        """Grant what fits, in order; evict for the first claim that does not, but never in vain."""
        retired = self._shed()
        while self.queue:
            head = self.queue[0]
            if head.waiter.done():  # its load has gone
                self.queue.popleft()
            elif head.bytes <= self.free:
                self.queue.popleft()
                self._grant(head)
            elif head.bytes > self.free + self.unloading + self.idle:
                if not head.grows:
                    self._let_smaller_pass(head)
                    break
                self._refuse(head)
            else:
                retired += self._evict(head.bytes - self.free - self.unloading, head.key)
                break  # until the workers acknowledge
        return retired

    def _shed(self) -> Retired:
        """Evict what a smaller budget has no room for, as far as leases and pins let it."""
        return self._evict(min(self.resident + self.reserved - self.budget, self.idle), None)

    def _evict(self, wanted: int, displaced_by: str | None) -> Retired:
        retired: Retired = []
        while wanted > 0:
            victim = self._victim()
            victim.displaced_by = displaced_by
            wanted -= victim.size
            retired += self._remove(victim, "budget")
        return retired

    def _let_smaller_pass(self, head: Claim) -> None:
        """Grant later claims that fit as it is: bytes must not lie idle behind a claim that waits for a lease."""
        for claim in [later for later in self.queue if later.bytes <= self.free]:
            if head.overtaken >= _MOST_OVERTAKINGS:
                return
            if claim.bytes <= self.free and not claim.waiter.done():
                head.overtaken += 1
                self.queue.remove(claim)
                self._grant(claim)

    def _grant(self, claim: Claim) -> None:
        self.reserved += claim.bytes
        if claim.grows:
            claim.grows.bytes += claim.bytes
            claim.state = "ended"
        else:
            claim.state = "granted"
        claim.waiter.set_result(True)

    def _refuse(self, claim: Claim) -> None:
        self.queue.remove(claim)
        claim.state = "ended"
        if not claim.waiter.done():
            claim.waiter.set_result(False)

    def _remove(self, entry: Entry[Any], cause: EvictionCause) -> Retired:
        self._unlist(entry, cause)
        entry.pinned = False
        self.leaving.add(entry)
        entry.state = State.DETACHED
        if entry.leases:
            return []
        self._start_unloading(entry)
        return [entry]

    def _unlist(self, entry: Entry[Any], cause: EvictionCause) -> None:
        entry.cause = cause
        if self.table.get(entry.key) is entry:
            del self.table[entry.key]
            self.idle -= 0 if entry.pins else entry.size
            self._tell("remove", entry)

    def _start_unloading(self, entry: Entry[Any]) -> None:
        entry.state = State.UNLOADING
        self.resident -= entry.size
        self.unloading += entry.size

    def _forget(self, entry: Entry[Any]) -> None:
        entry.state = State.GONE
        self.leaving.discard(entry)

    # The policy: it ranks, and is not trusted with more

    def _tell(self, what: str, entry: Entry[Any]) -> None:
        if self.policy is None:
            return
        try:
            getattr(self.policy, what)(entry)
        except Exception as error:  # noqa: BLE001 - it is anybody's code
            self._dismiss_policy(what, error)

    def _victim(self) -> Entry[Any]:
        """Ask the policy, and check its answer; called only when there is an idle entry."""
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

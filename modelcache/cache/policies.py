"""Which model leaves first: eviction policies. They rank, and own nothing.

The ledger owns the bytes; a policy sees entries come, be used and go, and names a victim when asked::

    insert ──► ranked ──► evict()  the least worth keeping among those with ``pins == 0``
                 ▲  │
             hit ┘  └───► remove   unloaded, replaced, died: not the policy's choice

:class:`GDSFPolicy` is the default. :class:`LRUPolicy` and :class:`S3FIFOPolicy` do not see load costs.
:class:`CachetoolsPolicy` lends the order of any ``cachetools.Cache``. To write another, implement
:class:`EvictionPolicy` and run :func:`modelcache.testing.check_policy` on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush, heapreplace
from math import nan
from typing import Any, Protocol, TypeAlias, runtime_checkable

import cachetools

__all__ = [
    "CachetoolsPolicy",
    "Evictable",
    "EvictionPolicy",
    "GDSFPolicy",
    "LRUPolicy",
    "PolicySpec",
    "S3FIFOPolicy",
    "make_policy",
]


class Evictable(Protocol):
    """What a policy sees of a resident model. Somebody else keeps it up to date; read it whenever needed."""

    @property
    def key(self) -> Hashable:
        """The name of the model. Stays the same when a new version takes the place of the old."""

    @property
    def size(self) -> int:
        """Bytes that an eviction frees."""

    @property
    def cost(self) -> float:
        """Seconds that loading it again takes: a moving average of measured loads."""

    @property
    def pins(self) -> int:
        """How many hold it resident right now; only ``pins == 0`` may be evicted."""


@runtime_checkable
class EvictionPolicy(Protocol):
    """Ranks entries. Synchronous; never awaits, never calls back, never changes an entry.

    An entry is itself, not its key: a new version carries the key of the old one. Only one of the two is
    inside at a time, and calls that still name the other one must not touch it.
    """

    def insert(self, entry: Evictable) -> None:
        """Take in an entry that became resident, pinned or not. One that is inside already counts as hit."""

    def hit(self, entry: Evictable) -> None:
        """Note that the entry was used. Nothing happens if it is not inside."""

    def remove(self, entry: Evictable) -> None:
        """Forget the entry. Nothing happens if it is not inside."""

    def evict(self) -> Evictable | None:
        """Pick and forget one entry with ``pins == 0``; ``None`` only if there is none."""


class LRUPolicy:
    """The least recently used goes first, whatever its size and cost."""

    def __init__(self) -> None:
        self._oldest_first: OrderedDict[Hashable, Evictable] = OrderedDict()

    def insert(self, entry: Evictable) -> None:
        """Take in as the most recently used."""
        self._oldest_first[entry.key] = entry
        self._oldest_first.move_to_end(entry.key)

    def hit(self, entry: Evictable) -> None:
        """Move to the end of the line."""
        if self._oldest_first.get(entry.key) is entry:
            self._oldest_first.move_to_end(entry.key)

    def remove(self, entry: Evictable) -> None:
        """Forget."""
        if self._oldest_first.get(entry.key) is entry:
            del self._oldest_first[entry.key]

    def evict(self) -> Evictable | None:
        """Pick the one that has not been used for longest; pinned ones keep their place."""
        victim = _first_unpinned(self._oldest_first.values())
        if victim is not None:
            del self._oldest_first[victim.key]
        return victim


class _Ranked:
    """An entry inside GDSF, and its place in the heap: an object of its own there would be 96 bytes more per model."""

    __slots__ = ("entry", "epoch", "priority", "ticket", "uses")

    def __init__(self, entry: Evictable, uses: int, epoch: int, priority: float = nan) -> None:
        self.entry = entry
        self.uses = uses
        self.epoch = epoch  # the halving that ``uses`` has already been through
        self.priority = priority
        # What the heap goes by: never changed but at its top, and never above the priority. NaN: it is not in the heap.
        self.ticket = priority

    def __lt__(self, other: _Ranked) -> bool:
        return self.ticket < other.ticket


class GDSFPolicy:
    """Greedy-Dual-Size-Frequency: keep what saves most load time per byte. The default.

    ``priority = clock + uses * cost / size``. The least goes first, and its priority becomes the clock,
    so that an old favourite nobody asks for is overtaken in the end. Uses outlive an eviction (a model that
    comes back is no stranger), and are halved every ten accesses per resident entry.

    Sources: L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
    Policy", HPL-98-69R1; A. Fuerst and P. Sharma, "FaasCache: Keeping Serverless Computing Alive with
    Greedy-Dual Caching", ASPLOS 2021.
    """

    # A hit comes with every prediction, an eviction with a load. So a hit only writes down the new priority,
    # and evict() finds out whose ticket in the heap is too low. That works as long as no ticket is too HIGH:
    # halved uses, a falling cost or a growing size can lower a priority, and then hit() puts another object with a
    # new ticket in the place of the old one, which is void: the heap has it still, the table has not.

    # After thousands of hits thousands of tickets are too low, and the event loop must not stand still for 10 ms until
    # the very least is found. So an eviction corrects 32 of them at most, 0.1 ms, and then takes the least of those:
    # those whose priority was low at last, and has risen least.

    _RAISED_AT_ONCE = 32
    _ACCESSES_PER_HALVING = 10  # per resident entry
    _HISTORY = 4  # remembered strangers per resident entry, and a few for a small cache
    _HISTORY_MIN = 1000

    def __init__(self) -> None:
        self._clock = 0.0
        self._ranked: dict[Hashable, _Ranked] = {}
        self._heap: list[_Ranked] = []
        self._passed_over: list[_Ranked] = []  # pinned entries that evict() met
        self._epoch = 0  # halvings so far; a count catches up with them when it is next looked at
        self._accesses_to_halving = 0
        self._history: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()  # key: (uses, epoch)

    def insert(self, entry: Evictable) -> None:
        """Take in, with the uses remembered from an earlier stay."""
        known = self._ranked.get(entry.key)
        if known is None or known.entry is not entry:
            self._admit(entry, known)
        self.hit(entry)

    def hit(self, entry: Evictable) -> None:
        """Count the use and raise the priority; well below a microsecond."""
        ranked = self._ranked.get(entry.key)
        if ranked is None or ranked.entry is not entry:
            return
        self._accesses_to_halving -= 1
        if self._accesses_to_halving <= 0:
            self._epoch += 1
            self._accesses_to_halving = self._ACCESSES_PER_HALVING * len(self._ranked)
        if ranked.epoch != self._epoch:
            ranked.uses >>= self._epoch - ranked.epoch
            ranked.epoch = self._epoch
        ranked.uses += 1
        ranked.priority = priority = self._clock + ranked.uses * entry.cost / (entry.size or 1)
        if not priority >= ranked.ticket:
            self._enqueue(_Ranked(entry, ranked.uses, ranked.epoch, priority))

    def remove(self, entry: Evictable) -> None:
        """Forget the entry, but not how often it was used: a new version inherits that."""
        ranked = self._ranked.get(entry.key)
        if ranked is not None and ranked.entry is entry:
            self._forget(ranked)

    def evict(self) -> Evictable | None:
        """Pick the entry with the least priority, nearly always; pinned ones keep theirs."""
        self._reconsider_passed_over()
        heap, raised = self._heap, list[_Ranked]()
        while heap:
            ranked = heap[0]
            if self._is_void(ranked):
                heappop(heap)
            elif ranked.priority > ranked.ticket:
                ranked.ticket = ranked.priority
                heapreplace(heap, ranked)
                raised.append(ranked)
                if len(raised) >= self._RAISED_AT_ONCE:
                    victim = min((known for known in raised if not known.entry.pins), default=None)
                    if victim is not None:
                        return self._let_go(victim)
                    raised.clear()
            elif ranked.entry.pins:
                self._passed_over.append(heappop(heap))
            else:
                return self._let_go(heappop(heap))
        return None

    def _let_go(self, victim: _Ranked) -> Evictable:
        self._forget(victim)
        # One that was pinned for long may lie below the clock, which never goes back.
        self._clock = max(self._clock, victim.priority)
        return victim.entry

    def _admit(self, entry: Evictable, replaced: _Ranked | None) -> None:
        if replaced is not None:
            self._forget(replaced)
        self._ranked[entry.key] = _Ranked(entry, *self._history.pop(entry.key, (0, self._epoch)))
        self._accesses_to_halving += self._ACCESSES_PER_HALVING

    def _forget(self, ranked: _Ranked) -> None:
        del self._ranked[ranked.entry.key]
        self._accesses_to_halving -= self._ACCESSES_PER_HALVING
        self._remember(ranked)

    def _remember(self, ranked: _Ranked) -> None:
        """Keep the uses of one that leaves, and let go of two whose uses have been halved to nothing.

        Looking at two for each one that comes in visits all of them again and again, and never many at once.
        """
        history = self._history
        history[ranked.entry.key] = (ranked.uses, ranked.epoch)
        for _ in range(min(2, len(history))):
            key, (uses, epoch) = history.popitem(last=False)
            if uses >> (self._epoch - epoch):
                history[key] = (uses, epoch)
        while len(history) > max(self._HISTORY * len(self._ranked), self._HISTORY_MIN):
            history.popitem(last=False)

    def _is_void(self, ranked: _Ranked) -> bool:
        return self._ranked.get(ranked.entry.key) is not ranked

    def _enqueue(self, ranked: _Ranked) -> None:
        self._ranked[ranked.entry.key] = ranked
        heappush(self._heap, ranked)
        if len(self._heap) > 2 * len(self._ranked) + 64:  # more than half of the tickets are void
            self._heap = [*self._ranked.values()]
            self._passed_over = []
            heapify(self._heap)

    def _reconsider_passed_over(self) -> None:
        """Put back into the heap who is pinned no more: cheaper than a round trip of all of them."""
        passed_over, self._passed_over = self._passed_over, []
        for ranked in passed_over:
            if self._is_void(ranked):
                continue
            if ranked.entry.pins:
                self._passed_over.append(ranked)
            else:
                heappush(self._heap, ranked)


class _Queued:
    """An entry inside S3-FIFO, with the bytes its queue was charged for it."""

    __slots__ = ("entry", "queue", "size", "uses")

    queue: _Queue
    size: int

    def __init__(self, entry: Evictable) -> None:
        self.entry = entry
        self.uses = 0


class _Queue:
    """First in, first out, and how many bytes wait in it."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[Hashable, _Queued] = OrderedDict()
        self.bytes = 0

    def push(self, queued: _Queued) -> None:
        queued.queue = self
        queued.size = queued.entry.size
        self.bytes += queued.size
        self.waiting[queued.entry.key] = queued

    def pull(self, queued: _Queued) -> None:
        self.bytes -= queued.size
        del self.waiting[queued.entry.key]


class S3FIFOPolicy:
    """Three queues: newcomers prove themselves in a small one, before they may sit in the main one.

    The small queue may hold a tenth of the bytes. Who leaves it unused becomes a ghost (its key only), and
    goes straight to the main queue when it comes back. Good against scans, blind to cost.

    Source: J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
    """

    _SMALL = 0.1
    _USES_MAX = 3

    def __init__(self) -> None:
        self._queued: dict[Hashable, _Queued] = {}
        self._small = _Queue()
        self._main = _Queue()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()

    def insert(self, entry: Evictable) -> None:
        """Queue up: the main queue for one that was here before, the small one for others."""
        known = self._queued.get(entry.key)
        if known is not None and known.entry is entry:
            self.hit(entry)
            return
        if known is not None:
            self.remove(known.entry)
        self._queued[entry.key] = queued = _Queued(entry)
        came_back = self._ghosts.pop(entry.key, self) is None
        (self._main if came_back else self._small).push(queued)

    def hit(self, entry: Evictable) -> None:
        """Count the use; nobody moves."""
        queued = self._queued.get(entry.key)
        if queued is not None and queued.entry is entry and queued.uses < self._USES_MAX:
            queued.uses += 1

    def remove(self, entry: Evictable) -> None:
        """Forget all but the key, so that a new version does not have to prove itself again."""
        queued = self._queued.get(entry.key)
        if queued is not None and queued.entry is entry:
            self._forget(queued)
            self._haunt(entry.key)

    def evict(self) -> Evictable | None:
        """Let the queues advance until one drops out; pinned ones, being in use, move to the main queue."""
        pinned: list[_Queued] = []
        victim: Evictable | None = None
        while victim is None and (queue := self._next_queue()).waiting:
            queued = next(iter(queue.waiting.values()))
            if queued.entry.pins:
                queue.pull(queued)
                pinned.append(queued)
            elif not self._advance(queued):
                victim = queued.entry
                self._forget(queued)
        for queued in pinned:
            self._main.push(queued)
        return victim

    def _next_queue(self) -> _Queue:
        share = self._SMALL * (self._small.bytes + self._main.bytes)
        small_is_due = self._small.bytes > share or not self._main.waiting
        return self._small if self._small.waiting and small_is_due else self._main

    def _advance(self, queued: _Queued) -> bool:
        """Give the first in line another round in the main queue, if it earned one."""
        if queued.queue is self._main:
            earned, uses_left = queued.uses > 0, queued.uses - 1
        else:
            earned, uses_left = queued.uses > 1, 0
        if earned:
            queued.queue.pull(queued)
            queued.uses = uses_left
            self._main.push(queued)
        elif queued.queue is self._small:
            self._haunt(queued.entry.key)
        return earned

    def _forget(self, queued: _Queued) -> None:
        queued.queue.pull(queued)
        del self._queued[queued.entry.key]

    def _haunt(self, key: Hashable) -> None:
        self._ghosts[key] = None
        while len(self._ghosts) > len(self._queued):
            self._ghosts.popitem(last=False)


class CachetoolsPolicy:
    """Lends the order of any ``cachetools.Cache``: LRU, LFU, FIFO, RR, TTL, TLRU or your own.

    The ledger's byte budget decides when somebody has to go, the cache only decides who. So its ``maxsize``
    refuses nobody: what the cache gives up by itself, because it is full or the time is over, is first to be
    evicted. Its values are the entries: ``getsizeof`` and ``ttu`` may read ``entry.size`` and ``entry.cost``.
    Only public methods are called, and nobody else may touch the cache.
    """

    # Each entry is in exactly one of two tables. One that the cache dropped behind our back (it may expire
    # between any two of our calls) is noticed because the cache is then shorter than our table.

    def __init__(self, cache: cachetools.Cache[Any, Any]) -> None:
        if len(cache):
            raise ValueError(f"the {type(cache).__name__} of a policy must be empty, it has {len(cache)} items")
        self._cache: cachetools.Cache[Hashable, Evictable] = cache
        self._ranked: dict[Hashable, Evictable] = {}  # the cache has it
        self._dropped: dict[Hashable, Evictable] = {}  # the cache gave it up

    def insert(self, entry: Evictable) -> None:
        """Store in the cache."""
        known = self._ranked.get(entry.key, self._dropped.get(entry.key))
        if known is entry:
            self.hit(entry)
            return
        if known is not None:
            self.remove(known)
        self._store(entry)

    def hit(self, entry: Evictable) -> None:
        """Look up in the cache; what it had given up is stored again."""
        if self._ranked.get(entry.key) is entry:
            if self._cache.get(entry.key) is not entry:
                self._store(entry)
        elif self._dropped.get(entry.key) is entry:
            self._store(entry)

    def remove(self, entry: Evictable) -> None:
        """Delete from the cache."""
        if self._ranked.get(entry.key) is entry:
            del self._ranked[entry.key]
            self._cache.pop(entry.key, None)
        elif self._dropped.get(entry.key) is entry:
            del self._dropped[entry.key]

    def evict(self) -> Evictable | None:
        """Pick what the cache gave up, else what it pops; pinned ones are stored again."""
        self._collect_dropped()
        victim = _first_unpinned(self._dropped.values())
        if victim is None:
            victim = self._choose()
        if victim is None:  # or the last ones expired a moment ago
            victim = _first_unpinned([*self._dropped.values(), *self._ranked.values()])
        if victim is not None:
            self.remove(victim)
        return victim

    def _choose(self) -> Evictable | None:
        pinned: list[Evictable] = []
        while (popped := self._pop()) is not None and popped.pins:
            pinned.append(popped)
        for entry in pinned:
            self._store(entry)
        return popped

    def _pop(self) -> Evictable | None:
        while len(self._cache):
            try:
                key, entry = self._cache.popitem()
            except KeyError:  # the last one has just expired
                break
            # An item that had expired is back when the clock was set back; it is no longer ours.
            if self._ranked.get(key) is entry:
                return self._ranked.pop(key)
        return None

    def _store(self, entry: Evictable) -> None:
        self._collect_dropped()
        self._dropped.pop(entry.key, None)
        self._ranked.pop(entry.key, None)
        self._put(entry)
        # It may be too large for the cache, or over already as its ttu sees it.
        table = self._ranked if entry.key in self._cache else self._dropped
        table[entry.key] = entry

    def _put(self, entry: Evictable) -> None:
        """Make room ourselves: the cache would not tell whom it dropped."""
        size = self._cache.getsizeof(entry)
        if size > self._cache.maxsize:
            return
        while self._cache.currsize + size > self._cache.maxsize and (popped := self._pop()) is not None:
            self._dropped[popped.key] = popped
        self._cache[entry.key] = entry

    def _collect_dropped(self) -> None:
        if hasattr(self._cache, "expire"):
            for _, entry in self._cache.expire():
                self._drop(entry)
        if len(self._cache) < len(self._ranked):
            for entry in [entry for key, entry in self._ranked.items() if key not in self._cache]:
                self._drop(entry)

    def _drop(self, entry: Evictable) -> None:
        if self._ranked.get(entry.key) is entry:
            del self._ranked[entry.key]
            self._dropped[entry.key] = entry


_Made: TypeAlias = EvictionPolicy | cachetools.Cache[Any, Any]
PolicySpec: TypeAlias = str | _Made | Callable[[], _Made]

_BY_NAME: dict[str, Callable[[], EvictionPolicy]] = {
    "gdsf": GDSFPolicy,
    "lru": LRUPolicy,
    "s3fifo": S3FIFOPolicy,
}
_CHOICES = (
    "choose " + ", ".join(map(repr, _BY_NAME)) + ", an object with insert, hit, remove and evict, "
    "a cachetools.Cache, or a callable that returns such an object or cache"
)


def make_policy(spec: PolicySpec) -> EvictionPolicy:
    """Turn what a user may pass as ``policy`` into a policy."""
    if isinstance(spec, str):
        if spec not in _BY_NAME:
            raise ValueError(f"no eviction policy is named {spec!r}: {_CHOICES}")
        return _BY_NAME[spec]()
    policy = _as_policy(spec)
    if policy is None and callable(spec):
        policy = _as_policy(spec())
    if policy is None:
        raise TypeError(f"{spec!r} is no eviction policy and makes none: {_CHOICES}")
    return policy


def _as_policy(candidate: object) -> EvictionPolicy | None:
    if isinstance(candidate, cachetools.Cache):
        return CachetoolsPolicy(candidate)
    # A class has the four methods too, but it makes policies and is none.
    if isinstance(candidate, EvictionPolicy) and not isinstance(candidate, type):
        return candidate
    return None


def _first_unpinned(entries: Iterable[Evictable]) -> Evictable | None:
    return next((entry for entry in entries if not entry.pins), None)

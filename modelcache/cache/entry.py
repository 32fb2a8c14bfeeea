"""An entry: one version of one model, from the moment its bytes are settled until they are free again."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from modelcache.records import EvictionCause

V = TypeVar("V")


class State(Enum):
    """Where an entry is on its way; it only ever moves down this list."""

    READY = "ready"
    """In the table; new callers get it."""
    DETACHED = "detached"
    """Out of the table but still leased: charged, and retired when its last lease ends."""
    UNLOADING = "unloading"
    """No lease is left; the worker has been told, and has not yet said that the bytes are free."""
    GONE = "gone"
    """The bytes are free."""


class Entry(Generic[V]):
    """What policies rank and the ledger charges. ``value`` is what the worker holds; the cache never looks inside."""

    __slots__ = (
        "cause",
        "copies",
        "cost",
        "displaced_by",
        "hits",
        "key",
        "last_used",
        "leases",
        "original",
        "past_hits",
        "pinned",
        "size",
        "state",
        "value",
    )

    def __init__(self, key: str, value: V, *, size: int, cost: float) -> None:
        self.key = key
        self.value = value
        self.size = size
        """Bytes, measured."""
        self.cost = cost
        """Seconds its loads take: a moving average, without time spent in queues."""
        self.leases = 0
        self.pinned = False
        self.state = State.READY
        self.hits = 0
        self.past_hits = 0
        """Hits of what had its key before it: of other versions, and of its own earlier stays."""
        self.last_used = 0.0
        self.cause: EvictionCause = "budget"
        """Why it left the table, once it has."""
        self.displaced_by: str | None = None
        """The key it had to make room for."""
        self.copies: tuple[Entry[V], ...] = ()
        """The same version in further workers, as long as it is in the table."""
        self.original: Entry[V] | None = None
        """The entry that this is a copy of."""

    @property
    def pins(self) -> int:
        """What keeps it from being evicted: leases, and the pin."""
        return self.leases + self.pinned

    def __repr__(self) -> str:
        return f"<Entry {self.key} {self.state.value} {self.size} B, {self.leases} leases{', pinned' * self.pinned}>"

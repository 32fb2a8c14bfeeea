"""Claims: bytes that a load asks the ledger for, and bytes for several models that are of use only together."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

from modelcache.cache.entry import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping


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


Table = OrderedDict[str, Entry[Any]]
"""The resident models by key."""


class Claim:
    """Bytes that a load asks for: queued first, then granted, and in the end settled or given back."""

    __slots__ = ("beside", "bytes", "grows", "key", "overtaken", "state", "waiter")

    def __init__(
        self,
        key: str,
        size: int,
        waiter: Waiter,
        grows: Claim | None = None,
        beside: Entry[Any] | None = None,
    ) -> None:
        self.key = key
        self.bytes = size
        self.waiter = waiter
        self.beside = beside
        """The version it is to replace, and which is to serve until then: evicted for it only if nothing else helps."""
        self.grows = grows
        """The granted claim that this one is to enlarge."""
        self.state = "queued"
        self.overtaken = 0

    @property
    def queued(self) -> bool:
        """True until the grant or the refusal."""
        return self.state == "queued"

    @property
    def granted(self) -> bool:
        """True between the grant and the settlement."""
        return self.state == "granted"

    def wanted(self, table: Table) -> int:  # noqa: ARG002 - a group's depends on it
        """Return the bytes to be granted."""
        return self.bytes

    def kept(self, table: Table) -> list[Entry[Any]]:
        """Return the entries that must not be evicted for it."""
        return [self.beside] if self.beside is not None and table.get(self.key) is self.beside else []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key} {self.bytes} B {self.state}>"


class GroupClaim(Claim):
    """Bytes for models that are of use only together: what is resident is leased, and the rest granted, in one step.

    Until then it holds nothing: groups that each held a part of what they need could wait for each other for ever.
    """

    __slots__ = ("leased", "needs", "parts")

    def __init__(self, needs: Mapping[str, int], waiter: Waiter) -> None:
        super().__init__(", ".join(needs), sum(needs.values()), waiter)
        self.needs = needs
        """Bytes by key."""
        self.leased: list[Entry[Any]] = []
        """Once granted: those that were resident."""
        self.parts: list[Claim] = []
        """Once granted: a granted claim for each of the others."""

    def wanted(self, table: Table) -> int:
        """Return the bytes of those that are not resident."""
        return sum(size for key, size in self.needs.items() if key not in table)

    def kept(self, table: Table) -> list[Entry[Any]]:
        """Return those that are resident."""
        return [table[key] for key in self.needs if key in table]

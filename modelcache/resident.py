"""A resident model, as the parent knows it: what the value of an entry of the table is.

There may be very many, so each is kept small: what is rare is in a record that nearly all share, and figures that are
looked at when somebody asks are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from struct import Struct
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modelcache.pacing import Pace
    from modelcache.pool.artifacts import ModelFacts
    from modelcache.pool.pool import Worker
    from modelcache.records import Engine, Tier


@dataclass(slots=True, eq=False)
class Place:
    """Where bytes are taken: a worker, and the number it knows them by."""

    worker: Worker
    number: int


class Arrival(NamedTuple):
    """How a model came into its worker, in figures."""

    artifact_bytes: int
    unpacked_bytes: int
    downloading: float
    """Seconds from asking the store to its last byte."""
    load_seconds: float
    """Seconds until the model could be used, those of downloading among them, without queues."""
    loaded_at: float
    """Seconds since the epoch."""
    checked_at: float
    """When the store was last known to have this version, by the registry's clock."""

    @property
    def loading(self) -> float:
        """Seconds from the last byte until the model could be used."""
        return self.load_seconds - self.downloading

    def pack(self) -> bytes:
        """Return all of it in 48 bytes."""
        return _PACKED.pack(*self)

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Return what was packed."""
        return cls(*_PACKED.unpack(packed))


_PACKED = Struct("=QQdddd")


@dataclass(frozen=True, slots=True)
class Rare:
    """What there is to know of few models only: all others share one of these, and keep eight bytes for it.

    ``place.rare = replace(place.rare, ...)`` changes it.
    """

    paces: Mapping[int, Pace] = field(default_factory=lambda: MappingProxyType({}))
    """How long calls of many rows take, by what was asked for: contributions cost a thousand times what values do."""
    replaced: str | None = None
    """The version it took the place of, without a moment in which there was neither."""
    doubt: str | None = None
    """Why the last attempt to renew it failed; None if it did not."""
    rows_kept: tuple[bytes, ...] = ()
    """Of the last calls of few rows, until the second engine is ordered."""
    engine: Engine = "predictor"
    engine_bytes: int = 0
    """What of its size is the second engine's, or claimed for it."""
    stays: str | None = None
    """Why it got no second engine, once that was tried."""


_NOTHING_RARE = Rare()


@dataclass(slots=True, eq=False)
class Resident(Place):
    """A loaded model: what an entry of the table stands for."""

    version: str
    suffix: str
    facts: ModelFacts
    packed: bytes
    """Its arrival: as objects the six figures, which are rarely looked at, would be 100 bytes more of each model."""
    waiting: int = 0
    """Calls for it that the worker has been sent and has not answered."""
    tier: Tier = field(default="store", kw_only=True)
    """Where its bytes came from."""
    trusted_until: float = field(default=inf, kw_only=True)
    """When the store is to be asked again; never, while it is being asked."""
    small_calls: int = field(default=0, kw_only=True)
    """Calls of few rows since it was loaded, or since there were no bytes for a second engine."""
    rare: Rare = field(default=_NOTHING_RARE, kw_only=True)

    @property
    def arrival(self) -> Arrival:
        """How it came."""
        return Arrival.unpack(self.packed)

    def check(self, now: float) -> None:
        """The store has this version now."""
        self.packed = self.arrival._replace(checked_at=now).pack()

"""``explain``: why a model is cold, resident, refused or was evicted, in words and figures."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from modelcache.sizing import show_bytes

if TYPE_CHECKING:
    from modelcache.cache.entry import Entry
    from modelcache.history import Past
    from modelcache.residency import Residency
    from modelcache.resident import Resident

_CAUSES = {
    "unload": "it was unloaded by a call of unload()",
    "retain": "the registry does not retain models (retain=False)",
    "replaced": "another version took its place",
    "deleted": "the store does not have it any more",
    "worker": "the worker process that held it ended",
    "close": "the registry was closed",
}


def explain(state: Residency, key: str) -> str:
    """Return one or two sentences about ``key``."""
    entry = state.ledger.table.get(key)
    if entry is not None:
        return _resident(state, entry)
    flight = state.flights.by_key.get(key)
    if flight is not None:
        waiting = len(flight.live_waiters())
        return f"{key} is cold and {flight.phase.value} now; callers waiting for it: {waiting}. {_budget(state)}"
    refused = state.failures.recall(key)
    if refused is not None:
        return (
            f"{key} is refused for another {refused.retry_after:.1f} s, because its last load failed with "
            f"{type(refused).__name__}: {refused}"
        )
    past = state.history.of(key)
    if past is None:
        return f"{key} is cold: it has never been asked for. {_budget(state)}"
    return _cold(state, key, past)


def _resident(state: Residency, entry: Entry[Resident]) -> str:
    place, arrival, now = entry.value, entry.value.arrival, state.clock()
    workers = " and ".join(str(holder.value.worker.pid) for holder in (entry, *entry.copies))
    held = "pinned" if entry.pinned else f"{entry.leases} leases" if entry.leases else "evictable"
    return (
        f"{entry.key} is resident: version {place.version}, {show_bytes(entry.size)} in worker {workers}, "
        f"{held}. It loaded in {arrival.load_seconds * 1e3:.1f} ms ({arrival.downloading * 1e3:.1f} downloading, "
        f"{arrival.loading * 1e3:.1f} loading), has had {entry.hits} hits, and was last used "
        f"{now - entry.last_used:.1f} s ago. {_engine(place)}{_version(state, entry)} {_budget(state)}"
    )


def _engine(place: Resident) -> str:
    if place.rare.engine == "onnx":
        return "Calls of few rows are answered by ONNX Runtime. "
    return f"It got no second engine: {place.rare.stays}. " if place.rare.stays is not None else ""


def _version(state: Residency, entry: Entry[Resident]) -> str:
    """Say why it is this version."""
    place, now = entry.value, state.clock()
    came = "loaded from the store" if place.tier == "store" else "loaded from the local copy"
    came += f" in the place of {place.rare.replaced}" if place.rare.replaced is not None else ""
    if place.rare.doubt is not None:
        return f"Its version was {came}; it serves on since it could not be renewed: {place.rare.doubt}"
    checked = f"the store last had it {now - place.arrival.checked_at:.1f} s ago"
    if entry.key in state.flights.by_key:
        again = "is being asked again now"
    elif place.trusted_until == inf:
        again = "is not asked again before refresh()"
    else:
        again = f"is asked again by a call in {max(0.0, place.trusted_until - now):.1f} s or later"
    return f"Its version was {came}; {checked}, and {again}."


def _cold(state: Residency, key: str, past: Past) -> str:
    now = state.clock()
    if past.failed_at is not None:
        return (
            f"{key} is cold: its last load failed {now - past.failed_at:.1f} s ago with {past.error} "
            "The next call tries again."
        )
    if past.evicted_at is None:
        return f"{key} is cold: nothing of it is resident. {_budget(state)}"
    why = _CAUSES.get(past.cause) or (
        f"{past.displaced_by} needed its bytes" if past.displaced_by else "the budget was made smaller"
    )
    return (
        f"{key} is cold: it was evicted {now - past.evicted_at:.1f} s ago because {why}. It took "
        f"{show_bytes(past.size)}, had had {past.hits} hits, and had not been used for {past.idle:.1f} s. "
        f"The next call loads it again, which took {past.load_seconds * 1e3:.1f} ms last time. {_budget(state)}"
    )


def _budget(state: Residency) -> str:
    ledger = state.ledger
    return (
        f"Budget: {show_bytes(ledger.budget)}, of which {show_bytes(ledger.resident)} are resident in "
        f"{len(ledger.table)} models, {show_bytes(ledger.reserved)} reserved for loads, "
        f"{show_bytes(ledger.unloading)} being freed."
    )

"""What has to be true of a registry at any moment, re-counted from scratch; and what must be left of one: nothing."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache.cache.entry import State
from modelcache.pool.shared import SLOTS

if TYPE_CHECKING:
    from modelcache import ModelRegistry
    from modelcache.cache.flight import Flights
    from modelcache.cache.ledger import Ledger


def check_ledger(ledger: Ledger, *, shrunk: bool = False, lost_leases: int = 0) -> None:
    """Rules L1, L4, L8: the running sums are what the entries say, and within the budget.

    ``lost_leases`` are those still held on entries whose worker has ended.
    """
    listed, copies, leaving = list(ledger.table.values()), list(ledger.copies), list(ledger.leaving)
    assert all(ledger.table[entry.key] is entry for entry in listed)
    assert set(copies) == {copy for entry in listed for copy in entry.copies}
    assert all(copy.original is entry for entry in listed for copy in entry.copies)
    assert not any(entry.copies for entry in [*copies, *leaving])
    ready = listed + copies
    assert all(entry.state is State.READY for entry in ready)
    assert all(entry.state in (State.DETACHED, State.UNLOADING) for entry in leaving)
    unloading = [entry for entry in leaving if entry.state is State.UNLOADING]
    detached = [entry for entry in leaving if entry.state is State.DETACHED]
    assert all(entry.leases > 0 for entry in detached), "a detached entry without a lease has to be unloading"
    assert not any(entry.leases for entry in unloading), "a leased entry was told to unload"
    assert ledger.resident == sum(entry.size for entry in ready + detached)
    assert ledger.unloading == sum(entry.size for entry in unloading)
    assert ledger.idle == sum(entry.size for entry in ready if not entry.pins)
    assert ledger.pinned == sum(entry.size for entry in ready if entry.pinned)
    assert not any(entry.pinned for entry in copies + leaving)
    assert ledger.leases == sum(entry.leases for entry in ready + leaving) + lost_leases
    assert min(ledger.resident, ledger.reserved, ledger.unloading, ledger.idle, ledger.leases) >= 0
    assert all(claim.state == "queued" for claim in ledger.queue)
    if not shrunk:
        assert ledger.charged <= ledger.budget, "the ledger has overrun the budget"


def check_flights(flights: Flights) -> None:
    """Rule F7: the map holds the flights that are in the air, under their own key, but those that were detached."""
    assert all(flight.key == key for key, flight in flights.by_key.items())
    assert set(flights.by_key.values()) == {flight for flight in flights.airborne if flight.listed}


def check(registry: ModelRegistry, *, shrunk: bool = False) -> None:
    """All rules that hold between two steps of the event loop."""
    state = registry._state
    check_ledger(state.ledger, shrunk=shrunk)
    check_flights(state.flights)
    held = [entry for worker in registry._pool.workers for entry in worker.held.values()]
    by_identity = Counter(id(entry) for entry in held)
    ledger = state.ledger
    assert set(by_identity) == {id(entry) for entry in [*ledger.table.values(), *ledger.copies, *ledger.leaving]}
    assert all(count == 1 for count in by_identity.values())


async def slots_come_back(registry: ModelRegistry) -> None:
    """Each slot that was lent comes back when its worker reports it, also if its call was cancelled or timed out."""
    async with asyncio.timeout(5):
        for worker in registry._pool.workers:
            while worker.alive and sorted(worker.requests.slots.free) != list(range(1, SLOTS + 1)):
                assert len(set(worker.requests.slots.free)) == len(worker.requests.slots.free), "one is lent twice"
                await asyncio.sleep(0)


def check_gone(registry: ModelRegistry) -> None:
    """Rule F11: after close all counters are 0, and no flight, lease, entry or worker is left."""
    state = registry._state
    check_ledger(state.ledger)
    ledger = state.ledger
    assert (ledger.resident, ledger.reserved, ledger.unloading, ledger.idle, ledger.leases) == (0, 0, 0, 0, 0)
    assert not ledger.table
    assert not ledger.copies
    assert not ledger.leaving
    assert not ledger.queue
    assert not ledger.parked
    assert not state.flights.airborne
    assert not state.flights.by_key
    assert not registry._pool.workers
    assert not registry._background


def check_no_tasks_left() -> None:
    """No task is alive but those that anyio runs the test in."""
    assert [task for task in asyncio.all_tasks() if "TestRunner." not in repr(task.get_coro())] == []


async def descriptors_come_back(before: int) -> None:
    """No more files and sockets are open than ``before``, once threads that are not ours have closed theirs."""
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            while open_descriptors() > before:
                await asyncio.sleep(0)
    assert open_descriptors() <= before, f"a socket or file is left open, one of {_open_files()}"


def open_descriptors() -> int:
    """Count this process's open files and sockets, without /dev/null: each uvloop keeps one."""
    null, count = Path(os.devnull).stat().st_rdev, 0
    for descriptor in map(int, os.listdir("/dev/fd")):  # noqa: PTH208 - as names, or each would be opened
        with suppress(OSError):  # the one that listed them
            count += os.fstat(descriptor).st_rdev != null
    return count


def _open_files() -> list[str]:
    """Return what is open, as far as the system tells."""
    found = []
    for path in Path("/dev/fd").iterdir():
        with suppress(OSError):
            found.append(str(path.readlink()))
    return sorted(found)

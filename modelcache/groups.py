"""Leases on several models at once: on all of them or on none.

Callers that hold one model while they wait for another can wait for each other for ever. So a group holds nothing until
everything it needs can be had in one step of the ledger:

1. find out what each model takes that is not resident, by asking the store and no more: a name that is missing, or a
   sum that cannot fit, is refused before anything is evicted;
2. claim the sum; the ledger leases those that are resident and grants the bytes for the others together;
3. load those, each by its flight, with the bytes granted. One that turns out larger, and has to queue for more, sends
   the group back to the first step.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from modelcache.cache.flight import RegroupError
from modelcache.cache.sizes import Bounds
from modelcache.errors import LoadTimeoutError, ModelTooLargeError, RegistryClosedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from modelcache.cache.claims import GroupClaim
    from modelcache.cache.entry import Entry
    from modelcache.leasing import Boarding, Leasing
    from modelcache.lifecycle import Lifecycle
    from modelcache.loader import Loader
    from modelcache.residency import Residency
    from modelcache.resident import Resident


class Groups:
    """Takes models together."""

    def __init__(self, state: Residency, loader: Loader, leasing: Leasing, life: Lifecycle) -> None:
        self._state = state
        self._loader = loader
        self._leasing = leasing
        self._life = life

    async def take(self, names: Sequence[str]) -> list[Entry[Resident]]:
        """Lease ``names``, a lease for each, loading what is not resident; all or none."""
        deadline = asyncio.get_running_loop().time() + self._loader.timeout
        while True:
            self._life.check()
            if all(self._leasing.find(name) for name in names):  # hits never wait behind loads
                return [entry for name in names if (entry := self._leasing.take_resident(name))]
            try:
                return await self._form(names, deadline)
            except RegroupError as error:
                await self._find_size_by_loading(error.key, deadline)

    def close(self) -> None:
        """Let none wait any more; the tasks of all loads have been cancelled."""
        ledger = self._state.ledger
        for waiter in [*ledger.parked, *(claim.waiter for claim in ledger.queue)]:
            if not waiter.done():
                waiter.set_exception(RegistryClosedError("The registry was closed while a group waited for bytes."))

    async def _form(self, names: Sequence[str], deadline: float) -> list[Entry[Resident]]:
        async with self._limit(names, deadline):
            found = dict(await self._scout_all(dict.fromkeys(names)))
        group = await self._claim(dict(found.values()), deadline)
        entries = await self._board(group)
        taken = [entries[found[name][0]] for name in names]
        for entry in (Counter(taken) - Counter(entries.values())).elements():  # of names that come twice
            self._state.ledger.lease(entry)
        return taken

    async def _find_size_by_loading(self, name: str, deadline: float) -> None:
        """What was found out about ``name`` was too little: load it alone, while the group holds nothing."""
        async with self._limit((name,), deadline):
            self._leasing.release(await self._leasing.take(name))

    @asynccontextmanager
    async def _limit(self, names: Iterable[str], deadline: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(deadline) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise  # a load's own
            raise LoadTimeoutError(
                f"What {', '.join(names)} take together could not be found out within {self._loader.timeout:g} s "
                "(load_timeout): preload() them, or hold fewer at once."
            ) from error

    # What the models take

    async def _scout_all(self, names: Iterable[str]) -> list[tuple[str, tuple[str, Bounds]]]:
        """Return names with their keys and bounds; the first failure ends it."""
        try:
            async with asyncio.TaskGroup() as scouts:
                tasks = {name: scouts.create_task(self._scout(name)) for name in names}
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [(name, task.result()) for name, task in tasks.items()]

    async def _scout(self, name: str) -> tuple[str, Bounds]:
        """Ask what a model takes; if it is being loaded, wait for that first."""
        flight = self._state.flights.by_key.get(name)
        if flight is not None and not self._leasing.find(name):
            await asyncio.wait((flight.task,))
        self._life.check()
        entry = self._leasing.find(name)
        if entry is not None:
            return entry.key, Bounds(entry.size, entry.size)
        return name, await self._leasing.scout(name)

    # Bytes for all of them

    async def _claim(self, bounds: dict[str, Bounds], deadline: float) -> GroupClaim:
        """Wait until what is resident is leased, and bytes for the rest are granted."""
        state, ledger = self._state, self._state.ledger
        while True:
            self._life.check()
            for key in bounds.keys() & ledger.table.keys():
                bounds[key] = Bounds(ledger.table[key].size, ledger.table[key].size)
            own_pins = sum(ledger.table[key].size for key in bounds if key in ledger.table and ledger.table[key].pinned)
            least = self._check_fits(bounds)
            promise: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            if least > ledger.room + own_pins:
                ledger.wait_for_room(least - own_pins, promise)
                await self._wait_for(promise, bounds, deadline)
                continue
            group, retired = ledger.claim_together(_shares(bounds, ledger.room + own_pins), promise)
            state.retire(retired)
            try:
                if await self._wait_for(promise, bounds, deadline):
                    self._life.check()
                    return group
            except BaseException:
                self._disband(group)
                raise

    def _disband(self, group: GroupClaim) -> None:
        """Give back what a group holds, and its place in the queue."""
        for claim in (group, *group.parts):
            self._state.retire(self._state.ledger.give_back(claim))
        for entry in group.leased:
            self._leasing.release(entry)

    async def _wait_for(self, promise: asyncio.Future[bool], bounds: dict[str, Bounds], deadline: float) -> bool:
        try:
            async with asyncio.timeout_at(deadline):
                return await promise
        except TimeoutError as error:
            least = sum(bound.least for bound in bounds.values())
            time = f"{self._loader.timeout:g} s (load_timeout)"
            raise self._state.no_room(", ".join(bounds), least, time) from error
        finally:
            self._state.ledger.parked.pop(promise, None)

    def _check_fits(self, bounds: dict[str, Bounds]) -> int:
        budget = self._state.ledger.budget
        least = sum(bound.least for bound in bounds.values())
        if least > budget:
            names = ", ".join(bounds)
            raise ModelTooLargeError(
                f"{names} take {least:,} bytes or more together, and the whole memory budget is {budget:,}: "
                "hold fewer at once, or raise memory_budget. Nothing was evicted for them.",
                model=names, needed=least, budget=budget,
            )  # fmt: skip
        return least

    # Loads

    async def _board(self, group: GroupClaim) -> dict[str, Entry[Resident]]:
        """Load those that were not resident, and return the leases on all, by key."""
        ledger = self._state.ledger
        entries = {entry.key: entry for entry in group.leased}
        for entry in group.leased:
            self._leasing.count_hit(entry)
        boardings = []
        for part in group.parts:
            since = self._leasing.take_resident(part.key)
            if since is None:
                boardings.append(self._leasing.board(part.key, part))
            else:  # it was loaded in the tick of the grant
                entries[part.key] = since
                self._state.retire(ledger.give_back(part))
        try:
            await _all(boardings)
        except BaseException:
            for boarding in boardings:
                self._leasing.give_up(boarding)
            for entry in entries.values():
                self._leasing.release(entry)
            raise
        for boarding in boardings:
            self._leasing.leave(boarding)
            entries[boarding.flight.key] = boarding.waiter.result()
        return entries


async def _all(boardings: Sequence[Boarding]) -> None:
    """Wait until all have their leases, or raise the first failure."""
    waiters = [boarding.waiter for boarding in boardings]
    if waiters:
        done, _ = await asyncio.wait(waiters, return_when=asyncio.FIRST_EXCEPTION)
        for waiter in done:
            waiter.result()


def _shares(bounds: dict[str, Bounds], room: int) -> dict[str, int]:
    """Give each its upper bound; if those are too much together, its lower one and a share of what is left."""
    least = sum(bound.least for bound in bounds.values())
    most = sum(bound.most for bound in bounds.values())
    share = 1.0 if most <= room else (room - least) / (most - least)
    return {key: bound.least + int((bound.most - bound.least) * share) for key, bound in bounds.items()}

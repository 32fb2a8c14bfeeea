"""Clients that go before they are answered, and what that means to a real worker and to a load."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import odd
import zoo
from modelcache import MemoryStore
from modelcache.serving.guard import Guard
from modelcache.serving.server import Options, make_app
from modelcache.telemetry import prometheus  # noqa: F401 - make_app would import it on the event loop
from modelcache.testing import GatedStore
from serving.own_server import OwnServer, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeRegistry
    from modelcache import ModelRegistry


def call(name: str, row: str) -> bytes:
    head = f"POST /models/{name}/invoke HTTP/1.1\r\nHost: x\r\nContent-Type: text/csv\r\nContent-Length: {len(row)}\r\n"
    return f"{head}\r\n{row}".encode()


def served(registry: ModelRegistry) -> Guard:
    return Guard(make_app(registry, Options()))


async def until(condition: Callable[[], Any], server: OwnServer) -> None:
    async with asyncio.timeout(20):
        while not condition():
            server.later(0)
            await asyncio.sleep(0)


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
async def test_a_client_that_goes_takes_its_call_with_it(
    make_registry: MakeRegistry, tmp_path: Path, reset: bool
) -> None:
    """P3: a call that waits in the worker's queue is never predicted, its lease ends, and others notice nothing."""
    gate, log = odd.Gate(tmp_path / "gate"), tmp_path / "log"
    store = MemoryStore({"m.json": odd.artifact(gate=gate.path, log=str(log))})
    registry = await make_registry(store, predictor=odd.ODD)
    await registry.preload(["m"])
    async with running(served(registry)) as server:
        first, second = await server.connect(), await server.connect()
        await first.send(call("m", f"{odd.WAIT},1"))
        await until(gate.reached, server)
        await second.send(call("m", f"{odd.PREDICT},21"))
        await until(lambda: registry.stats().workers[0].queue_depth == 2, server)
        await second.close(reset=reset)
        await until(lambda: registry.stats().workers[0].queue_depth == 1, server)
        assert registry._state.ledger.leases == 1
        gate.open()
        assert (await first.answer())[2] == b"[2.0]"
        await until(lambda: registry.stats().workers[0].queue_depth == registry._state.ledger.leases == 0, server)
    assert "21" not in log.read_text()


async def test_a_load_goes_on_without_the_client_that_asked_for_it(make_registry: MakeRegistry) -> None:
    """F9: what has begun to load is there for the next client."""
    store = GatedStore({"m.ubj": zoo.model().ubj})
    registry = await make_registry(store)
    async with running(served(registry)) as server:
        client = await server.connect()
        await client.send(call("m", "1,2,3,4,5,6"))
        await until(lambda: store.fetches == ["m"], server)
        await client.close()
        await until(lambda: not server.server.server_state.connections, server)
        store.open("m")
        await until(lambda: registry.peek("m") is not None, server)
    assert store.fetches == ["m"]

"""Fixtures that every test uses, and the checks that run after each of them."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from blockbuster import blockbuster_ctx

import oracle
from modelcache import MemoryStore, ModelRegistry, S3Store
from servers import s3

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from servers.fault_proxy import FaultProxy

    MakeRegistry = Callable[..., Awaitable[ModelRegistry]]


def pytest_collection_finish() -> None:
    """Spare what has been imported, which stays, a look by each of the collections that tests ask for."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> str:
    """Plain asyncio; loops.py has the others, which some files run on as well, test_registry.py on all."""
    return "asyncio"


@pytest.fixture(autouse=True)
def no_blocking_calls_on_the_loop() -> Iterator[None]:
    """A blocking call of ours on the event loop fails the test."""
    with blockbuster_ctx("modelcache") as detector:
        for function in detector.functions.values():
            # The limits of the container are files that the kernel answers from memory.
            function.can_block_in("modelcache/sizing.py", {"_read"})
            # It has an event loop of its own, in a thread.
            function.can_block_in("modelcache/stores/s3_client.py", {"_run_in_thread"})
        yield


@pytest.fixture
def no_processes_left() -> Iterator[None]:
    """Whatever the test started has ended."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    gc.collect()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture
async def make_registry(no_processes_left: None) -> AsyncIterator[MakeRegistry]:
    """Make started registries; all are closed after the test, and nothing must be left of them."""
    made: list[ModelRegistry] = []
    descriptors = oracle.open_descriptors()
    async with AsyncExitStack() as stack:

        async def make(store: Any = None, **options: Any) -> ModelRegistry:
            options.setdefault("workers", 1)
            options.setdefault("memory_budget", "64 MiB")
            registry = ModelRegistry(store if store is not None else MemoryStore(), **options)
            made.append(registry)
            await registry.start()
            stack.push_async_callback(registry.close, drain=5)
            return registry

        yield make
        for registry in made:
            oracle.check(registry)
            await oracle.slots_come_back(registry)
    for registry in made:
        oracle.check_gone(registry)
    await oracle.descriptors_come_back(descriptors)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    with s3.models_parsed_once(), s3.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[s3.S3Server]:
    with s3.models_parsed_once(), s3.moto() as server:
        yield server


@pytest.fixture(params=["rclone", "moto"])
def server(request: pytest.FixtureRequest) -> s3.S3Server:
    found: s3.S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def open_s3() -> AsyncIterator[s3.Open]:
    """Make stores over a server, or a proxy of one; all are closed after the test."""
    async with AsyncExitStack() as stack:

        def make(server: s3.S3Server | FaultProxy, place: str, **options: Any) -> S3Store:
            store = S3Store(f"s3://{place}", **{"endpoint_url": server.url, "manifest": None, **s3.KEYS, **options})
            stack.push_async_callback(store.close)
            return store

        yield make


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of botocore before it repeats a request: nobody waits for them."""
    found: list[float] = []

    async def pause(_: Any, seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("aiobotocore.endpoint.AioEndpoint._sleep", pause)
    return found


async def settle(times: int = 20) -> None:
    """Let everything that can run now run."""
    for _ in range(times):
        await asyncio.sleep(0)

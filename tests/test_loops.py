"""The event loops of the tests are what they are said to be."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from loops import LOOPS

WHERE = ContextVar("WHERE", default="outside")


@pytest.fixture
def anyio_backend() -> object:
    return "asyncio", LOOPS["eager"]


async def test_an_eager_task_runs_at_once_as_far_as_it_gets() -> None:
    """It is the current task meanwhile, in a context of its own, and its maker goes on when it has to wait."""
    maker, gate, steps = asyncio.current_task(), asyncio.Event(), []

    async def work() -> str:
        steps.append((asyncio.current_task(), WHERE.get()))
        WHERE.set("inside")
        await gate.wait()
        steps.append((asyncio.current_task(), WHERE.get()))
        return "done"

    task = asyncio.create_task(work(), name="worker")
    assert steps == [(task, "outside")]
    assert (asyncio.current_task(), WHERE.get()) == (maker, "outside")
    assert not task.done()
    assert task.get_name() == "worker"
    assert task in asyncio.all_tasks()
    gate.set()
    assert await task == "done"
    assert steps[1] == (task, "inside")


async def test_an_eager_task_that_need_not_wait_is_done_at_once() -> None:
    """Its result and its error are its own, and its callbacks run later; so with tasks that it makes itself."""

    async def give() -> str:
        return "done"

    async def fail() -> None:
        raise ValueError("failed")

    async def nest() -> asyncio.Task[str]:
        return asyncio.create_task(give())

    outer, failed, called = asyncio.create_task(nest()), asyncio.create_task(fail()), asyncio.Event()
    assert outer.done() and outer.result().result() == "done"
    assert isinstance(failed.exception(), ValueError)
    outer.add_done_callback(lambda _: called.set())
    assert not called.is_set()
    await called.wait()


async def test_an_eager_task_can_be_cancelled_where_it_waits() -> None:
    """The first wait is one like any other."""
    entered = []

    async def wait() -> None:
        entered.append(True)
        async with asyncio.timeout(60):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    assert entered
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

"""The kinds of event loops that tests run on, as anyio's pytest plugin takes them."""

from __future__ import annotations

import asyncio
import sys
from asyncio import tasks
from typing import Any

import uvloop


def eager_tasks(loop: Any, coroutine: Any, **options: Any) -> Any:
    """Make a task that runs at once as far as it gets: ``asyncio.eager_task_factory``, before Python 3.12 has it.

    The task of pure Python takes its first step by the newest call that waits in the loop, and nothing else can have
    come after it. That step is taken here, as any task's is: in its own context, and as the current task.
    """
    python_tasks: Any = tasks
    task = python_tasks._PyTask(coroutine, loop=loop, **options)
    if not loop.is_running():
        return task
    first_step, maker = loop._ready.pop(), asyncio.current_task(loop)
    if maker is not None:
        python_tasks._leave_task(loop, maker)
    try:
        first_step._run()
    finally:
        if maker is not None:
            python_tasks._enter_task(loop, maker)
    return task


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    else:
        loop.set_task_factory(eager_tasks)
    return loop


LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {},
    "debug": {"debug": True},
    "uvloop": {"loop_factory": uvloop.new_event_loop},
    "eager": {"loop_factory": eager_loop},
}

"""Ctrl-C while the workers start: the app ends at once, as if they were no concern of it, and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import modelcache
import odd

PATIENCE = 30
FOLDERS = os.pathsep.join([str(Path(modelcache.__file__).parent.parent), str(Path(odd.__file__).parent)])
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": FOLDERS, "PYTHONUNBUFFERED": "1"}

PREAMBLE = """
    import asyncio, gc, json, logging, os, signal, sys, warnings
    import psutil
    from modelcache import MemoryStore, ModelRegistry
    from modelcache.pool import pool

    def make(workers):
        return ModelRegistry(MemoryStore(), workers=workers, memory_budget="64 MiB", predictor="odd:Odd")

    def tell(**facts):
        print(json.dumps(facts), flush=True)
"""


def command(body: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "always", "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(body), *arguments]


def assert_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if alive(pid)]} are still alive"
        os.sched_yield()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


STOPS = """
    plain_start, plain_greet = pool.start_process, pool.Worker._greet
    stop_at, spawned = sys.argv[1], 0

    def reach(point):
        global stop_at
        if point == stop_at:
            stop_at = ""
            tell(reached=point)
            sys.stdin.readline()

    async def start_process(*args, **options):
        global spawned
        reach(f"before worker {spawned}")
        process = await plain_start(*args, **options)
        tell(pid=process.pid)
        reach(f"after worker {spawned}")
        spawned += 1
        return process

    async def greet(self):
        reach("while one greets")
        await plain_greet(self)
        reach("after a greeting")

    async def main():
        async with make(workers=2):
            reach("when all are up")
            await asyncio.Event().wait()

    pool.start_process, pool.Worker._greet = start_process, greet
    loop = sys.argv[2]
    if loop == "uvloop":
        import uvloop
        uvloop.run(main())
    else:
        asyncio.run(main())
"""
POINTS = ["before worker 0", "after worker 0", "after worker 1", "while one greets", "after a greeting",
          "when all are up"]  # fmt: skip


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("point", POINTS)
def test_ctrl_c_at_a_point_of_the_start(point: str, loop: str) -> None:
    """Rule P5: it is a KeyboardInterrupt like any other: no complaint, and no process is left."""
    with subprocess.Popen(
        command(STOPS, point, loop),
        env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as app:  # fmt: skip
        assert app.stdin is not None and app.stdout is not None
        facts = []
        try:
            while "reached" not in (told := json.loads(app.stdout.readline())):
                facts.append(told)
            app.send_signal(signal.SIGINT)
            app.stdin.write("\n")
            said, complaints = app.communicate(timeout=PATIENCE)
        finally:
            app.kill()
    assert app.returncode == -signal.SIGINT
    assert complaints.startswith("Traceback (most recent call last):\n")
    assert complaints.endswith("\nKeyboardInterrupt\n")
    assert complaints.count("Traceback") == 2, "of the cancellation of main(), and of what asyncio makes of it"
    assert not [word for word in ("never retrieved", "destroyed", "Warning") if word in complaints]
    assert_ended([fact["pid"] for fact in [*facts, *map(json.loads, said.splitlines())]])


SWEEP = """
    noise = []

    class Listener(logging.Handler):
        def emit(self, record):
            noise.append(record.getMessage())

    logging.getLogger().addHandler(Listener())
    sys.unraisablehook = lambda found: noise.append(repr(found.exc_value))
    warnings.showwarning = lambda message, *_, **__: noise.append(str(message))

    plain_run = asyncio.Handle._run
    to_go = 0

    def run(self):
        global to_go
        if to_go:
            to_go -= 1
            if not to_go:
                signal.raise_signal(signal.SIGINT)
        plain_run(self)

    asyncio.Handle._run = run
    up = False

    async def main():
        global up, to_go
        async with make(workers=1):
            up = True
            if to_go:
                to_go = 0
                signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()

    asyncio.run(asyncio.sleep(0))  # what asyncio opens once
    descriptors, step = len(os.listdir("/dev/fd")), 0
    while not up:
        step += 1
        to_go = step
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            gc.collect()
            left = [child.pid for child in psutil.Process().children()]
            if noise or left or len(os.listdir("/dev/fd")) > descriptors:
                tell(step=step, noise=noise, left=left, descriptors=os.listdir("/dev/fd"))
            noise.clear()
    tell(steps=step)
"""


def test_ctrl_c_at_each_step_of_the_start() -> None:
    """Rule P5: before the first step of the event loop, before the second, and so on until the workers are up."""
    done = subprocess.run(
        command(SWEEP), check=True, env=ENVIRONMENT, timeout=2 * PATIENCE, capture_output=True, text=True
    )
    *complaints, end = map(json.loads, done.stdout.splitlines())
    assert complaints == []
    assert end["steps"] > 20
    assert done.stderr == ""

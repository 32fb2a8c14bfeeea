"""Apps that end while the workers start, by Ctrl-C or by themselves: they do so at once, and leave none behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from unittest import mock

import pytest

import odd
import oracle
from apps import ENVIRONMENT, PATIENCE, assert_ended, command
from modelcache.pool import process

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
        command(STOPS, arguments=(point, loop)),
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


STEPS = """
    noise = []

    class Listener(logging.Handler):
        def emit(self, record):
            noise.append(record.getMessage())

    logging.getLogger().addHandler(Listener())
    sys.unraisablehook = lambda found: noise.append(repr(found.exc_value))
    warnings.showwarning = lambda message, *_, **__: noise.append(str(message))

    def reached():
        pass

    plain_run = asyncio.Handle._run

    def run(self):
        global to_go
        to_go -= 1
        if not to_go:
            reached()
        plain_run(self)

    asyncio.Handle._run = run
    to_go = 0
    asyncio.run(asyncio.sleep(0))  # what asyncio opens once
    descriptors = len(os.listdir("/dev/fd"))
"""

SWEEP = """
    def reached():
        signal.raise_signal(signal.SIGINT)

    async def main():
        global up, to_go
        async with make(workers=1):
            up = True
            if to_go > 0:
                to_go = 0
                reached()
            await asyncio.Event().wait()

    up, step = False, 0
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
        command(STEPS, SWEEP), check=True, env=ENVIRONMENT, timeout=2 * PATIENCE, capture_output=True, text=True
    )
    *complaints, end = map(json.loads, done.stdout.splitlines())
    assert complaints == []
    assert end["steps"] > 20
    assert done.stderr == ""


DESERTED = """
    async def main():
        global reached, up
        registry, ending = make(workers=2), asyncio.Event()
        reached = ending.set
        if to_go <= 0:
            reached()
        starting = asyncio.create_task(registry.start())
        starting.add_done_callback(lambda _: ending.set())
        await ending.wait()
        if registry._life.loop is not None:
            up = True
            await registry.close()

    gc.disable()  # a worker whose lanes are collected ends by itself
    up, step = False, 0
    while not up:
        step += 1
        to_go = step
        asyncio.run(main())
        _, left = psutil.wait_procs(psutil.Process().children(), timeout=5)
        gc.collect()
        if left or len(os.listdir("/dev/fd")) > descriptors:
            tell(step=step, left=len(left), descriptors=os.listdir("/dev/fd"))
    tell(steps=step)
"""


def test_an_app_that_ends_while_the_workers_start() -> None:
    """Rule P5: at whatever step ``asyncio.run`` cancels the start, it ends, with the workers and their descriptors.

    It cancels a task of asyncio's own, too, without which asyncio waits for ever for a process that it has killed.
    """
    done = subprocess.run(
        command(STEPS, DESERTED), check=True, env=ENVIRONMENT, timeout=2 * PATIENCE, capture_output=True
    )
    *complaints, end = map(json.loads, done.stdout.splitlines())
    assert complaints == []
    assert end["steps"] > 20


async def test_a_start_cancelled_between_process_and_lanes_ends_the_process(
    no_processes_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F11: what has been started so far is ended, and waited for, whatever comes between."""

    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    descriptors = oracle.open_descriptors()
    monkeypatch.setattr(process, "_connect", cancelled)
    settings = process.Settings(1, odd.ODD, stays_awake=False)
    with pytest.raises(asyncio.CancelledError):
        await process.start_process(process.Lanes(), mock.Mock(), mock.Mock(), settings)
    await asyncio.sleep(0)
    assert oracle.open_descriptors() <= descriptors

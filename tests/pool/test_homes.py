"""Rules P5 and S4: where a registry can live, what ends its workers, and what they see of their parent."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from jupyter_client.manager import KernelManager

import modelcache
import odd
import zoo
from modelcache import MemoryStore, ModelCacheError, ModelRegistry, RegistryClosedError
from modelcache.pool.process import Lanes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import MakeRegistry

PATIENCE = 30
FOLDERS = os.pathsep.join([str(Path(modelcache.__file__).parent.parent), str(Path(odd.__file__).parent)])
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": FOLDERS, "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with the models "m" (of XGBoost) and "odd"."""
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "m.ubj").write_bytes(zoo.model().ubj)
    (folder / "odd.json").write_bytes(odd.artifact())
    return folder


@pytest.fixture
def script(store: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Return a function that writes a script, after a common preamble, and returns the command to run it."""
    preamble = f"""
        import asyncio, gc, json, os, signal, sys, threading, time
        import psutil
        from modelcache import ModelRegistry, RegistryClosedError

        def make():
            return ModelRegistry({str(store)!r}, workers=2, memory_budget="64 MiB", predictor="odd:Odd")

        def pids():
            return sorted(child.pid for child in psutil.Process().children())

        def tell(**facts):
            print(json.dumps(facts), flush=True)
    """

    def write(body: str) -> list[str]:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(preamble) + textwrap.dedent(body))
        return [sys.executable, str(file)]

    return write


def run(command: list[str], typed: str = "") -> str:
    """Run a command that has to succeed, and return what it said."""
    done = subprocess.run(
        command, check=False, env=ENVIRONMENT, timeout=PATIENCE, text=True, capture_output=True, input=typed
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Script:
    """A script that runs beside the test, and tells facts line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(f"the script has ended: {self.process.stderr.read()}")
        facts: dict[str, Any] = json.loads(line)
        return facts

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[Script]:
    """Run a script until the block ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **(pipes | options)) as process:
        try:
            yield Script(process)
        finally:
            process.kill()


def assert_ended(pids: list[int]) -> None:
    """Wait until processes have ended."""
    deadline = time.monotonic() + PATIENCE
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if alive(pid)]} are still alive"
        time.sleep(0)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Where it runs

USE = """
    async def main():
        async with ModelRegistry({store!r}, workers=2, memory_budget="64 MiB") as registry:
            print((await registry.predict("m", [[1, 2, 3, 4, 5, 6]])).tolist())
"""


@pytest.fixture
def use(store: Path) -> str:
    """A program that predicts once and prints the answer; ``main()`` is still to be run."""
    return "import asyncio\nfrom modelcache import ModelRegistry\n" + textwrap.dedent(USE.format(store=str(store)))


EXPECTED = zoo.model().expected([[1, 2, 3, 4, 5, 6]]).tolist()


def test_it_runs_in_a_script_without_a_main_guard(use: str, tmp_path: Path) -> None:
    """Rule P5: workers do not import the app's main module, so nothing in it runs twice."""
    file = tmp_path / "unguarded.py"
    file.write_text(use + "print('once')\nasyncio.run(main())\n")
    assert run([sys.executable, str(file)]) == f"once\n{EXPECTED}\n"


def test_it_runs_from_the_command_line(use: str) -> None:
    """Rule P5: ``python -c`` has no main module that could be imported."""
    assert run([sys.executable, "-c", use + "asyncio.run(main())"]) == f"{EXPECTED}\n"


def test_it_runs_in_an_interactive_session(use: str) -> None:
    """Rule P5: line by line, as somebody types it."""
    typed = use + "\nasyncio.run(main())\nasyncio.run(main())\nexit()\n"
    assert run([sys.executable, "-i", "-q"], typed) == f"{EXPECTED}\n{EXPECTED}\n"


def test_it_runs_in_the_asyncio_repl(store: Path) -> None:
    """Rule P5: with ``await`` at the prompt, and nothing closed at the end."""
    typed = f"""
from modelcache import ModelRegistry
registry = ModelRegistry({str(store)!r}, workers=1, memory_budget="64 MiB")
(await registry.predict("m", [1, 2, 3, 4, 5, 6])).tolist()
await registry.close()
"""
    assert str(EXPECTED) in run([sys.executable, "-m", "asyncio"], typed)


def test_it_runs_in_a_notebook(store: Path) -> None:
    """Rule P5: cell by cell on the kernel's own event loop; restarting the kernel ends the workers."""
    manager = KernelManager()
    manager.start_kernel(env=os.environ | ENVIRONMENT)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        cell(client, f"from modelcache import ModelRegistry\nregistry = ModelRegistry({str(store)!r}, workers=1)")
        for _ in range(2):
            assert cell(client, 'print((await registry.predict("m", [1, 2, 3, 4, 5, 6])).tolist())') == str(EXPECTED)
        pids = json.loads(cell(client, "print([worker.pid for worker in registry.stats().workers])"))
        assert all(alive(pid) for pid in pids)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.context.destroy()
    assert_ended(pids)


def cell(client: Any, code: str) -> str:
    """Run one cell; return what it printed."""
    printed: list[str] = []

    def listen(message: dict[str, Any]) -> None:
        content = message["content"]
        assert message["msg_type"] != "error", content
        if message["msg_type"] == "stream":
            printed.append(content["text"])

    reply = client.execute_interactive(code, timeout=PATIENCE, output_hook=listen)
    assert reply["content"]["status"] == "ok"
    return "".join(printed).strip()


def test_it_runs_under_uvloop(script: Callable[[str], list[str]]) -> None:
    """Rule P5: another event loop, with its own transports; kills are survived there too, and nothing is left."""
    command = script("""
        import uvloop

        async def main():
            async with make() as registry:
                before = (await registry.predict("odd", [0, 21])).tolist()
                for pid in pids():
                    os.kill(pid, signal.SIGKILL)
                after = (await registry.predict("odd", [[0, n] for n in range(100_000)])).tolist()
                tell(before=before, after=[after[0], after[-1]], restarts=registry.stats().worker_restarts)

        uvloop.run(main())
        tell(left=pids())
    """)
    first, second = map(json.loads, run(command).splitlines())
    assert (first["before"], first["after"]) == ([42], [0, 199_998])
    assert first["restarts"] >= 1
    assert second["left"] == []


def test_it_runs_on_the_event_loop_of_a_thread(script: Callable[[str], list[str]]) -> None:
    """Rule P5: no signal handler, no child watcher, and nothing else that only the main thread may have."""
    command = script("""
        async def main():
            async with make() as registry:
                tell(answer=(await registry.predict("odd", [0, 21])).tolist())

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        thread.join()
        tell(left=pids())
    """)
    assert list(map(json.loads, run(command).splitlines())) == [{"answer": [42]}, {"left": []}]


async def test_it_refuses_to_start_without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded Pythons may not know their executable: the error says what to set."""
    monkeypatch.setattr(sys, "executable", "")
    registry = ModelRegistry(MemoryStore(), workers=1, memory_budget="64 MiB")
    with pytest.raises(ModelCacheError, match=r"set it to a Python interpreter"):
        await registry.start()
    await registry.close()


async def test_it_belongs_to_one_event_loop(make_registry: MakeRegistry) -> None:
    """A registry used from another loop says so, and goes on serving its own."""
    registry = await make_registry(MemoryStore({"m.ubj": zoo.model().ubj}))
    await registry.load("m")

    def elsewhere() -> None:
        asyncio.run(registry.predict("m", zoo.rows(1)))

    with pytest.raises(RegistryClosedError, match="another event loop"):
        await asyncio.to_thread(elsewhere)
    assert np.array_equal(await registry.predict("m", zoo.rows(1)), zoo.model().expected(zoo.rows(1)))


# What ends the workers

SERVE = """
    async def main():
        registry = await make().start()
        await registry.predict("odd", [0, 21])
        tell(pids=pids())
        {busy}
        await asyncio.Event().wait()

    asyncio.run(main())
"""


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "predicting"])
def test_workers_end_with_their_parent(
    script: Callable[[str], list[str]], store: Path, tmp_path: Path, *, busy: bool
) -> None:
    """Rule P5: a parent that is killed cannot say goodbye; its workers leave all the same, whatever they are at."""
    gate = odd.Gate(tmp_path / "gate")
    (store / "held.json").write_bytes(odd.artifact(gate=gate.path))
    call = f'await registry.predict("held", [{odd.WAIT}, 0])' if busy else ""
    with running(script(SERVE.format(busy=call))) as parent:
        pids = parent.told()["pids"]
        assert len(pids) == 2
        if busy:
            gate.wait_for_worker()
        parent.process.send_signal(signal.SIGKILL)
        assert_ended(pids)


def test_ctrl_c_in_a_terminal_reaches_the_parent_alone(script: Callable[[str], list[str]]) -> None:
    """Rule P5: the app decides what Ctrl-C means, with workers that go on serving.

    They are in process groups of their own, so that no key of the terminal reaches them, not even while they start.
    """
    command = script("""
        async def main():
            pressed = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, pressed.set)
            async with make() as registry:
                await registry.load("odd")
                assert os.getpgid(0) not in map(os.getpgid, pids())
                tell(pids=pids())
                await pressed.wait()
                answer = (await registry.predict("odd", [0, 21])).tolist()
                tell(pids=pids(), answer=answer, restarts=registry.stats().worker_restarts)

        asyncio.run(main())
    """)
    terminal, end = pty.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with running([sys.executable, "-c", take_terminal, *command], stdin=end, start_new_session=True) as parent:
        before = parent.told()
        os.write(terminal, b"\x03")
        after = parent.told()
        assert parent.process.wait(PATIENCE) == 0
    os.close(terminal)
    os.close(end)
    assert after == {"pids": before["pids"], "answer": [42], "restarts": 0}
    assert_ended(before["pids"])


@pytest.mark.parametrize("kept", [True, False], ids=["global", "local"])
def test_an_unclosed_registry_warns_and_ends_with_its_loop(script: Callable[[str], list[str]], *, kept: bool) -> None:
    """Rule P5: ``asyncio.run`` ends the workers even if nobody closes the registry; one warning says so."""
    command = script(f"""
        async def main():
            {"global registry" if kept else ""}
            registry = await make().start()
            await registry.predict("odd", [0, 21])

        asyncio.run(main())
        tell(left=pids())
    """)
    done = subprocess.run(
        [command[0], "-W", "always", *command[1:]],
        check=True, env=ENVIRONMENT, timeout=PATIENCE, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"left": []}
    complaints = [line for line in done.stderr.splitlines() if "tracemalloc" not in line]
    assert len(complaints) == 1
    assert "ResourceWarning: unclosed registry <ModelRegistry" in complaints[0]


def test_a_registry_that_is_dropped_with_its_loop_ends_its_workers(script: Callable[[str], list[str]]) -> None:
    """Rule P5: nor does it take ``asyncio.run``; the last reference is enough, and spoils no other descriptor."""
    command = script("""
        loop = asyncio.new_event_loop()
        registry = make()
        loop.run_until_complete(registry.predict("odd", [0, 21]))
        workers = pids()
        loop.close()
        del registry
        gc.collect()
        files = [open(os.devnull) for _ in range(50)]
        del loop
        gc.collect()
        for file in files:
            os.fstat(file.fileno())
        _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids()], timeout=10)
        tell(workers=len(workers), left=len(alive))
    """)
    assert json.loads(run(command)) == {"workers": 2, "left": 0}


# Forks


def test_a_forked_child_is_told_and_disturbs_nobody(script: Callable[[str], list[str]]) -> None:
    """Rule P5: the child cannot use the parent's registry, and whatever it does with it the parent goes on.

    Nor does a child that outlives its parent keep the workers alive.
    """
    command = script("""
        async def main():
            registry = await make().start()
            await registry.predict("odd", [0, 21])
            workers = pids()
            child = os.fork()
            if not child:
                in_child(registry)
            sys.stdin.readline()
            answer = (await registry.predict("odd", [0, 21])).tolist()
            tell(workers=workers, child=child, answer=answer, restarts=registry.stats().worker_restarts)
            await asyncio.Event().wait()

        def in_child(registry):
            try:
                asyncio.run(registry.predict("odd", [0, 21]))
            except RegistryClosedError as error:
                told = str(error)
            asyncio.run(registry.close())
            del registry
            gc.collect()
            tell(told=told)
            signal.pause()

        asyncio.run(main())
    """)
    with running(command) as parent:
        assert "before the process forked" in parent.told()["told"]
        parent.go_on()
        facts = parent.told()
        assert (facts["answer"], facts["restarts"]) == ([42], 0)
        try:
            parent.process.send_signal(signal.SIGKILL)
            assert_ended(facts["workers"])
            assert alive(facts["child"])
        finally:
            os.kill(facts["child"], signal.SIGKILL)


def test_a_child_forked_while_workers_start_disturbs_nobody(script: Callable[[str], list[str]]) -> None:
    """Rule P5: it keeps neither end of a lane that it was born with, before the worker was started or after.

    The end of a worker is still noticed, and so is that of the parent.
    """
    command = script("""
        from modelcache.pool import pool, process

        children = []

        def fork_before(step):
            async def forking(*args):
                child = os.fork()
                if not child:
                    signal.alarm(60)  # should the test fail
                    signal.pause()
                children.append(child)
                return await step(*args)
            return forking

        async def main():
            registry = make()
            for owner, name in ((process, "_spawn"), (pool.Worker, "_greet")):
                setattr(owner, name, fork_before(getattr(owner, name)))
            await registry.start()
            workers = [worker.pid for worker in registry._pool.workers]
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            while registry.stats().worker_restarts < 2:
                await asyncio.sleep(0)
            answer = (await registry.predict("odd", [0, 21])).tolist()
            tell(answer=answer, children=children, workers=[worker.pid for worker in registry._pool.workers])
            await asyncio.Event().wait()

        asyncio.run(main())
    """)
    with running(command) as parent:
        facts = parent.told()
        try:
            assert facts["answer"] == [42]
            assert len(facts["children"]) == 8
            parent.process.send_signal(signal.SIGKILL)
            assert_ended(facts["workers"])
            assert all(alive(child) for child in facts["children"])
        finally:
            for child in facts["children"]:
                os.kill(child, signal.SIGKILL)


def test_abandoned_lanes_end_for_the_worker_and_keep_their_numbers() -> None:
    """Letting go of a descriptor ends the lane, but no other file can get its number, which the loop still has."""
    lanes = Lanes()
    lanes.abandon()  # nothing yet
    with lanes.open() as descriptors:
        workers = [socket.socket(fileno=os.dup(number)) for number in descriptors[:2]]
    lanes.abandon()
    for end, workers_end in zip(lanes.ends, workers, strict=True):
        assert os.fstat(end.fileno()).st_rdev == Path(os.devnull).stat().st_rdev
        assert not os.get_inheritable(end.fileno())
        workers_end.settimeout(5)
        assert workers_end.recv(1) == b""
        end.close()
        workers_end.close()
    lanes.abandon()  # nothing any more
    lanes.box.close()


def test_a_registry_works_in_each_process_of_a_prefork_server(script: Callable[[str], list[str]]) -> None:
    """Rule P5: made before the fork and started after it, or made after it: each process has workers of its own."""
    command = script("""
        early = make()

        async def serve(registry):
            async with registry:
                answer = (await registry.predict("odd", [0, 21])).tolist()
                return dict(answer=answer, workers=len(pids()))

        for registry in (early, None):
            child = os.fork()
            if not child:
                tell(**asyncio.run(serve(registry or make())), left=pids())
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)
    assert [json.loads(line) for line in run(command).splitlines()] == [{"answer": [42], "workers": 2, "left": []}] * 2


# What workers see


async def test_workers_inherit_nothing_secret(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rule S4: neither the environment nor any open file or socket, inheritable or not, but two lanes and a box."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(secret, True)
    store = MemoryStore({what + ".json": odd.artifact(tell=what) for what in ("environment", "descriptors")})
    registry = await make_registry(store, predictor=odd.ODD)
    names = set((await registry.load("environment")).feature_names or ())
    open_files = (await registry.load("descriptors")).feature_names or ()
    os.close(secret)
    assert names <= {
        "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
        "OPENBLAS_NUM_THREADS", "PATH", "TMPDIR", "TZ",
    }  # fmt: skip
    assert sum("socket:" in file for file in open_files) == 2
    assert sum("memfd:modelcache" in file for file in open_files) == 1
    others = [file for file in open_files if "socket:" not in file and "memfd:" not in file]
    assert {file.split()[0] for file in others} == {"0", "1", "2"}


async def test_workers_import_from_where_the_parent_does(
    make_registry: MakeRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder may have a ':' in its name, or be the current one; what is no text in sys.path is ignored as ever."""
    folder = tmp_path / "run 12:30:00"
    folder.mkdir()
    (folder / "at_noon.py").write_text("from odd import Odd")
    monkeypatch.setattr(sys, "path", [str(folder), "", tmp_path, *sys.path])
    monkeypatch.chdir(folder)
    registry = await make_registry(MemoryStore({"m.json": odd.artifact(tell="imports")}), predictor="at_noon:Odd")
    names = (await registry.load("m")).feature_names or ()
    assert names[:2] == (str(folder), str(folder))
    assert set(names) >= {entry for entry in sys.path if isinstance(entry, str) and entry}
